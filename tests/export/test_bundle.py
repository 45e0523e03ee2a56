"""A bundle: complete, without weights in its programs, shared where graphs are equal, the same every time."""

from shutil import copytree

import numpy as np
import onnx
import pytest
import torch

from export.build import export_bundle
from export.graphs.trace import forward_graph
from export.lowering.cache import ProgramCache
from export.lowering.parity import check_parity
from export.lowering.worker import LoweredProgram, lower, lowering_pool
from lamina.bundles.bundle import BLOBS, MANIFEST, blob_path, read_bundle
from lamina.encoding.tensors import decode_file
from lamina.errors import BundleError, ConfigError, CutError, ExportError, HashMismatchError, ParityError
from lamina.plans.segments import TensorSpec
from tests.export.tiny import AUDIO, MOTION, ONE, TOKENS, WIDTH, describe, export_tiny, model_of, one_stage, plan_of

# Three stages, of which the last two are equal; one modality's layers show that, and less is to be lowered.
DEEP = describe(AUDIO, MOTION.model_copy(update={"layers": 1}))
ENGINES = ("onnxruntime", "torch")


@pytest.fixture
def cache(program_cache):
    return program_cache


@pytest.fixture(scope="module")
def exported(tmp_path_factory, program_cache):
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    return folder, export_tiny(folder, program_cache, ENGINES, plan=plan_of(DEEP))


@pytest.fixture(scope="module")
def small(tmp_path_factory, program_cache):
    """One stage for both engines: the folder, the manifest, and what was told of the progress. Tests alter copies of it."""
    folder, seen = tmp_path_factory.mktemp("small") / "bundle", []
    manifest = export_tiny(folder, program_cache, ENGINES, on_progress=lambda *report: seen.append(report))
    return folder, manifest, seen


def test_round_trip(exported):
    folder, manifest = exported
    assert read_bundle(folder) == manifest
    assert {path.name for path in (folder / BLOBS).iterdir()} == set(manifest.blobs)
    assert manifest.versions["torch"] == torch.__version__


def test_initial_weights_are_the_models_under_local_names(exported):
    folder, manifest = exported
    for name, module in model_of(DEEP).segments().items():
        stored = decode_file(str(blob_path(folder, manifest.initial_weights[name])), manifest.segment(name).tensors)
        assert all(np.array_equal(stored[key], value.detach().numpy()) for key, value in module.named_parameters())


def test_later_stages_and_equal_layers_share_their_programs(exported):
    _, manifest = exported
    for engine, files_per_stage in (("onnxruntime", 2), ("torch", 1)):
        stages = [{stage.train[engine], stage.eval[engine]} for stage in manifest.stages]
        assert stages[1] == stages[2] != stages[0]
        frozen = manifest.frozen_programs[engine]
        assert set(frozen) == set(manifest.plan.stages[-1].frozen)
        layers = {name: program for name, program in frozen.items() if ".layers." in name}
        assert set(layers) == {"audio.layers.0", "audio.layers.1", "motion.layers.0"}
        assert len(set(layers.values())) == 1
        # Two kinds of stage, two stems, one layer.
        assert sum(program.engine == engine for program in manifest.programs.values()) == 2 * files_per_stage + 3


def test_programs_hold_no_weights_and_no_paths(exported):
    folder, manifest = exported
    for digest, program in manifest.programs.items():
        data = blob_path(folder, digest).read_bytes()
        assert not any(word in data for word in (b"site-packages", b"/export/", b"/home/", b"/root/"))
        if program.engine == "onnxruntime":
            graph = onnx.load_from_string(data).graph
            assert max((np.prod(tensor.dims) for tensor in graph.initializer), default=0) <= 16
            constants = [a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute]
            assert max((np.prod(tensor.dims) for tensor in constants), default=0) <= 16
        else:
            exported = torch.export.load(blob_path(folder, digest))
            assert not exported.state_dict
            assert max((t.numel() for t in exported.constants.values() if isinstance(t, torch.Tensor)), default=0) <= 16


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_size_of_a_program_does_not_grow_with_the_width(engine):
    sizes = []
    for width in (16, 64):
        encoder = ONE.encoders[0].model_copy(update={"width": width})
        description = ONE.model_copy(update={"encoders": (encoder,)})
        layer = model_of(description).segments()["audio.layers.0"]
        sizes.append(len(lower(engine, forward_graph(layer, (torch.randn(2, TOKENS, width),), 4)).data))
    assert sizes[1] < 1.02 * sizes[0]


def test_a_second_export_takes_all_programs_from_the_cache_and_is_identical(tmp_path, cache, exported, monkeypatch):
    def refuse(*_):
        raise AssertionError("a process was started")

    monkeypatch.setattr("export.lowering.worker._Process", refuse)
    folder, _ = exported
    export_tiny(tmp_path / "again", cache, ENGINES, plan=plan_of(DEEP))
    assert (tmp_path / "again" / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()


def test_the_seed_decides_the_weights_and_not_the_programs(tmp_path, cache, small):
    _, first, _ = small
    other = export_tiny(tmp_path / "b", cache, ENGINES, plan=one_stage(plan_of()).model_copy(update={"seed": 1}))
    assert first.programs == other.programs
    assert first.initial_weights["audio.layers.0"] != other.initial_weights["audio.layers.0"]


def test_a_given_model_gives_its_weights(tmp_path, cache):
    model = model_of()
    with torch.no_grad():
        model.head.bias.fill_(7.0)
    manifest = export_tiny(tmp_path / "own", cache, model=model)
    path = blob_path(tmp_path / "own", manifest.initial_weights["head"])
    assert decode_file(str(path), manifest.segment("head").tensors)["bias"].tolist() == [7.0] * 3


def test_a_damaged_cache_entry_is_made_again(tmp_path):
    cache = ProgramCache(tmp_path)
    cache.put("key", LoweredProgram(b"program", 5))
    assert cache.get("key") == LoweredProgram(b"program", 5)
    (tmp_path / "key.program").write_bytes(b"progran")
    assert cache.get("key") is None
    assert cache.get("other") is None


def test_progress_counts_up_to_the_end(small):
    *_, seen = small
    for phase in ("trace", "lower"):
        counts = [(done, total) for name, done, total in seen if name == phase]
        assert [done for done, _ in counts] == list(range(counts[-1][1] + 1))


def test_exporting_again_into_the_same_folder_is_allowed_and_removes_what_is_stale(tmp_path, cache, small):
    copytree(small[0], tmp_path / "b")
    manifest = export_tiny(tmp_path / "b", cache, ("torch",))
    assert {path.name for path in (tmp_path / "b" / BLOBS).iterdir()} == set(manifest.blobs) < set(small[1].blobs)


def test_folders_that_hold_something_else_are_refused(tmp_path, cache, small):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files \(a\.txt\)"):
        export_tiny(tmp_path / "notes", cache)
    copytree(small[0], tmp_path / "bundle")
    with pytest.raises(ConfigError, match="bundle of another plan"):
        export_tiny(tmp_path / "bundle", cache, plan=one_stage(plan_of(batch_size=8)))
    with pytest.raises(ConfigError, match="is a file"):
        export_tiny(tmp_path / "notes" / "a.txt", cache)
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"


@pytest.mark.parametrize("engines", [(), ("torch", "torch"), ("tensorflow",)])
def test_engines_must_be_known_and_named_once(tmp_path, cache, engines):
    with pytest.raises(ConfigError, match="engines must be"):
        export_bundle(plan_of(), tmp_path / "x", engines, cache=cache)


def test_a_model_that_cannot_be_cut_writes_nothing(tmp_path, cache):
    model = model_of()
    model.extra = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(CutError):
        export_tiny(tmp_path / "none", cache, model=model)
    assert not (tmp_path / "none").exists()


def test_altered_and_missing_blobs_are_refused(tmp_path, small):
    copytree(small[0], tmp_path / "b")
    manifest = read_bundle(tmp_path / "b")
    path = blob_path(tmp_path / "b", manifest.initial_weights["head"])
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(HashMismatchError, match=path.name):
        read_bundle(tmp_path / "b")
    path.unlink()
    with pytest.raises(BundleError, match=path.name):
        read_bundle(tmp_path / "b")


def test_a_program_that_computes_something_else_is_refused(exported):
    folder, manifest = exported
    data = blob_path(folder, manifest.frozen_programs["onnxruntime"]["audio.layers.0"]).read_bytes()
    layer = model_of(DEEP).segments()["audio.layers.0"]
    x = (torch.randn(2, TOKENS, WIDTH),)
    check_parity(data, "onnxruntime", "frozen", "the layer", layer, x)
    layer.attention.heads = 4  # the program was made with two
    with pytest.raises(ParityError, match="the layer for onnxruntime: output 0 is off by"):
        check_parity(data, "onnxruntime", "frozen", "the layer", layer, x)


class Bessel(torch.nn.Module):
    """An operation that ONNX cannot say."""

    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_a_graph_that_an_engine_refuses_is_reported_in_the_compilers_words():
    graph = forward_graph(Bessel(), (torch.randn(2, 3),), 4)
    with lowering_pool(1) as start, pytest.raises(ExportError, match=r"(?s)onnxruntime refused the graph.*bessel_j0"):
        start("onnxruntime", graph)()


def test_exchange_specs_are_the_cut_modules_own(exported):
    _, manifest = exported
    specs = manifest.exchange_specs(1)
    assert specs[0] == TensorSpec(name="audio.layers.1/attention_norm.weight", shape=(WIDTH,))
    program = manifest.programs[manifest.stages[1].train["torch"]]
    assert program.weights == tuple(spec.shape for spec in specs)

"""Each kind of fault has words of its own, for the doctor and the export alike, and what can be made right is."""

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from export.build import export_bundle
from export.cost.estimate import plan_costs
from export.models.factory import call_factory
from export.models.models import build_model
from export.plans.resolve import resolve
from lamina.encoding.tensors import decode_file
from lamina.errors import ConfigError, CutError, ExportError
from lamina.plans.model import Values
from tests.export.menu import MENU, TOKENS, WIDTH, Model, Padded
from tests.export.test_agreement import doctors_words, exporters_words, write_plan

HERE = "tests.export.test_faults"


def words_of(tmp_path, *layers, **options):
    """What the doctor and an export say of a model with these layers of the menu."""
    source = write_plan(tmp_path, {"stem": "linear", "layers": list(layers), **options})
    return "\n".join(doctors_words(source, "torch")), exporters_words(source, "torch", tmp_path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("layer", "reason", "remedy"),
    [
        ("gru", "aten.gru.input is a recurrent layer", "a convolution over time or attention"),
        ("lstm", "aten.lstm.input is a recurrent layer", "a convolution over time or attention"),
        ("rnn", "aten.rnn_tanh.input is a recurrent layer", "a convolution over time or attention"),
        ("noise", "gives other values for the same input: it draws random numbers", "nn.Dropout"),
        ("noise of numpy", "gives other values for the same input: it draws random numbers", "noise belongs to the data"),
        ("spectral norm", "the spectral norm's estimate", "remove_parametrizations"),
        ("older spectral norm", "the spectral norm's estimate", "remove_spectral_norm"),
        ("older weight norm", "is computed from others", "torch.nn.utils.parametrizations.weight_norm"),
        ("counts", "changes its buffer 'steps' in forward()", "instead of running statistics"),
        ("huge buffer", "buffers take 1,440,000 bytes", "compute them in forward()"),
        ("complex buffer", "is torch.complex64", "real and imaginary parts"),
        ("complex", "gives torch.complex64, a complex tensor", "real and imaginary parts as two tensors"),
        ("sparse", "gives a tensor of layout torch.sparse_coo", ".to_dense()"),
        ("integers", "gives torch.int64", ".float()"),
        ("across the batch", "other values where other samples are beside it", "over the axes of one sample"),
        ("loop over the batch", "one batch size only", "x.shape[0]"),
        ("fixed batch", "one batch size only", "x.shape[0]"),
        ("nan", "gives NaN or infinity", "clamp"),
        ("branch", "depends on the values of its input (menu.py, line", "torch.where"),
        ("constant that is no buffer", "constant tensor", "register_buffer"),
        ("views", "two parameters in one memory", "one nn.Parameter under both names"),
        ("batch statistics", "track_running_stats=False", "GroupNorm"),
        ("half", "is torch.float16", "model.float()"),
    ],
)
def test_a_construct_has_its_own_diagnosis_and_remedy(tmp_path, layer, reason, remedy):
    doctor, exporter = words_of(tmp_path, layer)

    assert reason in doctor and remedy in doctor
    assert reason in exporter and remedy in exporter


def test_an_input_that_gets_no_gradient_is_not_a_parameter_to_remove(tmp_path):
    doctor, exporter = words_of(tmp_path, "detached input")

    assert "no gradient to its input" in doctor and ".detach()" in doctor and "remove the parameter" not in doctor
    assert "signal.stem" in exporter and ".detach()" in exporter


@pytest.mark.parametrize("layers", [["linear", "linear", "linear"], ["residual", "layer norm", "residual"]])
def test_a_layer_that_is_several_is_refused_unless_copies_are_asked_for(tmp_path, layers):
    source = write_plan(tmp_path, {"stem": "linear", "layers": layers, "is_shared": True})
    with pytest.raises(CutError, match=r"layers\.0/.*are one tied parameter.*copy_shared = true"):
        resolve(source)
    doctor = "\n".join(doctors_words(source, "torch"))
    assert "is tied to signal.layers." in doctor and "signal.layers.2/" in doctor and "copy_shared = true" in doctor

    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["encoders"]["signal"]["options"] = {"copy_shared": True}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    read = resolve(source)

    assert not doctors_words(source, "torch")
    assert any("began as a copy of one in layer 0" in note for note in read.notes)
    first, *_, last = read.model.encoders["signal"].layers
    assert all(torch.equal(a, b) and a is not b for a, b in zip(first.parameters(), last.parameters(), strict=True))


def shared(what: str) -> object:
    """A factory: the last norm is in the stem too; one encoder or one layer for two modalities; shared activations."""
    if what == "norm":
        norm = nn.LayerNorm(WIDTH)
        model = Model(nn.Sequential(Padded(), norm), [MENU["linear"]()])
        model.norm = norm
        return model
    if what == "weight":
        first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        second.weight = first.weight
        return Model(Padded(), [first, second])
    if what == "memory":
        first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        second.weight = nn.Parameter(first.weight.data)
        return Model(Padded(), [first, second])
    if what == "encoder":
        model = Model(Padded(), [MENU["linear"]()])
        return {"left": model, "right": model}
    if what == "layer":
        block = MENU["linear"]()
        return {"left": Model(Padded(), [block]), "right": Model(Padded(), [block])}
    relu = nn.ReLU()
    return Model(Padded(), [nn.Sequential(nn.Linear(WIDTH, WIDTH), relu), nn.Sequential(nn.Linear(WIDTH, WIDTH), relu)])


def plan_of(tmp_path, what: str, **options: object) -> str:
    names = ["left", "right"] if what in ("encoder", "layer") else ["signal"]
    encoder = {"factory": f"{HERE}:shared", "arguments": {"what": what}, "options": options}
    (tmp_path / "plan.json").write_text(json.dumps({"name": "x", "classes": 2, "encoders": dict.fromkeys(names, encoder)}))
    return str(tmp_path / "plan.json")


@pytest.mark.parametrize("what", ["norm", "weight", "memory", "encoder", "layer"])
def test_whatever_segments_share_is_refused_by_all_or_copied_for_all(tmp_path, what):
    source = plan_of(tmp_path, what)
    with pytest.raises(CutError, match="copy_shared = true"):
        resolve(source)
    assert any("copy_shared = true" in words for words in doctors_words(source, "torch"))

    read = resolve(plan_of(tmp_path, what, copy_shared=True))
    tensors = [value.data_ptr() for value in read.model.parameters()]
    assert len(set(tensors)) == len(tensors)
    assert plan_costs(read.plan, read.model).stages


def test_what_has_no_weights_and_what_one_segment_has_under_two_names_may_be_shared(tmp_path):
    assert not resolve(plan_of(tmp_path, "activation")).faults
    source = write_plan(tmp_path, {"stem": "linear", "layers": ["two names"]})
    assert not resolve(source).faults
    assert not doctors_words(source, "torch")


def test_what_is_tied_within_a_layer_stays_one_through_export_and_build(tmp_path):
    read = resolve(write_plan(tmp_path, {"stem": "linear", "layers": ["two names"], "strategy": "end_to_end"}))
    manifest = export_bundle(read.plan, tmp_path / "b", ("torch",), model=read.model, cache=tmp_path / "c", workers=1)
    (segment,) = [each for each in manifest.segments if each.name == "signal.layers.0"]
    tensors = decode_file(str(tmp_path / "b" / "blobs" / manifest.initial_weights[segment.name]), list(segment.tensors))
    assert sorted(tensors) == ["again", "linear.bias"]  # one tensor, under the first of its names
    layer = build_model(read.plan.model, read.plan.seed).encoders["signal"].layers[0]
    assert layer.again is layer.linear.weight


@pytest.mark.parametrize("layer", ["in place", "in place of a view", "relu in place"])
def test_a_layer_that_changes_its_input_gets_a_copy_and_gives_the_same(tmp_path, layer):
    read = resolve(write_plan(tmp_path, {"stem": "sigmoid", "layers": [layer]}))
    made = read.model.encoders["signal"].layers[0]
    x = torch.randn(2, TOKENS, WIDTH)
    before = x.clone()
    with torch.no_grad():
        torch.manual_seed(0)
        original = MENU[layer]()
        original.load_state_dict(made.state_dict())
        assert torch.equal(made(x), original(x.clone())) and torch.equal(x, before)
    assert any(rewrite.kind == "input copied" and rewrite.where == "signal.layers.0" for rewrite in read.rewrites)


def test_weight_norm_is_trained_as_it_is(tmp_path):
    doctor, exporter = words_of(tmp_path, "weight norm", "weight norm")
    assert not doctor and not exporter


def normed() -> nn.Module:
    return Model(Padded(), [parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH), dim=None)])


def raises_of_torchvision() -> nn.Module:
    raise RuntimeError("operator torchvision::nms does not exist")


def raises_behind_another() -> nn.Module:
    try:
        raises_of_torchvision()
    except RuntimeError as error:
        raise ModuleNotFoundError("Could not import module 'BertModel'. Are its requirements defined correctly?") from error


def needs_a_package() -> nn.Module:
    import no_such_package  # type: ignore[import-not-found]

    return no_such_package.make()


def is_offline() -> nn.Module:
    raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")


def returns_nothing() -> None:
    """As of a function whose `return` was forgotten."""


def ends_the_program() -> nn.Module:
    raise SystemExit(2)


def makes_an_empty_dict() -> dict[str, nn.Module]:
    return {}


class Lazy(nn.Module):
    """As a library that imports a part of itself when it is first run."""

    def forward(self, x: Tensor) -> Tensor:
        raises_of_torchvision()
        return x


class Hostile(nn.Module):
    """A property that raises."""

    input = Values(shape=(TOKENS, 3))

    @property
    def stem(self) -> nn.Module:
        raise RuntimeError("operator torchvision::nms does not exist")


def hostile() -> nn.Module:
    return Hostile()


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("raises_of_torchvision", r"torchvision::nms does not exist .*lamina doctor"),
        ("raises_behind_another", r"Could not import module 'BertModel'.*lamina doctor"),
        ("needs_a_package", r"No module named 'no_such_package'.*install the package"),
        ("is_offline", r"couldn't connect.*fetch them once where there is a network"),
        ("returns_nothing", r"returned None: .*`return model`"),
        ("ends_the_program", r"raised SystemExit"),
        ("makes_an_empty_dict", r"makes a dict with keys \[\]"),
        ("hostile", r"torchvision::nms.*lamina doctor"),
        ("ends_the_program(x)", r"did you mean|has no"),
    ],
)
def test_what_a_factory_or_its_library_raises_has_a_way_out(factory, words):
    for check in (True, False):
        with pytest.raises((ExportError, ConfigError), match=words):
            resolve(f"{HERE}:{factory}", {"classes": 2}, check=check)


@pytest.mark.parametrize("error", [RuntimeError, ModuleNotFoundError, ImportError])
def test_a_module_that_imports_a_part_of_itself_only_now_is_no_traceback(tmp_path, monkeypatch, error):
    (tmp_path / f"lazy_{error.__name__.lower()}.py").write_text(
        "def __getattr__(name):\n"
        f"    raise {error.__name__}(f'cannot import {{name}}: operator torchvision::nms does not exist')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ExportError, match=r"torchvision::nms.*lamina doctor"):
        call_factory(f"lazy_{error.__name__.lower()}:BertModel", {})
    (tmp_path / f"early_{error.__name__.lower()}.py").write_text(
        f"raise {error.__name__}('operator torchvision::nms does not exist')\n"
    )
    with pytest.raises((ExportError, ConfigError), match=r"torchvision::nms.*lamina doctor"):
        call_factory(f"early_{error.__name__.lower()}:make", {})

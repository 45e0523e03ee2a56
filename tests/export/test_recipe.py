"""Plan files and factories: what people write becomes a plan and a model, or a sentence that says what to change."""

import pytest
import torch
from typer.testing import CliRunner

from export.build import export_bundle
from export.plans.resolve import is_factory, resolve
from lamina.bundles.keys import VARIABLE, own_key, trust_key
from lamina.bundles.signing import key_text
from lamina.cli.main import app
from lamina.errors import ConfigError, CutError, ExportError, TensorFileError
from lamina.plans.plan import Plan
from lamina.plans.recipe import read_recipe
from lamina.plans.strategies import make_stages
from tests.small_plans import SENSORS, make_plan

HERE = "tests.export.user_models"
TOML = f"""
name = "mine"
classes = 3
rounds = 5
[encoders.signal]
factory = "{HERE}:signal"
arguments = {{ width = 12 }}
[training]
batch_size = 4
"""
YAML = f"""
name: mine
classes: 3
rounds: 5
encoders:
  signal:
    factory: {HERE}:signal
    arguments: {{width: 12}}
training:
  batch_size: 4
"""


def write(tmp_path, text, name="plan.toml"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_toml_yaml_and_json_say_the_same(tmp_path):
    plans = [
        resolve(write(tmp_path, TOML)).plan,
        resolve(write(tmp_path, YAML, "plan.yaml")).plan,
        resolve(write(tmp_path, read_recipe(tmp_path / "plan.toml").to_json().decode(), "plan.json")).plan,
    ]
    assert plans[0] == plans[1] == plans[2]
    (encoder,) = plans[0].model.encoders
    assert (encoder.features, encoder.width, encoder.layers) == (((5, 12),) * 3, 12, 2)
    assert [stage.rounds for stage in plans[0].stages] == [2, 3]


def test_the_same_file_gives_the_same_weights_and_another_seed_gives_others(tmp_path):
    path = write(tmp_path, TOML)
    one, two, other = (resolve(path, {"seed": seed}).model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["encoders.signal.stem.weight"], other["encoders.signal.stem.weight"])


def test_a_factory_alone_takes_its_modalities_and_the_options(tmp_path):
    plan = resolve(f"{HERE}:signal", {"classes": 3, "rounds": 6, "strategy": "progressive"}).plan
    assert plan.model.modalities == ("signal",)
    assert plan.stages[1].active[:3] == ("signal.stem", "signal.layers.0", "signal.layers.1")
    assert resolve(f"{HERE}:pair").plan.model.objective.kind == "contrastive"
    assert resolve(f"{HERE}:three", {"classes": 2}).plan.model.modalities == ("signal", "text", "other")


def test_frozen_stems_are_active_in_no_stage():
    for strategy in ("layerwise", "progressive", "end_to_end"):
        plan = resolve(f"{HERE}:signal", {"classes": 3, "freeze_stems": True, "strategy": strategy}).plan
        assert all("signal.stem" in stage.frozen and "signal.stem" not in stage.active for stage in plan.stages)


def test_options_replace_what_a_whole_plan_says_and_remake_its_stages_only_if_they_must(tmp_path):
    plan = make_plan(SENSORS)
    path = write(tmp_path, plan.to_json().decode(), "plan.json")
    assert resolve(path).plan == plan
    assert resolve(path, {"training": {"micro_batch": 1}}).plan.stages == plan.stages
    assert resolve(path, {"training": {"micro_batch": 1}}).plan.training.micro_batch == 1
    assert resolve(path, {"strategy": "end_to_end"}).plan.strategy == "end_to_end"
    with pytest.raises(ConfigError, match="is a whole plan: 'classes' is decided in it"):
        resolve(path, {"classes": 4})


def test_what_no_option_names_stays_when_the_stages_are_made_anew(tmp_path):
    plan = make_plan(SENSORS)
    own = make_stages(SENSORS, "layerwise", [3, 5], [0.1, 0.2])
    path = write(tmp_path, plan.model_copy(update={"stages": own}).to_json().decode(), "plan.json")
    assert resolve(path, {"freeze_stems": False}).plan.stages == own
    assert [stage.rounds for stage in resolve(path, {"learning_rate": 0.3}).plan.stages] == [3, 5]
    assert [stage.learning_rate for stage in resolve(path, {"rounds": 4}).plan.stages] == [0.1, 0.2]

    two = make_stages(SENSORS, "layerwise", 8, 0.1, layers_per_stage=2)
    path = write(tmp_path, plan.model_copy(update={"stages": two}).to_json().decode(), "two.json")
    assert [stage.rounds for stage in resolve(path, {"rounds": 6}).plan.stages] == [6]


def test_a_written_plan_resolves_to_itself(tmp_path):
    plan = resolve(write(tmp_path, TOML)).plan
    path = write(tmp_path, plan.to_json().decode(), "whole.json")
    assert resolve(path).plan == Plan.from_file(tmp_path / "whole.json") == plan


@pytest.mark.parametrize(
    "text, name, message",
    [
        (TOML.replace("rounds", "ronds"), "p.toml", r"p\.toml .*ronds: unknown key; did you mean 'rounds'\?"),
        (TOML.replace("batch_size", "batchsize"), "p.toml", r"training\.batchsize: unknown key; did you mean 'batch_size'\?"),
        (TOML + "[training]\n", "p.toml", r"p\.toml cannot be read: .*training"),
        (TOML.replace("classes = 3", "classes = "), "p.toml", r"p\.toml cannot be read: Invalid value \(at line 3"),
        (YAML + "  - x\n", "p.yaml", r"p\.yaml cannot be read: .*line 11"),
        ("[1, 2]", "p.json", "holds a list, not keys with values"),
        ("x = 1", "p.txt", r"its name must end with \.toml"),
        (TOML.replace("classes = 3", ""), "p.toml", "the objective is contrastive, which joins exactly two modalities"),
        (TOML.replace('"mine"', '"Mine!"'), "p.toml", "name: String should match"),
        (TOML.replace("factory", "layers = 9\nfactory"), "p.toml", "has 2 layers, the plan wants 9"),
        (TOML.replace("factory", "heads = 2\nfactory"), "p.toml", "those of the built-in family"),
        (TOML.replace("encoders.signal", "encoders.Signal"), "p.toml", "encoders.Signal"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_place(tmp_path, text, name, message):
    with pytest.raises(ConfigError, match=message):
        resolve(write(tmp_path, text, name))


@pytest.mark.parametrize(
    "factory, error, message",
    [
        (f"{HERE}:sinal", ConfigError, r"has no 'sinal'; did you mean 'signal'\?"),
        ("no_such_package.x:make", ConfigError, "there is no module 'no_such_package'"),
        (f"{HERE}:not_a_function", ConfigError, "is a int, not a function"),
        (
            f"{HERE}:raises",
            ExportError,
            r"raised OSError: weights\.bin is not there \(at user_models\.py, line \d+, in raises\)",
        ),
        (f"{HERE}:a_number", CutError, "a int is no model"),
        (f"{HERE}:half", CutError, r"float16.*call model\.float\(\)"),
        (f"{HERE}:elsewhere", CutError, r"is on meta.*call model\.cpu\(\)"),
        (f"{HERE}:widths_differ", CutError, r"signal\.layers\.1 cannot take an input of shape \(2, 5, 8\)"),
    ],
)
def test_a_factory_that_fails_is_refused_with_the_reason(factory, error, message):
    with pytest.raises(error, match=message):
        resolve(factory, {"classes": 3})


DOCTORED = "tests.export.test_doctor"


@pytest.mark.parametrize(
    "factory, message",
    [
        ("half_layer", r"layers\.1\.linear\.weight' is torch\.float16.*call model\.float\(\)"),
        ("layer_that_counts", r"signal\.layers\.1 changes its buffer 'scale' in forward\(\).*use LayerNorm"),
        ("raising_layer", r"signal\.layers\.1 cannot take an input of shape \(2, 4, 16\).*KeyError: 'no such thing'"),
    ],
)
def test_what_the_doctor_reads_to_the_end_an_export_refuses_at_once(tmp_path, factory, message):
    with pytest.raises(CutError, match=message):
        resolve(f"{DOCTORED}:{factory}", {"classes": 3})
    refused = CliRunner().invoke(app, ["export", f"{DOCTORED}:{factory}", "--classes", "3", "--out", str(tmp_path / "b")])
    assert isinstance(refused.exception, CutError) and not (tmp_path / "b").exists()
    assert resolve(f"{DOCTORED}:{factory}", {"classes": 3}, check=False).plan.model.encoder("signal").layers == 4


def test_a_sound_model_is_read_the_same_without_checks(tmp_path):
    for source in (f"{HERE}:three", write(tmp_path, TOML)):
        changes = {"classes": 3} if is_factory(source) else None
        checked, read = resolve(source, changes), resolve(source, changes, check=False)
        assert read.plan == checked.plan and not read.faults and not checked.faults
        one, other = checked.model.state_dict(), read.model.state_dict()
        assert list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_what_is_no_fault_of_a_layer_is_refused_without_checks_as_well():
    for factory, error in (("a_number", CutError), ("raises", ExportError), ("not_a_function", ConfigError)):
        with pytest.raises(error):
            resolve(f"{HERE}:{factory}", {"classes": 3}, check=False)


def test_no_layers_is_said_so(tmp_path):
    with pytest.raises(CutError, match="layers"):
        resolve(write(tmp_path, TOML.replace("width = 12", "layers = 0")))


def test_code_that_depends_on_values_is_refused_with_its_line_and_the_way_out(tmp_path):
    found = resolve(f"{HERE}:by_value", {"classes": 3})
    with pytest.raises(CutError, match=r"stage 1 .*depends on the values.*\(user_models\.py, line \d+.*use torch\.where"):
        export_bundle(found.plan, tmp_path / "b", ("torch",), model=found.model, cache=tmp_path / "c")


def test_an_operator_that_an_engine_lacks_is_refused_with_its_name_and_the_way_out(tmp_path):
    found = resolve(f"{HERE}:overlapping_pools", {"classes": 3})
    with pytest.raises(
        ExportError, match=r"the train program of stage 0: onnxruntime has no aten.avg_pool2d_backward.*without overlap"
    ):
        export_bundle(found.plan, tmp_path / "b", ("onnxruntime",), model=found.model, cache=tmp_path / "c", workers=1)


def test_three_modalities_export_as_two_do(tmp_path):
    found = resolve(f"{HERE}:three", {"classes": 3, "training": {"batch_size": 4}})
    manifest = export_bundle(found.plan, tmp_path / "b", ("torch",), model=found.model, notes=found.notes, cache=tmp_path / "c")
    train = manifest.programs[manifest.stages[1].train["torch"]]
    assert [spec.name for spec in train.inputs] == ["signal", "text", "other", "label"]
    assert [note for note in manifest.notes if "dropouts of up to 0.3 are off" in note]


def test_assemble_calls_the_factory_of_another_machine_s_bundle_only_if_told(tmp_path, monkeypatch):
    found = resolve(f"{HERE}:signal", {"classes": 3, "training": {"batch_size": 4}})
    export_bundle(found.plan, tmp_path / "b", ("torch",), model=found.model, cache=tmp_path / "c")
    signer = key_text(own_key().public_key)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "keys of another machine"))
    trust_key(signer, "exporter")

    arguments = ["assemble", str(tmp_path / "b"), "--weights", str(tmp_path / "none"), "--out", str(tmp_path / "m")]
    refused = CliRunner().invoke(app, arguments).exception
    told = CliRunner().invoke(app, [*arguments, "--run-factories"]).exception

    assert isinstance(refused, ConfigError) and "user_models:signal would be called" in refused.message
    assert isinstance(told, TensorFileError)  # one step further: the weights are not there


def test_what_is_a_factory():
    assert is_factory("my_models:make")
    assert not is_factory("plans/my.toml")
    assert not is_factory("C:\\plans\\my.toml")

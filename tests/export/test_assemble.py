"""The assembled model: three files, one prediction."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from export.assemble import assemble, attached_model
from export.graphs.cut import describe_segment
from export.models.models import build_model
from lamina.bundles.bundle import hash_file
from lamina.bundles.manifest import Manifest
from lamina.cli.main import app
from lamina.encoding.tensors import encode
from lamina.errors import ConfigError, ParityError, TensorFileError
from lamina.plans.model import Contrastive, ImagePatches, ModelDescription, TextTokens
from lamina.plans.plan import Plan
from tests.export.tiny import AUDIO, CLASSES, LAYERS, ONE, TWO, describe, one_stage, plan_of

SHALLOW = describe(*(encoder.model_copy(update={"layers": 1}) for encoder in TWO.encoders))
INPUTS = {"image": ImagePatches(channels=1, height=4, width=4, patch=2), "text": TextTokens(vocabulary=7, length=4)}
MATCHED = describe(
    *(AUDIO.model_copy(update={"layers": 2, "modality": name, "input": taken}) for name, taken in INPUTS.items())
).model_copy(update={"objective": Contrastive()})


def bare_manifest(plan):
    """The manifest of a bundle that was exported for no engine: assembling needs the plan and the segments alone."""
    segments = tuple(
        describe_segment(name, module, plan.model) for name, module in build_model(plan.model, 0).segments().items()
    )
    nothing = dict.fromkeys(
        ("active_parameters", "frozen_parameters", "flops_per_sample", "prefix_flops_per_sample", "frozen_bytes"), 0
    ) | {"planned_bytes": {}, "program_bytes": {}, "round_bytes_down": 0, "round_bytes_up": 0}
    return Manifest(
        plan=plan,
        segments=segments,
        initial_weights={segment.name: "0" * 64 for segment in segments},
        programs={},
        frozen_programs={},
        stages=tuple({"index": stage.index, "train": {}, "eval": {}, "cost": nothing} for stage in plan.stages),
        blobs={"0" * 64: 0},
        versions={},
    )


def trained(description, seed=5):
    model = build_model(description, seed)
    return {n: {k: p.detach().numpy() for k, p in m.named_parameters()} for n, m in model.segments().items()}


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    """(what was made, the inputs it was compared on) of SHALLOW: more than two batches of the plan."""
    random = np.random.default_rng(0)
    inputs = {e.modality: random.normal(size=(9, *e.input.shape)).astype(np.float32) for e in SHALLOW.encoders}
    folder = tmp_path_factory.mktemp("assembled")
    return assemble(bare_manifest(plan_of(SHALLOW)), trained(SHALLOW), folder, inputs=list(inputs.values())), inputs


@pytest.fixture(scope="module")
def by_command(tmp_path_factory, program_cache):
    """(folder, what `lamina export` said) from a plan to a model, of two modalities whose last layers no stage attached."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "plan.json").write_bytes(one_stage(plan_of(MATCHED)).to_json())
    run = CliRunner().invoke
    arguments = ["export", str(folder / "plan.json"), "--out", str(folder / "b"), "--engine", "torch", "--jobs", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMINA_CACHE", str(program_cache))
        exported = run(app, arguments)
    assert exported.exit_code == 0, exported.output
    (folder / "w").mkdir()
    for name, tensors in trained(MATCHED).items():  # also of layers that were never attached, as `lamina pull` gives them
        (folder / "w" / f"{name}.safetensors").write_bytes(encode(tensors))
    done = run(app, ["assemble", str(folder / "b"), "--weights", str(folder / "w"), "--out", str(folder / "m")])
    assert done.exit_code == 0, done.output
    return folder, exported.output


def test_the_three_files_predict_the_same(assembled):
    made, inputs = assembled
    assert made.max_difference < 1e-5
    assert [len(logits) for (logits,) in made.outputs.values()] == [9, 9, 9]
    reference = build_model(SHALLOW, 5)
    for state in (load_file(made.safetensors), torch.load(made.state_dict)):
        own = build_model(SHALLOW, 0)
        own.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), reference.parameters(), strict=True))
    session = onnxruntime.InferenceSession(str(made.onnx))
    (logits,) = session.run(["logits"], inputs)
    with torch.no_grad():
        (expected,) = reference(*(torch.from_numpy(x) for x in inputs.values()))
    assert logits.shape == (9, CLASSES)
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5)
    assert ModelDescription.from_file(made.onnx.with_name("model.json")) == SHALLOW
    assert max(np.prod(t.dims) for t in onnx.load(made.onnx).graph.initializer) > 100  # the weights are inside


def test_command_line_from_plan_to_model(by_command):
    folder, said = by_command
    assert "tiny: layerwise, batch 4" in said
    assert "1 program files" in said
    assert {path.name for path in (folder / "m").iterdir()} == {
        f"model.{kind}" for kind in ("pt", "safetensors", "onnx", "pte", "json")
    }


def test_a_contrastive_model_gives_unit_embeddings(by_command):
    session = onnxruntime.InferenceSession(str(by_command[0] / "m" / "model.onnx"))
    assert [value.name for value in session.get_outputs()] == ["image_embedding", "text_embedding"]
    given = session.run(None, {"image": np.ones((3, 1, 4, 4), np.float32), "text": np.ones((3, 4), np.int64)})
    for embedding in given:
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-4)


def test_layers_that_were_never_attached_are_left_out(by_command):
    plan = plan_of()
    short = Plan(**{**dict(plan), "stages": plan.stages[:2]})
    assert attached_model(short).encoders[0].layers == LAYERS - 1
    state = load_file(by_command[0] / "m" / "model.safetensors")
    kept = {tuple(key.split(".")[1:4]) for key in state if ".layers." in key}
    assert kept == {("image", "layers", "0"), ("text", "layers", "0")}


def test_inputs_must_fit_the_model(tmp_path):
    x = np.zeros((2, AUDIO.input.frames - 1, AUDIO.input.coefficients), np.float32)
    with pytest.raises(ConfigError, match="inputs must have shapes"):
        assemble(bare_manifest(plan_of()), trained(ONE), tmp_path, inputs=[x])


def test_wrong_weights_are_refused_by_name(tmp_path):
    manifest = bare_manifest(plan_of())
    weights = trained(ONE)
    with pytest.raises(TensorFileError, match="no weights for segment head"):
        assemble(manifest, {name: value for name, value in weights.items() if name != "head"}, tmp_path)
    with pytest.raises(TensorFileError, match=r"head has tensors \['bias', 'weight'\], given \['bias'\]"):
        assemble(manifest, weights | {"head": {"bias": np.zeros(3, np.float32)}}, tmp_path)
    with pytest.raises(TensorFileError, match=r"head/bias has shape \(3,\), given \(4,\)"):
        assemble(manifest, weights | {"head": weights["head"] | {"bias": np.zeros(4, np.float32)}}, tmp_path)


def test_a_file_that_predicts_something_else_is_refused(assembled, tmp_path, monkeypatch):
    from export import assemble as room

    def with_another_bias(network, example, description):
        network.segments[-1].bias.data += 1
        try:
            return original(network, example, description)
        finally:
            network.segments[-1].bias.data -= 1

    original = room._to_onnx
    monkeypatch.setattr(room, "_to_onnx", with_another_bias)
    # The same network was lowered for `assembled`, which takes seconds.
    monkeypatch.setattr(room, "_to_executorch", lambda *_: assembled[0].pte.read_bytes())
    with pytest.raises(ParityError, match="the onnx file of the assembled model differs from PyTorch by"):
        assemble(bare_manifest(plan_of(SHALLOW)), trained(SHALLOW), tmp_path)


def test_the_command_line_reports_the_error_of_an_int8_prefix(tmp_path, program_cache, monkeypatch):
    monkeypatch.setenv("LAMINA_CACHE", str(program_cache))
    model = describe(AUDIO.model_copy(update={"layers": 2}))
    (tmp_path / "plan.json").write_bytes(plan_of(model, prefix_precision="int8", micro_batch=2).to_json())
    np.savez(tmp_path / "s.npz", train_audio=np.ones((5, *AUDIO.input.shape), np.float32))
    arguments = ["export", str(tmp_path / "plan.json"), "--engine", "torch", "--jobs", "1", "--sample"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "s.npz"), "--out", str(tmp_path / "b")])
    assert done.exit_code == 0, done.output
    assert "batch 4 in micro-batches of 2" in done.output
    assert "int8 prefix on torch: features off by 0." in done.output
    assert f"and data {hash_file(tmp_path / 's.npz')[:12]}" in done.output

"""The conformance suite of engines: the same questions to each one, answered by eager torch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from edge_client.engines import load_engine
from edge_client.train.stage_model import StageModel
from lamina.bundles.manifest import ENGINES
from lamina.encoding.tensors import encode
from lamina.errors import DataError, EngineError, EngineMissingError, NonFiniteError
from tests.edge_client.tiny import (
    CHANNELS,
    CLASSES,
    MAX_BATCH,
    SAMPLES,
    initial_weights,
    make_segment,
    run_segments,
    segment_file,
)

STAGE_0 = ["motion.stem", "motion.layers.0", "motion.norm", "motion.projection", "head"]


@pytest.fixture(params=ENGINES)
def engine(request):
    return load_engine(request.param)


@pytest.fixture
def model(engine, programs, tmp_path):
    files = {role: programs.file(programs.program(engine.name, role, STAGE_0)) for role in ("train", "eval")}
    for name, tensors in initial_weights(seed=3).items():
        (tmp_path / name).write_bytes(encode(tensors))
    segments = [segment_file(name, tmp_path / name) for name in STAGE_0]
    model = StageModel("stage 0", segments, files, {"label": CLASSES}, 100, lambda file: engine.load(Path(file.path), file))
    model.parameters[:] = flat_weights(0)
    yield model
    model.close()


def gradients(model, batch):
    return model.gradients(lambda indices: batch, range(len(batch["motion"])))


def evaluate(model, batch):
    return model.evaluate(lambda indices: batch, range(len(batch["motion"])))


def flat_weights(seed):
    stored = initial_weights(seed)
    return np.concatenate([value.ravel() for name in STAGE_0 for value in stored[name].values()])


def make_batch(count, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, CHANNELS, SAMPLES)).astype(np.float32)
    return {"motion": x, "label": random.integers(0, CLASSES, count)}


def eager(parameters, batch):
    """loss, correct, flat gradient of the tiny model's stage 0 in eager torch."""
    flat = torch.from_numpy(parameters.copy()).requires_grad_()
    weights, start = [], 0
    for spec in (spec for name in STAGE_0 for spec in make_segment(name).tensors):
        weights.append(flat[start : start + spec.count].reshape(spec.shape))
        start += spec.count
    loss, correct = run_segments(STAGE_0, weights, torch.from_numpy(batch["motion"]), torch.from_numpy(batch["label"]))
    (gradient,) = torch.autograd.grad(loss, flat)
    return loss.item(), correct.item(), gradient.numpy()


@pytest.mark.parametrize("count", [1, 2, 5, MAX_BATCH])
def test_loss_and_gradients_are_those_of_eager_torch_for_every_batch_size(model, count):
    batch = make_batch(count)
    loss, correct = gradients(model, batch)

    expected_loss, expected_correct, expected_gradient = eager(model.parameters, batch)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert correct == expected_correct
    np.testing.assert_allclose(model.gradient, expected_gradient, atol=1e-5)


def test_evaluation_is_that_of_eager_torch_and_leaves_the_gradient_alone(model):
    batch = make_batch(MAX_BATCH - 1)
    loss, correct = evaluate(model, batch)

    expected_loss, expected_correct, _ = eager(model.parameters, batch)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert correct == expected_correct
    assert not model.gradient.any()


def test_ten_steps_of_training_and_evaluation_by_turns_follow_eager_torch(model):
    for step in range(10):
        batch = make_batch(MAX_BATCH, seed=step)
        expected_loss, _, expected_gradient = eager(model.parameters, batch)
        assert evaluate(model, batch)[0] == pytest.approx(expected_loss, abs=1e-5)
        assert gradients(model, batch)[0] == pytest.approx(expected_loss, abs=1e-5)
        np.testing.assert_allclose(model.gradient, expected_gradient, atol=1e-5)
        model.parameters -= np.float32(0.5) * model.gradient


def test_a_change_of_the_parameter_vector_is_seen_by_the_next_call(model):
    batch = make_batch(4)
    before, _ = evaluate(model, batch)
    model.parameters[:] = flat_weights(seed=1)
    after, _ = evaluate(model, batch)

    assert after == pytest.approx(eager(flat_weights(seed=1), batch)[0], abs=1e-5)
    assert abs(after - before) > 1e-3


def test_the_gradient_is_that_of_the_last_batch(model):
    first, second = make_batch(3, seed=1), make_batch(5, seed=2)
    gradients(model, first)
    gradients(model, second)
    np.testing.assert_allclose(model.gradient, eager(model.parameters, second)[2], atol=1e-5)


def test_a_step_changes_neither_the_parameters_nor_the_batch(model):
    batch = make_batch(4)
    before = {name: value.copy() for name, value in batch.items()}
    gradients(model, batch)
    np.testing.assert_array_equal(model.parameters, flat_weights(0))
    for name, value in before.items():
        np.testing.assert_array_equal(batch[name], value)


def test_two_programs_in_one_process_do_not_disturb_each_other(engine, programs):
    stem, layer = (programs.program(engine.name, "frozen", [name]) for name in ("motion.stem", "motion.layers.0"))
    loaded_stem, loaded_layer = (engine.load(programs.path(program), program) for program in (stem, layer))
    weights = initial_weights()
    x = make_batch(3)["motion"]

    features = loaded_stem.run([*weights["motion.stem"].values(), x])[0].copy()
    after = loaded_layer.run([*weights["motion.layers.0"].values(), features])[0].copy()
    again = loaded_stem.run([*weights["motion.stem"].values(), x])[0]

    chain = [torch.from_numpy(value) for name in STAGE_0[:2] for value in weights[name].values()]
    np.testing.assert_array_equal(features, again)
    np.testing.assert_allclose(after, run_segments(STAGE_0[:2], chain, torch.from_numpy(x))[0].numpy(), atol=1e-5)
    loaded_stem.close()
    loaded_layer.close()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"motion": np.zeros((4, CHANNELS, SAMPLES - 1), np.float32)}, EngineError, r"shape \(4, 2, 7\)"),
        ({"motion": np.zeros((4, CHANNELS, SAMPLES), np.float64)}, EngineError, "float64"),
        ({"motion": np.zeros((4, SAMPLES, CHANNELS), np.float32).transpose(0, 2, 1)}, EngineError, "not contiguous"),
        ({"label": np.zeros(3, np.int64)}, EngineError, r"shape \(3,\)"),
        ({"label": np.zeros(4, np.int32)}, EngineError, "int32"),
        ({"label": np.array([0, 1, CLASSES, 0])}, DataError, r"value 3 at index \[2\] is outside of 0..2"),
        ({"label": np.array([0, -1, 0, 0])}, DataError, r"value -1 at index \[1\]"),
        ({"label": np.array([0, 0, 0, -100])}, DataError, r"value -100 at index \[3\]"),
        ({"motion": np.full((4, CHANNELS, SAMPLES), np.nan, np.float32)}, DataError, r"nan at index \[0, 0, 0\]"),
        ({"motion": np.full((4, CHANNELS, SAMPLES), -np.inf, np.float32)}, DataError, "-inf"),
    ],
)
def test_a_batch_that_the_runtime_would_misread_is_refused_before_the_step(model, change, error, words):
    with pytest.raises(error, match=words):
        gradients(model, make_batch(4) | change)
    assert not model.gradient.any()


def test_a_batch_beyond_the_planned_size_is_refused(model):
    with pytest.raises(EngineError, match=f"a batch of {MAX_BATCH + 1} does not fit"):
        gradients(model, make_batch(MAX_BATCH + 1))


def test_a_missing_input_is_named(model):
    with pytest.raises(EngineError, match="needs the input 'label'"):
        gradients(model, {"motion": make_batch(2)["motion"]})


def test_a_loss_that_is_not_finite_never_reaches_the_gradient(model):
    model.parameters[:] = np.float32(1e30)
    with pytest.raises(NonFiniteError, match="learning rate"):
        gradients(model, make_batch(2))
    assert not model.gradient.any()


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 500])
def test_a_damaged_program_is_an_engine_error_at_load(engine, programs, tmp_path, damage):
    program = programs.program(engine.name, "train", STAGE_0)
    path = tmp_path / "damaged"
    path.write_bytes(damage(programs.path(program).read_bytes()))
    with pytest.raises(EngineError, match="cannot load program damaged"):
        engine.load(path, program)


def test_a_wrong_number_of_arrays_is_an_engine_error(engine, programs):
    program = programs.program(engine.name, "frozen", ["motion.stem"])
    loaded = engine.load(programs.path(program), program)
    with pytest.raises(EngineError):
        loaded.run([make_batch(2)["motion"]])
    loaded.close()


@pytest.mark.parametrize("name", ["executorch", "onnxruntime"])
def test_a_program_that_is_not_the_one_of_the_manifest_is_refused_at_load(programs, name):
    engine = load_engine(name)
    stem, layer = (programs.program(name, "frozen", [segment]) for segment in ("motion.stem", "motion.layers.0"))
    with pytest.raises(EngineError, match="but its manifest says"):
        engine.load(programs.path(stem), layer)


def test_weights_are_loaded_from_segment_files_and_subtracted_again(model):
    model.load_weights()
    np.testing.assert_array_equal(model.parameters, flat_weights(seed=3))

    model.parameters += np.float32(0.25)
    trained = model.parameters.copy()
    model.subtract_weights()
    np.testing.assert_array_equal(model.parameters, trained - flat_weights(seed=3))
    assert list(model.tensors())[:2] == ["motion.stem/weight", "motion.stem/bias"]


def test_a_missing_runtime_names_the_extra_that_installs_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "edge_client.engines.onnxruntime", None)
    with pytest.raises(EngineMissingError, match=r"pip install 'lamina\[onnxruntime\]'"):
        load_engine("onnxruntime")


def test_an_unknown_engine_is_refused_with_the_known_ones():
    with pytest.raises(EngineMissingError, match="executorch, onnxruntime, torch"):
        load_engine("tensorflow")

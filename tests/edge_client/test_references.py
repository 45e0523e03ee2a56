"""References: which tensors a device holds a second time, what is in them, and in which order programs get them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.train.references import PIECE, Copy
from lamina.errors import EngineError
from tests.edge_client.quadratic import COUNTS, NAMES, SHAPES, STARTS, Numbers, flat, segment_files, start, weights

READ = {"x": Numbers(np.linspace(-1, 2, 8))}


def read(indices):
    return {name: rows.take(indices) for name, rows in READ.items()}


def chosen(vector, tensors):
    return np.concatenate([vector[STARTS[place] : STARTS[place + 1]] for place in sorted(tensors)])


places = st.sets(st.integers(0, len(SHAPES) - 1), min_size=1)


@settings(max_examples=30)
@given(tensors=places, momentum=st.floats(0, 0.999), seed=st.integers(0, 2**31), steps=st.integers(1, 4))
def test_a_momentum_copy_follows_as_the_formula_says(tensors, momentum, seed, steps):
    random = np.random.default_rng(seed)
    parameters = random.normal(size=STARTS[-1]).astype(np.float32)
    copy = Copy(parameters, SHAPES, tensors)
    copy.take()
    expected = chosen(parameters, tensors).astype(np.float64)
    for _ in range(steps):
        parameters += random.normal(size=parameters.size).astype(np.float32)
        copy.follow(momentum)
        expected = momentum * expected + (1 - momentum) * chosen(parameters, tensors)
    np.testing.assert_allclose(copy.values, expected, atol=1e-5)


@given(tensors=places)
def test_a_copy_holds_the_tensors_that_were_asked_for_and_no_others(tensors):
    parameters = np.arange(STARTS[-1], dtype=np.float32)
    copy = Copy(parameters, SHAPES, tensors)
    copy.take()
    assert copy.values.size == sum(COUNTS[place] for place in tensors)
    order = sorted(tensors, reverse=True)
    for place, view in zip(order, copy.arrays(order), strict=True):
        assert view.shape == SHAPES[place]
        assert np.shares_memory(view, copy.values)
        np.testing.assert_array_equal(view.reshape(-1), chosen(parameters, [place]))
    np.testing.assert_array_equal(np.concatenate(copy.originals()), copy.values)
    assert all(np.shares_memory(original, parameters) for original in copy.originals())


def test_the_vector_of_the_tests_is_longer_than_a_piece():
    assert COUNTS[2] > PIECE


def test_a_program_gets_weights_then_the_tensors_of_each_reference_then_the_batch(tmp_path):
    model, engine = start(tmp_path, [("start", [2, 0]), ("momentum", [1])])
    model.parameters += 1
    model.follow(0.5)
    model.gradients(read, range(8))
    (arrays,) = engine.given
    now, before = flat(weights()) + 1, flat(weights())
    assert [array.shape for array in arrays] == [*SHAPES, SHAPES[2], SHAPES[0], SHAPES[1], (8, 1)]
    np.testing.assert_array_equal(arrays[3], chosen(before, [2]))
    np.testing.assert_array_equal(arrays[4], chosen(before, [0]))
    np.testing.assert_allclose(arrays[5].reshape(-1), 0.5 * chosen(now, [1]) + 0.5 * chosen(before, [1]), rtol=1e-6)


def test_the_arrays_of_a_reference_stay_the_same_objects(tmp_path):
    """ExecuTorch is told of an array once."""
    model, engine = start(tmp_path, [("momentum", [0, 1])])
    seen = []
    run = engine.run
    engine.run = lambda arrays: seen.append([id(array) for array in arrays[:-1]]) or run(arrays)
    for _ in range(3):
        model.gradients(read, range(8))
        model.parameters += 1
        model.follow(0.9)
    assert seen[0] == seen[1] == seen[2]


def test_without_references_nothing_is_held_twice(tmp_path):
    model, _ = start(tmp_path)
    assert model._copies == {}
    model.follow(0.9)


def test_the_start_of_the_proximal_term_serves_a_start_reference_too(tmp_path):
    model, _ = start(tmp_path, [("start", [1])], keep_start=True)
    assert list(model._copies) == ["start"]
    assert model._copies["start"].values.size == STARTS[-1]


def test_a_teacher_comes_from_its_own_files_and_only_as_far_as_it_is_asked_for(tmp_path):
    teacher = weights(seed=1)
    files = segment_files(tmp_path / "teacher", {"part.0": teacher["part.0"]})
    model, engine = start(tmp_path, [("teacher", [1])], teacher=files)
    model.gradients(read, range(8))
    np.testing.assert_array_equal(engine.given[0][3], teacher["part.0"]["v"])
    assert model._copies["teacher"].values.size == 4


def test_a_teacher_that_lacks_a_tensor_is_refused(tmp_path):
    files = segment_files(tmp_path / "teacher", {"part.0": weights()["part.0"]})
    with pytest.raises(EngineError, match=f"asks for {NAMES[2]} of the stage before"):
        start(tmp_path, [("teacher", [0, 2])], teacher=files)


@settings(max_examples=20)
@given(weight=st.floats(1e-3, 10), seed=st.integers(0, 2**31))
def test_the_proximal_term_adds_its_weight_times_the_way_from_the_start(tmp_path_factory, weight, seed):
    model, _ = start(tmp_path_factory.mktemp("model"), keep_start=True)
    random = np.random.default_rng(seed)
    away = random.normal(size=model.parameters.size).astype(np.float32)
    model.parameters += away
    model.gradients(read, range(8))
    before = model.gradient.copy()
    model.add_proximal(weight)
    np.testing.assert_allclose(model.gradient, before + weight * (model.parameters - flat(weights())), rtol=1e-5, atol=1e-6)

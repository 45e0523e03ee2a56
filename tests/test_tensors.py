"""Tensor files: error bounds of each encoding, rounding that is right on average, and hostile files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import save

from lamina.encoding.tensors import ENCODINGS, SCALE, decode_file, decode_one_by_one, encode, file_encoding, max_file_bytes
from lamina.errors import ConfigError, TensorFileError
from lamina.plans.segments import TensorSpec

SPECS = [
    TensorSpec(name="a/w", shape=(4, 3)),
    TensorSpec(name="a/cube", shape=(2, 3, 5)),
    TensorSpec(name="a/b", shape=(3,)),
    TensorSpec(name="a/column", shape=(7, 1)),
    TensorSpec(name="a/s", shape=()),
    TensorSpec(name="a/none", shape=(0, 3)),
]
QUANTIZED = {"a/w", "a/cube", "a/none"}
TINY = np.finfo(np.float32).smallest_normal


def draw(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {spec.name: np.asarray(random.standard_normal(spec.shape) * scale, np.float32) for spec in SPECS}


def through(folder: Path, data: bytes, specs=SPECS) -> dict[str, np.ndarray]:
    path = folder / "tensors"
    path.write_bytes(data)
    return decode_file(str(path), specs)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_file_says_its_encoding_and_gives_the_tensors_in_the_expected_order(tmp_path: Path, encoding) -> None:
    values = draw(0)
    data = encode(values, encoding)
    assert data == encode(dict(reversed(values.items())), encoding)
    assert len(data) <= max_file_bytes(SPECS)
    found = through(tmp_path, data)
    assert file_encoding(str(tmp_path / "tensors")) == encoding
    assert list(found) == [spec.name for spec in SPECS]
    for spec in SPECS:
        assert found[spec.name].dtype == np.float32 and found[spec.name].shape == spec.shape


def test_int8_keeps_vectors_scalars_and_single_columns_exact(tmp_path: Path) -> None:
    values = draw(1)
    found = through(tmp_path, encode(values, "int8"))
    for name in set(values) - QUANTIZED:
        np.testing.assert_array_equal(found[name], values[name])
    with safe_open(tmp_path / "tensors", framework="numpy") as file:
        assert set(file.keys()) == set(values) | {name + SCALE for name in QUANTIZED}
        assert file.get_tensor("a/cube").dtype == np.int8
        assert file.get_tensor("a/cube" + SCALE).shape == (2, 3)


matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=8),
    elements=st.floats(-(2.0**99), 2.0**99, width=32),
)


@settings(max_examples=150, deadline=None)
@given(value=matrices, seed=st.none() | st.integers(0, 2**32 - 1))
def test_int8_is_off_by_half_a_step_or_by_less_than_one_at_random(tmp_path_factory, value: np.ndarray, seed) -> None:
    random = None if seed is None else np.random.default_rng(seed)
    specs = [TensorSpec(name="w", shape=value.shape)]
    found = through(tmp_path_factory.getbasetemp(), encode({"w": value}, "int8", random), specs)["w"]
    if value.shape[-1] == 1:
        np.testing.assert_array_equal(found, value)
        return
    step = np.abs(value).max(axis=-1, keepdims=True).astype(np.float64) / 127
    error = np.abs(found.astype(np.float64) - value)
    # The last 1e-4 is float32's own rounding; below the normal numbers a scale has few bits left.
    assert (error <= step * ((0.5 if seed is None else 1.0) + 1e-4) + 300 * TINY).all()
    if (step > 1e-30).all():
        np.testing.assert_allclose(np.abs(found).max(axis=-1), np.abs(value).max(axis=-1), rtol=0.02)


@settings(max_examples=60, deadline=None)
@given(value=matrices)
def test_encoding_what_was_decoded_moves_nothing_by_more_than_rounding(tmp_path_factory, value: np.ndarray) -> None:
    specs, folder = [TensorSpec(name="w", shape=value.shape)], tmp_path_factory.getbasetemp()
    once = through(folder, encode({"w": value}, "int8"), specs)["w"]
    twice = through(folder, encode({"w": once}, "int8"), specs)["w"]
    np.testing.assert_allclose(twice, once, rtol=1e-6, atol=1000 * TINY)


def test_random_rounding_is_right_on_average_where_the_nearest_is_not(tmp_path: Path) -> None:
    """4,000 draws of a row whose small values all lie 0.3 steps above a step: the mean of the nearest is off by 0.3 steps."""
    draws, step = 4000, 1 / 127
    value = np.tile(np.concatenate([[1.0], (np.arange(-50, 50) + 0.3) * step]).astype(np.float32), (draws, 1))
    specs = [TensorSpec(name="w", shape=value.shape)]
    random = np.random.default_rng(5)
    at_random = through(tmp_path, encode({"w": value}, "int8", random), specs)["w"].astype(np.float64)
    nearest = through(tmp_path, encode({"w": value}, "int8"), specs)["w"].astype(np.float64)

    deviation = np.sqrt(0.3 * 0.7 / draws) * step
    bias = (at_random - value).mean(axis=0)[1:]
    assert np.abs(bias).max() < 5 * deviation
    assert abs(bias.mean()) < 5 * deviation / np.sqrt(100)
    np.testing.assert_allclose((nearest - value).mean(axis=0)[1:], -0.3 * step, rtol=1e-3)


def test_the_same_generator_gives_the_same_bytes() -> None:
    values = draw(3)
    first, again, other = (encode(values, "int8", np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other
    for encoding in ("fp32", "fp16"):
        assert encode(values, encoding, np.random.default_rng(1)) == encode(values, encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_sent(encoding, value: float) -> None:
    with pytest.raises(TensorFileError, match="'a/w' holds NaN or infinity"):
        encode({"a/w": np.full((4, 3), value, np.float32)}, encoding)


def test_an_unknown_encoding_and_a_name_of_scales_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown encoding 'int4'"):
        encode({}, "int4")  # type: ignore[arg-type]
    clash = {"w": np.ones((2, 2), np.float32), "w#scale": np.ones(2, np.float32)}
    with pytest.raises(TensorFileError, match="'w#scale'"):
        encode(clash, "int8")
    specs = [TensorSpec(name="w", shape=(2, 2)), TensorSpec(name="w#scale", shape=(2,))]
    assert set(through(tmp_path, encode(clash, "fp32"), specs)) == set(clash)
    data = save({"w": np.ones((2, 2), np.int8), "w#scale": np.ones(2, np.float32)}, {"encoding": "int8"})
    with pytest.raises(TensorFileError, match="'w#scale'"):
        through(tmp_path, data, specs)


WELL = {"w": np.ones((4, 3), np.int8), "w" + SCALE: np.ones(4, np.float32), "b": np.ones(3, np.float32)}
WELL_SPECS = [TensorSpec(name="w", shape=(4, 3)), TensorSpec(name="b", shape=(3,))]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"w": np.ones((3, 4), np.int8)}, r"'w' has shape \(3, 4\), expected \(4, 3\)"),
        ({"w": np.ones((4, 3), np.uint8)}, "'w' has dtype U8"),
        ({"w": np.ones((4, 3), np.float32)}, "'w' has dtype F32, but the file declares int8"),
        ({"w": np.full((4, 3), -128, np.int8)}, "'w' holds -128"),
        ({"b": np.ones(3, np.int8)}, "'b' has dtype I8"),
        ({"b": np.full(3, np.nan, np.float32)}, "'b' holds NaN"),
        ({"w#scale": None}, "1 tensors are missing, the first is 'w#scale'"),
        ({"b#scale": np.ones((), np.float32)}, "1 tensors were not expected, the first is 'b#scale'"),
        ({"w#scale": np.ones(3, np.float32)}, r"'w#scale' has shape \(3,\), expected \(4,\)"),
        ({"w#scale": np.ones((4, 1), np.float32)}, "'w#scale' has shape"),
        ({"w#scale": np.ones(4, np.float16)}, "'w#scale' has dtype F16"),
        ({"w#scale": np.array([1, 1, -1, 1], np.float32)}, "'w' has a scale that is negative"),
        ({"w#scale": np.array([1, np.nan, 1, 1], np.float32)}, "'w' has a scale that is negative, NaN or infinite"),
        ({"w#scale": np.array([1, np.inf, 1, 1], np.float32)}, "'w' has a scale that is negative, NaN or infinite"),
        ({"w": np.full((4, 3), 127, np.int8), "w#scale": np.full(4, 3e38, np.float32)}, "'w' holds NaN or infinity"),
    ],
)
def test_a_hostile_int8_file_is_refused_by_name(tmp_path: Path, changes, what: str) -> None:
    through(tmp_path, save(WELL, {"encoding": "int8"}), WELL_SPECS)
    tensors = {name: value for name, value in {**WELL, **changes}.items() if value is not None}
    with pytest.raises(TensorFileError, match=what):
        through(tmp_path, save(tensors, {"encoding": "int8"}), WELL_SPECS)


def test_an_int8_file_that_claims_to_be_fp32_is_refused_and_the_other_way(tmp_path: Path) -> None:
    with pytest.raises(TensorFileError, match="not expected, the first is 'w#scale'"):
        through(tmp_path, save(WELL, {"encoding": "fp32"}), WELL_SPECS)
    values = {"w": np.ones((4, 3), np.float32), "b": np.ones(3, np.float32)}
    with pytest.raises(TensorFileError, match="missing, the first is 'w#scale'"):
        through(tmp_path, save(values, {"encoding": "int8"}), WELL_SPECS)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_broken_bytes_never_pass_as_something_else(tmp_path_factory, data: st.DataObject) -> None:
    """Any one byte changed, or the file cut: the reader gives tensors of the right shapes, all finite, or TensorFileError."""
    whole = encode({"w": np.full((4, 3), 0.5, np.float32), "b": np.ones(3, np.float32)}, "int8")
    at = data.draw(st.integers(0, len(whole) - 1))
    broken = whole[:at] if data.draw(st.booleans()) else whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    try:
        found = through(tmp_path_factory.getbasetemp(), broken, WELL_SPECS)
    except TensorFileError:
        return
    assert [found[spec.name].shape for spec in WELL_SPECS] == [(4, 3), (3,)]
    assert all(np.isfinite(value).all() for value in found.values())


def test_an_int8_file_is_read_one_tensor_at_a_time(tmp_path: Path) -> None:
    import tracemalloc

    specs = [TensorSpec(name=f"{index}", shape=(250, 1000)) for index in range(8)]
    path = tmp_path / "tensors"
    path.write_bytes(encode({spec.name: np.ones(spec.shape, np.float32) for spec in specs}, "int8"))
    tracemalloc.start()
    for _ in decode_one_by_one(str(path), specs):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 4 * 250_000  # of 32 MB as float32


def test_tensor_files_need_neither_pydantic_nor_http() -> None:
    heavy = ("pydantic", "httpx", "zstandard", "typer", "rich")
    modules = "sys, lamina.encoding.tensors, lamina.encoding.compression"
    code = f"import {modules}\nprint(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []

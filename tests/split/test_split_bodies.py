"""Bodies of single steps: what arrives is what was sent, and nothing else is taken."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from lamina.errors import TensorFileError, TooLargeError
from lamina.plans.segments import TensorSpec
from lamina.split.bodies import body_limit, pack, unpack

SPECS = [TensorSpec(name="a", shape=(2, 3, 4)), TensorSpec(name="b", shape=(6,))]


def _values(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {spec.name: (scale * random.normal(size=spec.shape)).astype(np.float32) for spec in SPECS}


@given(st.integers(0, 1000), st.sampled_from([1e-30, 1e-9, 1.0, 1e6]))
@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize(("encoding", "error"), [("fp32", 0.0), ("fp16", 2**-10), ("int8", 1 / 200)])
def test_gradients_of_any_size_arrive(encoding: str, error: float, compression: str, seed: int, scale: float) -> None:
    sent = _values(seed, scale)
    body = pack(sent, encoding, compression, are_gradients=True)
    assert len(body) <= body_limit(SPECS)
    for name, value in unpack(body, SPECS, encoding, compression, are_gradients=True).items():
        assert np.abs(value - sent[name]).max() <= error * np.abs(sent[name]).max()


def test_zeros_arrive_as_zeros() -> None:
    zeros = {spec.name: np.zeros(spec.shape, np.float32) for spec in SPECS}
    for encoding in ("fp32", "fp16", "int8"):
        body = pack(zeros, encoding, are_gradients=True)
        assert not any(value.any() for value in unpack(body, SPECS, encoding, are_gradients=True).values())


def test_what_is_not_finite_is_not_sent() -> None:
    for bad in (np.nan, np.inf):
        for encoding in ("fp32", "fp16", "int8"):
            with pytest.raises(TensorFileError, match="NaN or infinity"):
                pack(_values(0) | {"b": np.full(6, bad, np.float32)}, encoding, are_gradients=True)


def test_a_body_with_anything_else_is_refused() -> None:
    good = _values(0)
    cases = {
        "was not expected": good | {"c": np.zeros(1, np.float32)},
        "are missing": {"a": good["a"]},
        "expected F32 of": good | {"b": np.zeros(7, np.float32)},
        "F64": good | {"b": np.zeros(6)},
        "holds NaN": good | {"b": np.full(6, np.nan, np.float32)},
    }
    for reason, tensors in cases.items():
        with pytest.raises(TensorFileError, match=reason):
            unpack(save(tensors), SPECS, "fp32")


def test_an_int8_body_with_values_that_no_encoder_writes_is_refused() -> None:
    steps = np.full((2, 3, 4), -128, np.int8)
    scales = np.ones((2, 3), np.float32)
    b = np.zeros(6, np.float32)
    with pytest.raises(TensorFileError, match="int8 steps lie within"):
        unpack(save({"a": steps, "a#scale": scales, "b": b}), SPECS, "int8")
    with pytest.raises(TensorFileError, match="scale that is negative"):
        unpack(save({"a": steps + 1, "a#scale": -scales, "b": b}), SPECS, "int8")
    with pytest.raises(TensorFileError, match="NaN or infinity"):
        unpack(save({"a": steps + 1, "a#scale": scales * np.float32(3e38), "b": b}), SPECS, "int8")


def test_an_exponent_that_is_no_exponent_is_refused() -> None:
    half = {name: value.astype(np.float16) for name, value in _values(0).items()}
    for exponent in (0.5, 1000.0):
        tensors = half | {"a#exponent": np.array([exponent], np.float16), "b#exponent": np.zeros(1, np.float16)}
        with pytest.raises(TensorFileError, match="exponent"):
            unpack(save(tensors), SPECS, "fp16", are_gradients=True)
    tensors = half | {"a#exponent": np.array([-120], np.float16), "b#exponent": np.zeros(1, np.float16)}
    tensors["a"] = np.full((2, 3, 4), 60000, np.float16)
    with pytest.raises(TensorFileError, match="infinite"):
        unpack(save(tensors), SPECS, "fp16", are_gradients=True)


@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(TensorFileError):
        unpack(data, SPECS, "fp32")
    with pytest.raises((TensorFileError, TooLargeError)):
        unpack(data, SPECS, "fp32", "zstd")


def test_a_header_that_promises_more_than_there_is_is_refused() -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 3, 4], "data_offsets": [0, 96]}}).encode()
    with pytest.raises(TensorFileError, match="no valid tensor file"):
        unpack(struct.pack("<Q", len(header)) + header + b"\0" * 8, SPECS, "fp32")


def test_a_body_that_grows_when_it_is_decompressed_is_refused() -> None:
    zstandard = pytest.importorskip("zstandard")
    with pytest.raises(TooLargeError):
        unpack(zstandard.ZstdCompressor().compress(b"\0" * 10_000_000), SPECS, "fp32", "zstd")

"""The bodies of split training: tensor files in memory, because they live for one batch and a flash disk would wear out.

The layout is that of `lamina.encoding.tensors`; what arrives is checked as strictly. The encoding is that of the plan, so a
reader needs no metadata to know it. Gradients are small numbers: in fp16 each tensor travels multiplied by a power of two that
brings its largest value near 1024, and the power travels beside it (`#exponent`); so nothing above 2**-34 of the largest value
vanishes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from lamina.encoding.compression import Compression, compress, decompress
from lamina.encoding.quantize import STEPS, dequantize_rows
from lamina.encoding.tensors import SCALE, Encoding, Float32, encode, max_file_bytes, stored_tensors
from lamina.errors import TensorFileError
from lamina.plans.segments import TensorSpec

_EXPONENT = "#exponent"
_TARGET = 10
_MOST = 120
_DTYPES: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "I8": np.int8}


def pack(
    tensors: Mapping[str, Float32], encoding: Encoding, compression: Compression = "none", *, are_gradients: bool = False
) -> bytes:
    """Raises TensorFileError for a value that is not finite or does not fit the encoding."""
    sent = dict(tensors)
    if are_gradients and encoding == "fp16":
        for name, value in tensors.items():
            largest = float(np.abs(value).max(initial=0.0))
            exponent = 0 if largest == 0 or not np.isfinite(largest) else _TARGET - int(np.frexp(largest)[1])
            exponent = max(-_MOST, min(_MOST, exponent))
            sent[name] = np.ldexp(value, exponent).astype(np.float32)
            sent[name + _EXPONENT] = np.array([exponent], np.float32)
    return compress(encode(sent, encoding), compression)


def unpack(
    data: bytes,
    specs: Sequence[TensorSpec],
    encoding: Encoding,
    compression: Compression = "none",
    *,
    are_gradients: bool = False,
) -> dict[str, Float32]:
    """The tensors of a body, float32. Raises TensorFileError that names what is wrong, TooLargeError above `body_limit`."""
    wanted = list(specs)
    if are_gradients and encoding == "fp16":
        wanted += [TensorSpec(name=spec.name + _EXPONENT, shape=(1,)) for spec in specs]
    content = decompress(data, compression, max_file_bytes(wanted))
    found = _stored(content, {name: layout for spec in wanted for name, layout in stored_tensors(spec, encoding).items()})
    values: dict[str, Float32] = {}
    for spec in wanted:
        value = found[spec.name]
        if spec.name + SCALE in found:
            value = _dequantized(spec.name, value, found[spec.name + SCALE])
        values[spec.name] = value.astype(np.float32)
        if not np.isfinite(values[spec.name]).all():
            raise TensorFileError(f"tensor {spec.name!r} holds NaN or infinity")
    if len(wanted) == len(specs):
        return values
    return {spec.name: _unscaled(spec.name, values[spec.name], values[spec.name + _EXPONENT]) for spec in specs}


def body_limit(specs: Sequence[TensorSpec]) -> int:
    """The largest body that is legal for these tensors, in any encoding and compression."""
    return max_file_bytes(specs) + 1024 * len(specs)


def _stored(data: bytes, layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, NDArray[Any]]:
    try:
        entries = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise TensorFileError(f"this is no valid tensor file: {error}") from error
    found: dict[str, NDArray[Any]] = {}
    for name, entry in entries:
        if name not in layout:
            raise TensorFileError(f"tensor {name[:80]!r} was not expected")
        given, expected = (entry["dtype"], tuple(entry["shape"])), layout[name]
        if given != expected:
            raise TensorFileError(f"tensor {name!r} is {given[0]} of shape {given[1]}, expected {expected[0]} of {expected[1]}")
        found[name] = np.frombuffer(entry["data"], _DTYPES[expected[0]]).reshape(expected[1])
    missing = sorted(set(layout) - set(found))
    if missing:
        raise TensorFileError(f"{len(missing)} tensors are missing, the first is {missing[0]!r}")
    return found


def _dequantized(name: str, steps: NDArray[Any], scales: NDArray[Any]) -> Float32:
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise TensorFileError(f"tensor {name!r} has a scale that is negative, NaN or infinite")
    if steps.size and int(steps.min()) < -STEPS:
        raise TensorFileError(f"tensor {name!r} holds {int(steps.min())}; int8 steps lie within +-{STEPS}")
    with np.errstate(over="ignore"):
        return dequantize_rows(steps, scales)


def _unscaled(name: str, value: Float32, exponent: Float32) -> Float32:
    power = float(exponent[0])
    if power != round(power) or abs(power) > _MOST:
        raise TensorFileError(f"tensor {name!r} has the exponent {power:g}; it is a whole number within +-{_MOST}")
    with np.errstate(over="ignore"):
        restored: Float32 = np.ldexp(value, -int(power)).astype(np.float32)
    if not np.isfinite(restored).all():
        raise TensorFileError(f"tensor {name!r} becomes infinite with its exponent {power:g}")
    return restored

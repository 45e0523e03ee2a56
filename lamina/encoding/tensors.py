"""Tensor files: a safetensors body with a declared encoding.

    encode({"a": float32 array}, "fp16") -> bytes          decode(bytes, expected specs) -> {"a": float32 array}

`fp32` stores the values as they are. `fp16` stores each as the nearest IEEE half (relative error at most 2**-11 for normal
halves) and refuses values beyond +-65504 instead of turning them into infinity. `int8` stores a tensor of two or more axes
as int8 with one float32 scale for each row (`lamina.encoding.quantize`; a row is the last axis), so the scales of a tensor `a`
of shape (..., n) are a second tensor `a#scale` of shape (...). Vectors, scalars and rows of a single value stay float32: there
a scale would cost more than it saves, and biases and norms are where rounding hurts most.

The encoding stands in the file's own metadata, so that a reader never has to be told. Nothing in a file is executed or
unpickled. This module needs numpy and safetensors alone, so that a training process can do without the messages' library.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from lamina.encoding.quantize import STEPS, dequantize_rows, quantize_rows
from lamina.errors import ConfigError, TensorFileError
from lamina.names import TensorShape

Encoding = Literal["fp32", "fp16", "int8"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
"""From the largest files to the smallest."""
Float32 = NDArray[np.float32]

SCALE = "#scale"
"""Ends the name of a tensor's scales; no tensor of a model may end so (`#` is in no name of an attribute)."""
_MAX_FP16 = 65504.0
_HEADER_BYTES_PER_TENSOR = 512  # name, dtype, shape and offsets as JSON, twice with scales; above what a segment needs


def encode(tensors: Mapping[str, Float32], encoding: Encoding = "fp32", random: "np.random.Generator | None" = None) -> bytes:
    """Bytes of a tensor file; the same tensors and encoding give the same bytes, whatever the order of the mapping.

    With `random`, `int8` rounds up or down so that the expectation of a stored value is the value itself: a mean over many
    updates is then not drawn to one side. Without it, and in the other encodings, values are rounded to the nearest.
    Raises TensorFileError if a value is NaN, infinite, or does not fit the encoding.
    """
    if encoding not in ENCODINGS:
        raise ConfigError(f"unknown encoding {encoding!r}; known: {', '.join(ENCODINGS)}")
    stored: dict[str, NDArray[Any]] = {}
    for name in sorted(tensors):
        value = np.asarray(tensors[name], dtype=np.float32, order="C")  # ascontiguousarray would make scalars (1,)
        if not np.isfinite(value).all():
            raise TensorFileError(f"tensor {name!r} holds NaN or infinity and cannot be sent")
        if encoding == "fp16":
            largest = float(np.abs(value).max(initial=0.0))
            if largest > _MAX_FP16:
                raise TensorFileError(f"tensor {name!r} holds {largest:g}, above fp16's 65504; use fp32")
            stored[name] = value.astype(np.float16)
        elif encoding == "int8":
            _check_no_scale(name)
            if _has_scales(value.shape):
                stored[name], stored[name + SCALE] = quantize_rows(value, random)
            else:
                stored[name] = value
        else:
            stored[name] = value
    return save(stored, metadata={"encoding": encoding})


def decode_one_by_one(path: str, expected: Iterable[TensorShape]) -> Iterator[tuple[str, Float32]]:
    """(name, float32 array) for each expected tensor of a file, in the expected order, one resident at a time.

    The whole layout is checked before the first tensor is given. Raises TensorFileError that names the tensor for a
    damaged file, an unknown encoding, a missing, additional, misshapen or mistyped tensor, or a value that is not finite.
    """
    specs = list(expected)
    try:
        with safe_open(path, framework="numpy") as file:
            encoding = _encoding_of(file)
            layout = {spec.name: stored_tensors(spec, encoding) for spec in specs}
            _check_names(set(file.keys()), {name for parts in layout.values() for name in parts})
            for parts in layout.values():
                for name, (expected_dtype, expected_shape) in parts.items():
                    part = file.get_slice(name)
                    shape, dtype = tuple(part.get_shape()), part.get_dtype()
                    if shape != expected_shape:
                        raise TensorFileError(f"tensor {name!r} has shape {shape}, expected {expected_shape}")
                    if dtype != expected_dtype:
                        raise TensorFileError(
                            f"tensor {name!r} has dtype {dtype}, but the file declares {encoding}, which has {expected_dtype}"
                        )
            for spec in specs:
                if spec.name + SCALE in layout[spec.name]:
                    value = _dequantize(spec.name, file.get_tensor(spec.name), file.get_tensor(spec.name + SCALE))
                else:
                    value = np.asarray(file.get_tensor(spec.name)).astype(np.float32)
                if not np.isfinite(value).all():
                    raise TensorFileError(f"tensor {spec.name!r} holds NaN or infinity")
                yield spec.name, value
    except SafetensorError as error:
        raise TensorFileError(f"this is no valid tensor file: {error}") from error


def decode_file(path: str, expected: Iterable[TensorShape]) -> dict[str, Float32]:
    """All tensors of a file; see `decode_one_by_one`."""
    return dict(decode_one_by_one(path, expected))


def decode_any(path: str) -> dict[str, Float32]:
    """All tensors of an fp32 file of one's own, whatever it holds. Raises TensorFileError for what is no tensor file."""
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise TensorFileError(f"this is no valid tensor file: {error}") from error


def join_files(files: Iterable[bytes]) -> bytes:
    """The tensors of several fp32 files as one file. Raises TensorFileError for what is no tensor file."""
    try:
        return encode({name: value for data in files for name, value in load(data).items()})
    except SafetensorError as error:
        raise TensorFileError(f"this is no valid tensor file: {error}") from error


def file_encoding(path: str) -> Encoding:
    """The encoding that a file declares; its tensors are not looked at. Raises TensorFileError."""
    try:
        with safe_open(path, framework="numpy") as file:
            return _encoding_of(file)
    except SafetensorError as error:
        raise TensorFileError(f"this is no valid tensor file: {error}") from error


def max_file_bytes(expected: Iterable[TensorShape]) -> int:
    """The largest body that a legal file of these tensors can have, in any encoding: that of fp32."""
    return sum(4 * spec.count + _HEADER_BYTES_PER_TENSOR for spec in expected) + 4096


def hash_bytes(data: bytes) -> str:
    """sha256 as 64 hex digits: the address of a blob."""
    from hashlib import sha256  # here, because it loads OpenSSL: 4 MiB that a training process does without

    return sha256(data).hexdigest()


def _has_scales(shape: tuple[int, ...]) -> bool:
    """Whether `int8` stores a tensor of this shape as int8: with two values in a row it is smaller than float32."""
    return len(shape) >= 2 and shape[-1] >= 2


def stored_tensors(spec: TensorShape, encoding: Encoding) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a file holds for a tensor: stored name -> (dtype, shape)."""
    if encoding == "int8":
        _check_no_scale(spec.name)
        if _has_scales(spec.shape):
            return {spec.name: ("I8", spec.shape), spec.name + SCALE: ("F32", spec.shape[:-1])}
    return {spec.name: ("F16" if encoding == "fp16" else "F32", spec.shape)}


def _dequantize(name: str, steps: NDArray[np.int8], scales: Float32) -> Float32:
    """The values, or TensorFileError for what no encoder writes. Products that overflow are left to the caller's check."""
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise TensorFileError(f"tensor {name!r} has a scale that is negative, NaN or infinite")
    if steps.size and int(steps.min()) < -STEPS:
        raise TensorFileError(f"tensor {name!r} holds {int(steps.min())}; int8 steps lie within +-{STEPS}")
    with np.errstate(over="ignore"):
        return dequantize_rows(steps, scales)


def _encoding_of(file: Any) -> Encoding:
    found = (file.metadata() or {}).get("encoding", "fp32")
    for encoding in ENCODINGS:
        if found == encoding:
            return encoding
    raise TensorFileError(f"encoding {found!r} is not known; known: {', '.join(ENCODINGS)}")


def _check_no_scale(name: str) -> None:
    if name.endswith(SCALE):
        raise TensorFileError(f"tensor {name!r}: in int8, names that end in {SCALE!r} are those of scales; rename it")


def _check_names(found: set[str], wanted: set[str]) -> None:
    missing, additional = sorted(wanted - found), sorted(found - wanted)
    if missing:
        raise TensorFileError(f"{len(missing)} tensors are missing, the first is {missing[0]!r}")
    if additional:
        raise TensorFileError(f"{len(additional)} tensors were not expected, the first is {additional[0]!r}")

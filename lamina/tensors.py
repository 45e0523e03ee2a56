"""Tensor files: a safetensors body with a declared encoding.

    encode({"a": float32 array}, "fp16") -> bytes          decode(bytes, expected specs) -> {"a": float32 array}

`fp32` stores the values as they are. `fp16` stores each as the nearest IEEE half (relative error at most 2**-11 for normal
halves) and refuses values beyond +-65504 instead of turning them into infinity. The encoding stands in the file's own
metadata, so that a reader never has to be told. Nothing in a file is executed or unpickled.
"""

from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lamina.errors import ConfigError, TensorFileError
from lamina.segments import TensorSpec

Encoding = Literal["fp32", "fp16"]
ENCODINGS: tuple[Encoding, ...] = ("fp32", "fp16")
Float32 = NDArray[np.float32]

_STORED: dict[str, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
_HEADER_BYTES_PER_TENSOR = 512  # name, dtype, shape and offsets as JSON; far above what any segment needs


def encode(tensors: Mapping[str, Float32], encoding: Encoding = "fp32") -> bytes:
    """Bytes of a tensor file; the same tensors and encoding give the same bytes, whatever the order of the mapping.

    Raises TensorFileError if a value is NaN, infinite, or does not fit the encoding.
    """
    if encoding not in _STORED:
        raise ConfigError(f"unknown encoding {encoding!r}; known: {', '.join(ENCODINGS)}")
    stored = {}
    for name in sorted(tensors):
        value = np.asarray(tensors[name], dtype=np.float32, order="C")  # ascontiguousarray would make scalars (1,)
        if not np.isfinite(value).all():
            raise TensorFileError(f"tensor {name!r} holds NaN or infinity and cannot be sent")
        if encoding == "fp16" and value.size and float(np.abs(value).max()) > 65504:
            raise TensorFileError(f"tensor {name!r} holds {float(np.abs(value).max()):g}, above fp16's 65504; use fp32")
        stored[name] = value.astype(_STORED[encoding])
    return save(stored, metadata={"encoding": encoding})


def decode_one_by_one(path: str, expected: Iterable[TensorSpec]) -> Iterator[tuple[str, Float32]]:
    """(name, float32 array) for each expected tensor of a file, in the expected order, one resident at a time.

    The whole layout is checked before the first tensor is given. Raises TensorFileError that names the tensor for a
    damaged file, an unknown encoding, a missing, additional, misshapen or mistyped tensor, or a value that is not finite.
    """
    specs = list(expected)
    try:
        with safe_open(path, framework="numpy") as file:
            encoding = (file.metadata() or {}).get("encoding", "fp32")
            if encoding not in _STORED:
                raise TensorFileError(f"encoding {encoding!r} is not known; known: {', '.join(ENCODINGS)}")
            _check_names(set(file.keys()), {spec.name for spec in specs})
            for spec in specs:
                part = file.get_slice(spec.name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                if shape != spec.shape:
                    raise TensorFileError(f"tensor {spec.name!r} has shape {shape}, expected {spec.shape}")
                if dtype != {"fp32": "F32", "fp16": "F16"}[encoding]:
                    raise TensorFileError(f"tensor {spec.name!r} has dtype {dtype}, but the file declares {encoding}")
            for spec in specs:
                value = np.asarray(file.get_tensor(spec.name)).astype(np.float32)
                if not np.isfinite(value).all():
                    raise TensorFileError(f"tensor {spec.name!r} holds NaN or infinity")
                yield spec.name, value
    except SafetensorError as error:
        raise TensorFileError(f"this is no valid tensor file: {error}") from error


def decode_file(path: str, expected: Iterable[TensorSpec]) -> dict[str, Float32]:
    """All tensors of a file; see `decode_one_by_one`."""
    return dict(decode_one_by_one(path, expected))


def max_file_bytes(expected: Iterable[TensorSpec]) -> int:
    """The largest body that a legal file of these tensors can have, in any encoding."""
    return sum(4 * spec.count + _HEADER_BYTES_PER_TENSOR for spec in expected) + 4096


def hash_bytes(data: bytes) -> str:
    """sha256 as 64 hex digits: the address of a blob."""
    return sha256(data).hexdigest()


def _check_names(found: set[str], wanted: set[str]) -> None:
    missing, additional = sorted(wanted - found), sorted(found - wanted)
    if missing:
        raise TensorFileError(f"{len(missing)} tensors are missing, the first is {missing[0]!r}")
    if additional:
        raise TensorFileError(f"{len(additional)} tensors were not expected, the first is {additional[0]!r}")

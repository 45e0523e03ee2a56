"""How stored features are written: as float32, as float16, or as int8 with one float32 scale for each token."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_client.rows.checks import find_fault
from lamina.encoding.quantize import dequantize_rows, quantize_rows
from lamina.errors import NonFiniteError

_FP16_MAX = 65504.0


def encode_rows(features: NDArray[np.float32], encoding: str, first: int, what: str) -> NDArray[Any]:
    """Rows as they are stored; `first` is the number of the first one.

    Raises NonFiniteError for a feature that is NaN, infinite, or too large for float16.
    """
    fault = find_fault(features, None, first)
    if fault is not None:
        raise NonFiniteError(f"{what}: {fault}; the frozen weights or the data hold extreme values")
    if encoding == "fp32":
        return features
    if encoding == "fp16":
        largest = float(np.abs(features).max(initial=0.0))
        if largest > _FP16_MAX:
            raise NonFiniteError(f"{what}: a value of {largest:g} does not fit fp16 ({_FP16_MAX:g}); store int8 or fp32")
        return features.astype(np.float16)
    steps, scales = quantize_rows(features)
    stored = np.empty(len(features), row_dtype(features.shape[1:], encoding))
    stored["steps"], stored["scales"] = steps, scales
    return stored


def decode_rows(stored: NDArray[Any]) -> NDArray[np.float32]:
    if stored.dtype.names:
        return dequantize_rows(stored["steps"], stored["scales"])
    return stored.astype(np.float32, copy=False)


def row_dtype(shape: tuple[int, ...], encoding: str) -> np.dtype[Any]:
    """The type of one stored row of features of this shape; `.itemsize` is what it takes on disk."""
    if encoding == "int8":
        return np.dtype([("steps", "i1", shape), ("scales", "<f4", shape[:-1])])
    return np.dtype(("<f4" if encoding == "fp32" else "<f2", shape))

"""What must hold before a program runs: engines read past the end of an array, or learn from NaN, without a word."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_client.engines.base import Array
from lamina.errors import DataError, EngineError
from lamina.names import ProgramShape


def check_inputs(program: ProgramShape, arrays: Sequence[Array], limits: dict[str, int]) -> None:
    """Raises EngineError for arrays that are not those of the program, DataError for a value that is not legal."""
    names = [spec.name for spec in program.inputs]
    if len(arrays) != len(names):
        raise EngineError(f"the {program.role} program takes the inputs {names}, given {len(arrays)} arrays")
    count = arrays[0].shape[0] if arrays[0].ndim else 0
    if not 1 <= count <= program.max_batch:
        raise EngineError(f"a batch of {count} does not fit the {program.role} program, which takes 1..{program.max_batch}")
    for spec, array in zip(program.inputs, arrays, strict=True):
        if array.dtype != np.dtype(spec.dtype):
            raise EngineError(f"input {spec.name!r} has dtype {array.dtype}, the program takes {spec.dtype}")
        if array.shape != (count, *spec.shape):
            raise EngineError(f"input {spec.name!r} has shape {array.shape}, the program takes {(count, *spec.shape)}")
        if not array.flags.c_contiguous:
            raise EngineError(f"input {spec.name!r} is not contiguous; pass numpy.ascontiguousarray of it")
        fault = find_fault(array, limits.get(spec.name))
        if fault is not None:
            raise DataError(f"input {spec.name!r} of the batch: {fault}")


def find_fault(array: Array, limit: int | None, first: int = 0, most: float | None = None) -> str | None:
    """What is wrong with the first illegal value: not finite, beyond +-`most`, or an integer outside of [0, limit). None if all
    is well.

    `first` is added to the row number that is reported.
    """
    if not array.size:
        return None
    if np.issubdtype(array.dtype, np.floating):
        if not is_finite(array):
            place, rule = np.argwhere(~np.isfinite(array))[0], "is not finite"
        elif most is not None and max(-array.min(), array.max()) > most:
            place, rule = np.argwhere(np.abs(array) > most)[0], f"is beyond +-{most:,.0f}; scale the data"
        else:
            return None
    else:
        if limit is None or (array.min() >= 0 and array.max() < limit):
            return None
        place, rule = np.argwhere((array < 0) | (array >= limit))[0], f"is outside of 0..{limit - 1}"
    index = ", ".join(str(i) for i in (int(place[0]) + first, *place[1:].tolist()))
    return f"value {array[tuple(place)]} at index [{index}] {rule}"


def is_finite(array: NDArray[np.float32]) -> bool:
    """Without a temporary array: min and max hand on NaN, and show infinity."""
    return not array.size or bool(np.isfinite(array.min()) and np.isfinite(array.max()))

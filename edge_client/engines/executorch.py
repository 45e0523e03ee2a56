"""ExecuTorch: `.pte` files on the native libraries of its wheel, through a shim of ours; without torch in the process."""

import ctypes
import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from edge_client.engines.base import Array, LoadedProgram, program_arrays
from edge_client.engines.executorch_runtime import Runtime, find_runtime, load_shim
from edge_client.progress import Say, say
from lamina.errors import EngineError, EngineMissingError
from lamina.names import EngineName, ProgramShape

# `LaminaTensor` of executorch_shim.cpp, and ExecuTorch's numbers of the types that an array can have.
TENSOR = np.dtype([("data", np.uintp), ("sizes", np.int64, 16), ("rank", np.int32), ("dtype", np.int32)], align=True)
DTYPES = {
    number: np.dtype(name)
    for number, name in enumerate(("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"))
} | {11: np.dtype("bool")}


class ExecutorchProgram:
    def __init__(self, shim: ctypes.CDLL, path: Path, program: ProgramShape) -> None:
        self._shim, self._file = shim, path.name
        self._handle: int | None = None
        self._handle = shim.lamina_et_open(os.fsencode(path))
        if not self._handle:
            raise EngineError(f"executorch cannot load program {path.name}: {self._error()}")
        self._inputs = np.zeros(shim.lamina_et_num_inputs(self._handle), TENSOR)
        self._outputs = np.zeros(shim.lamina_et_num_outputs(self._handle), TENSOR)
        self._inputs_at, self._outputs_at = self._inputs.ctypes.data, self._outputs.ctypes.data
        if shim.lamina_et_inputs(self._handle, self._inputs_at):
            fault = self._error()
            self.close()
            raise EngineError(f"executorch cannot load program {path.name}: {fault}")
        taken = [(_shape(tensor), DTYPES.get(int(tensor["dtype"]))) for tensor in self._inputs]
        self._planned = program_arrays(program)
        if taken != self._planned:
            self.close()
            raise EngineError(f"program {path.name} takes arrays {_text(taken)}, but its manifest says {_text(self._planned)}")
        self._num_weights = len(self._planned) - len(program.inputs)  # with references: those, too, are always the same arrays
        self._weights: list[Array | None] = [None] * self._num_weights
        self._described, self._views = b"", list[Array]()

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        if self._handle is None:
            raise EngineError(f"program {self._file} was closed; load it again")
        if len(arrays) != len(self._planned):
            raise EngineError(f"program {self._file} takes {len(self._planned)} arrays, given {len(arrays)}")
        for index, array in enumerate(arrays[: self._num_weights]):
            if array is not self._weights[index]:  # mostly it is: a step changes the values, not the array
                self._give(index, array, self._planned[index][0])
                self._weights[index] = array
        batch = arrays[-1].shape[:1]
        for index in range(self._num_weights, len(arrays)):
            shape = self._planned[index][0]
            self._give(index, arrays[index], (*batch, *shape[1:]) if (0,) < batch <= shape[:1] else shape)
        if self._shim.lamina_et_run(self._handle, self._inputs_at, self._outputs_at):
            raise EngineError(f"executorch failed in program {self._file}: {self._error()}")
        described = self._outputs.tobytes()
        if described != self._described:  # mostly not: the same program gives the same places and shapes
            self._described, self._views = described, [self._view(*output) for output in self._outputs.tolist()]
        return self._views.copy()

    def close(self) -> None:
        if self._handle is not None:
            self._shim.lamina_et_close(self._handle)
            self._handle, self._weights, self._views = None, [], []

    def __del__(self) -> None:
        self.close()

    def _give(self, index: int, array: Array, shape: tuple[int, ...]) -> None:
        """Puts an array into the list of inputs. The runtime itself only looks whether it is larger than was planned for."""
        dtype = self._planned[index][1]
        if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
            raise EngineError(
                f"array {index} of program {self._file} must be {dtype}{list(shape)} and contiguous, "
                f"given {array.dtype}{list(array.shape)}{'' if array.flags.c_contiguous else ', not contiguous'}"
            )
        given = self._inputs[index]
        given["data"] = array.__array_interface__["data"][0]
        if shape:
            given["sizes"][0] = shape[0]  # the only size that differs from the planned one

    def _view(self, address: int, sizes: list[int], rank: int, number: int) -> Array:
        """The runtime's memory as an array, without a copy."""
        if number not in DTYPES:
            raise EngineError(f"program {self._file} gives values of ExecuTorch's type {number}, which numpy does not have")
        dtype, shape = DTYPES[number], sizes[:rank]
        memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
        return np.ndarray(shape, dtype, memoryview(memory))

    def _error(self) -> str:
        return str(self._shim.lamina_et_error().decode(errors="replace"))


class Executorch:
    name: ClassVar[EngineName] = "executorch"

    def __init__(self) -> None:
        self._shim = _started()

    def load(self, path: Path, program: ProgramShape) -> LoadedProgram:
        return ExecutorchProgram(self._shim, path, program)


@cache  # the runtime takes its settings once for each process
def _started() -> ctypes.CDLL:
    return start(find_runtime())


def start(runtime: Runtime, tell: Say = say) -> ctypes.CDLL:
    """The shim, ready for calls, with the runtime in this process set to one thread. Raises EngineMissingError."""
    shim = load_shim(runtime, tell)
    pointer = ctypes.c_void_p
    shim.lamina_et_error.restype = ctypes.c_char_p
    shim.lamina_et_open.argtypes, shim.lamina_et_open.restype = [ctypes.c_char_p], pointer
    shim.lamina_et_num_inputs.argtypes = shim.lamina_et_num_outputs.argtypes = shim.lamina_et_close.argtypes = [pointer]
    shim.lamina_et_inputs.argtypes = [pointer, pointer]
    shim.lamina_et_run.argtypes = [pointer, pointer, pointer]
    shim.lamina_et_close.restype = None
    if shim.lamina_et_start():
        raise EngineMissingError(f"ExecuTorch cannot be used in this process: {shim.lamina_et_error().decode()}")
    return shim


def _shape(tensor: np.void) -> tuple[int, ...]:
    return tuple(tensor["sizes"][: tensor["rank"]].tolist())


def _text(arrays: Sequence[tuple[tuple[int, ...], np.dtype[np.generic] | None]]) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in arrays)


ENGINE = Executorch

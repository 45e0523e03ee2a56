"""What an engine is: it loads a program and runs it. Nothing else; rounds, optimisers and parameters live above it.

Every program is a pure function of arrays (see `lamina.bundles.manifest`): weights come first, then tensors that are never
trained if it has any, then copies of some weights from another time if it asks for any, then the batch; the outputs of a
`train` program are loss, correct and one gradient for each weight. So an engine needs two verbs, and the flat parameter and
gradient vectors, references, accumulation and all checks are written once in `edge_client.train.stage_model`, for all engines.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lamina.names import EngineName, ProgramShape

Array = NDArray[Any]


class LoadedProgram(Protocol):
    """A program ready to run on this device, with one thread."""

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """Outputs for contiguous float32 / int64 / int8 inputs in the program's order: weights, frozen tensors, references,
        batch inputs.

        Inputs are read in place and never changed. An output may be memory of the runtime: it is valid until the next
        call of this program, so copy or add it up before. Raises EngineError with the runtime's own words.
        """
        ...

    def close(self) -> None:
        """Gives the runtime's memory back; the program cannot run afterwards."""
        ...


class Engine(Protocol):
    """A runtime that is installed here."""

    name: EngineName

    def load(self, path: Path, program: ProgramShape) -> LoadedProgram:
        """A program from a file whose sha256 was verified. Raises EngineError if the runtime cannot load it."""
        ...


def program_arrays(program: ProgramShape) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
    """(shape, dtype) of everything that a program takes, in order; batch inputs at their largest batch."""
    float32, int8 = np.dtype(np.float32), np.dtype(np.int8)
    arrays: list[tuple[tuple[int, ...], np.dtype[Any]]] = []
    for shape in (*program.weights, *program.frozen):
        if program.precision == "int8" and len(shape) == 2:
            arrays += [(shape, int8), (shape[:1], float32)]
        else:
            arrays.append((shape, float32))
    arrays += [(program.weights[place], float32) for reference in program.references for place in reference.tensors]
    return arrays + [((program.max_batch, *spec.shape), np.dtype(spec.dtype)) for spec in program.inputs]

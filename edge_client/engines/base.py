"""What an engine is: it loads a program and runs it. Nothing else; rounds, optimisers and parameters live above it.

Every program is a pure function of arrays (see `lamina.manifest`): weights come first, then the batch; the outputs of a
`train` program are loss, correct and one gradient for each weight. So an engine needs two verbs, and the flat parameter
and gradient vectors, accumulation and all checks are written once in `edge_client.stage_model`, for all engines.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from lamina.manifest import EngineName, Program

Array = NDArray[Any]


class LoadedProgram(Protocol):
    """A program ready to run on this device, with one thread."""

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """Outputs for contiguous float32 / int64 inputs in the program's order: weights, then batch inputs.

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

    def load(self, path: Path, program: Program) -> LoadedProgram:
        """A program from a file whose sha256 was verified. Raises EngineError if the runtime cannot load it."""
        ...

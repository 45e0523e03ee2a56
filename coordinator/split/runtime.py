"""What runs the coordinator's programs: given by whoever starts it, because this room imports no engine.

The devices' engines and optimisers (`edge_client.split.runtime`) serve here too, so that both ends compute by the same code.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from lamina.encoding.tensors import Float32
from lamina.names import EngineName, ProgramShape


class RunnableProgram(Protocol):
    def run(self, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Outputs are valid until the next call."""
        ...


class Optimizer(Protocol):
    def step(self, parameters: Float32, gradient: Float32) -> None:
        """Changes the parameters in place."""
        ...


class Runtime(Protocol):
    name: EngineName

    def load(self, path: Path, program: ProgramShape) -> RunnableProgram: ...

    def optimizer(self, settings: Mapping[str, Any], count: int, learning_rate: float) -> Optimizer:
        """A fresh one (`lamina.plans.plan.SGD`, `lamina.plans.plan.AdamW`)."""
        ...

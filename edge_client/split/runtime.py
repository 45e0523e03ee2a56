"""An engine and the optimisers, as the coordinator's half of split training takes them (`coordinator.split.runtime`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_client.engines import LoadedProgram, load_engine
from edge_client.train.optimizers import Optimizer, make_optimizer
from lamina.names import EngineName, ProgramShape


class EngineRuntime:
    def __init__(self, name: EngineName) -> None:
        """Raises EngineMissingError."""
        self._engine = load_engine(name)
        self.name: EngineName = name

    def load(self, path: Path, program: ProgramShape) -> LoadedProgram:
        return self._engine.load(path, program)

    def optimizer(self, settings: Mapping[str, Any], count: int, learning_rate: float) -> Optimizer:
        return make_optimizer(settings, count, learning_rate)

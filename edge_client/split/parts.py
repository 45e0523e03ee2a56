"""The parts of a split model on a device: trained ones as flat vectors with their optimisers, frozen ones as they came."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.engines.base import Array, Engine, LoadedProgram
from edge_client.rows.checks import is_finite
from edge_client.train.optimizers import Optimizer, make_optimizer
from lamina.encoding.tensors import Float32, decode_file
from lamina.errors import EngineError, NonFiniteError
from lamina.split.manifest import SplitManifest, SplitProgram, flat, float_arrays, taken_weights
from lamina.split.plan import FUSION

OpenBlob = Callable[[str], Path]
"""The file of a blob, fetched if it is missing."""


class Parts:
    """The trained parts that a device holds in one round; a step changes their vectors in place."""

    def __init__(self, manifest: SplitManifest, weights: Mapping[str, str], blob: OpenBlob) -> None:
        self._manifest = manifest
        self._start = {name: flat(list(self._read(name, blob(digest)))) for name, digest in weights.items()}
        self._vectors = {name: vector.copy() for name, vector in self._start.items()}
        self._views = {name: float_arrays(vector, manifest.part(name).tensors) for name, vector in self._vectors.items()}
        training = manifest.plan.training
        settings = training.optimizer.model_dump()
        self._optimizers: dict[str, Optimizer] = {
            name: make_optimizer(
                settings, vector.size, manifest.plan.fusion.learning_rate if name == FUSION else training.learning_rate
            )
            for name, vector in self._vectors.items()
        }

    def views(self, part: str) -> list[Float32]:
        return self._views[part]

    def has(self, part: str) -> bool:
        return part in self._vectors

    def step(self, part: str, gradients: list[Array]) -> None:
        """One step of a part's optimiser. Raises NonFiniteError before anything is changed."""
        gradient = flat(gradients)
        if not is_finite(gradient):
            raise NonFiniteError(f"the gradient of {part} is not finite; lower the learning rate, or look at the data")
        self._optimizers[part].step(self._vectors[part], gradient)

    def differences(self, parts: list[str]) -> dict[str, Float32]:
        """What training changed, by `part/tensor`."""
        found: dict[str, Float32] = {}
        for part in parts:
            tensors = self._manifest.part(part).tensors
            moved = float_arrays(self._vectors[part] - self._start[part], tensors)
            found |= {f"{part}/{tensor.name}": value for tensor, value in zip(tensors, moved, strict=True)}
        return found

    def _read(self, part: str, path: Path) -> list[Float32]:
        return list(decode_file(str(path), self._manifest.part(part).tensors).values())


class Programs:
    """The device's programs of a split plan, each loaded when it is first run."""

    def __init__(self, manifest: SplitManifest, engine: Engine, blob: OpenBlob) -> None:
        self._manifest, self._engine, self._blob = manifest, engine, blob
        self._programs = {name: p for name, p in manifest.programs[engine.name].items() if p.runs_on == "device"}
        self._loaded: dict[str, LoadedProgram] = {}
        self._frozen: dict[str, list[Array]] = {}

    def run(self, name: str, parts: Parts | None, inputs: list[Array]) -> dict[str, Array]:
        """Outputs by name; they are valid until the program runs again."""
        program = self._programs[name]
        if name not in self._loaded:
            self._loaded[name] = self._engine.load(self._blob(program.blob), program)
        weights = [array for part in program.parts for array in self._weights(program, part, parts)]
        outputs = self._loaded[name].run([*weights, *(np.ascontiguousarray(value) for value in inputs)])
        if len(outputs) != len(program.outputs):
            raise EngineError(f"the program {name} gave {len(outputs)} outputs instead of {len(program.outputs)}")
        return dict(zip(program.outputs, outputs, strict=True))

    def gradients(self, given: Mapping[str, Array], part: str) -> list[Array]:
        return [given[f"{part}/{tensor.name}"] for tensor in self._manifest.part(part).tensors]

    def close(self, name: str) -> None:
        """Frees a program and the frozen weights that it alone needed."""
        if name in self._loaded:
            self._loaded.pop(name).close()
        needed = {part for loaded in self._loaded for part in self._programs[loaded].parts}
        self._frozen = {part: arrays for part, arrays in self._frozen.items() if part in needed}

    def close_all(self) -> None:
        for name in list(self._loaded):
            self.close(name)

    def _weights(self, program: SplitProgram, part: str, parts: Parts | None) -> list[Any]:
        plan = self._manifest.plan
        if parts is not None and parts.has(part):
            return taken_weights(plan, program.precision, part, parts.views(part))
        if part not in self._frozen:
            path = self._blob(self._manifest.initial_weights[part])
            tensors = list(decode_file(str(path), self._manifest.part(part).tensors).values())
            self._frozen[part] = taken_weights(plan, program.precision, part, tensors)
        return self._frozen[part]

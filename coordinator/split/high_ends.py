"""The high ends of all encoders and the fusion net: the coordinator's arithmetic for one batch.

The frozen arrays are read once and only ever given to programs as inputs. Task adapters and the fusion net are flat vectors; a
step changes them in place, and `snapshot` and `restore` take a user's turn back.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.split.runtime import Optimizer, RunnableProgram, Runtime
from lamina.encoding.tensors import Float32, decode_file
from lamina.errors import UpdateRejectedError
from lamina.split.manifest import SplitManifest, flat, float_arrays
from lamina.split.plan import FUSION, task_adapter

Values = dict[str, Float32]
"""By modality."""
Snapshot = tuple[dict[str, Float32], dict[str, Optimizer]]


class HighEnds:
    """`blob(digest)` is the file of a blob of the manifest or of a round's result."""

    def __init__(self, manifest: SplitManifest, runtime: Runtime, blob: Callable[[str], Path]) -> None:
        plan = manifest.plan
        self._manifest, self._plan, self._runtime, self._blob = manifest, plan, runtime, blob
        self._trained = [*(task_adapter(m) for m in plan.modalities), FUSION]
        self._programs: dict[str, RunnableProgram] = {}
        for name, program in manifest.programs[runtime.name].items():
            if program.runs_on == "server":
                self._programs[name] = runtime.load(blob(program.blob), program)
        self._frozen = {
            m: [array for name in plan.high(m) for array in self._read(name, manifest.initial_weights[name])]
            for m in plan.modalities
        }
        self._vectors: dict[str, Float32] = {}
        self._views: dict[str, list[Float32]] = {}
        self._optimizers: dict[str, Optimizer] = {}

    def load(self, weights: Mapping[str, str]) -> None:
        """The trained parts as these blobs have them, and fresh optimisers."""
        self._set({name: flat(self._read(name, weights[name])) for name in self._trained})
        training = self._plan.training
        settings = training.optimizer.model_dump()
        for name, vector in self._vectors.items():
            rate = self._plan.fusion.learning_rate if name == FUSION else training.learning_rate
            self._optimizers[name] = self._runtime.optimizer(settings, vector.size, rate)

    def forward(self, activations: Values) -> tuple[Values, list[Float32]]:
        """(features of each modality, [f, fused logits] if all are there). Raises UpdateRejectedError if one is not finite."""
        features = {m: self._run(f"{m}.high", self._weights(m), [value])[0].copy() for m, value in activations.items()}
        fused: list[Float32] = []
        if len(features) == len(self._plan.modalities):
            fused = [value.copy() for value in self._run(FUSION, self._views[FUSION], list(features.values()))]
        _check(f"the activations lead to values that are not finite{_HINT}", *features.values(), *fused)
        return features, fused

    def backward(self, activations: Values, features: Values, gradients: Values, of_logits: Float32 | None) -> Values:
        """The gradients of the activations; steps the task adapter of each modality there is and, where `of_logits` is given,
        the fusion net.

        Raises UpdateRejectedError before anything is changed if a gradient is not finite.
        """
        downs: Values = {}
        steps: dict[str, Float32] = {}
        for m in activations:
            down, *own = self._run(f"{m}.high_backward", self._weights(m), [activations[m], gradients[m]])
            downs[m], steps[task_adapter(m)] = down.copy(), flat(own)
        if of_logits is not None:
            steps[FUSION] = flat(self._run("fusion_backward", self._views[FUSION], [*features.values(), of_logits]))
        _check(f"the gradients lead to values that are not finite{_HINT}", *downs.values(), *steps.values())
        for name, gradient in steps.items():
            self._optimizers[name].step(self._vectors[name], gradient)
        return downs

    def tensors(self, part: str) -> dict[str, Float32]:
        """Copies of a trained part's tensors, by name."""
        names = [tensor.name for tensor in self._manifest.part(part).tensors]
        return {name: view.copy() for name, view in zip(names, self._views[part], strict=True)}

    def snapshot(self) -> Snapshot:
        return {name: vector.copy() for name, vector in self._vectors.items()}, deepcopy(self._optimizers)

    def restore(self, snapshot: Snapshot) -> None:
        vectors, optimizers = snapshot
        self._set({name: vector.copy() for name, vector in vectors.items()})
        self._optimizers = deepcopy(optimizers)

    def _set(self, vectors: dict[str, Float32]) -> None:
        self._vectors = vectors
        self._views = {name: float_arrays(vector, self._manifest.part(name).tensors) for name, vector in vectors.items()}

    def _weights(self, modality: str) -> list[Float32]:
        return [*self._views[task_adapter(modality)], *self._frozen[modality]]

    def _run(self, name: str, weights: list[Float32], inputs: list[Float32]) -> list[NDArray[Any]]:
        return self._programs[name].run([*weights, *(np.ascontiguousarray(value) for value in inputs)])

    def _read(self, part: str, digest: str) -> list[Float32]:
        return list(decode_file(str(self._blob(digest)), self._manifest.part(part).tensors).values())


_HINT = ": lower the learning rate, or look for extreme values in the data"


def _check(message: str, *values: NDArray[Any]) -> None:
    if not all(np.isfinite(value).all() for value in values):
        raise UpdateRejectedError(message)

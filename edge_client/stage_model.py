"""The active segments of one stage: flat parameters, flat gradient, and the programs that compute on them.

All tensors are views into two float32 vectors in exchange order, so the optimiser, the difference and the upload work on
whole vectors, and a program sees a changed parameter at its next call.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from edge_client.checks import check_inputs, is_finite, limits_of
from edge_client.engines.base import Array, LoadedProgram
from edge_client.memory import give_back_free_memory
from lamina.errors import EngineError, NonFiniteError
from lamina.manifest import EngineName, Manifest, Program
from lamina.segments import TensorSpec
from lamina.tensors import Float32, decode_one_by_one

Batch = Mapping[str, Array]
OpenProgram = Callable[[Program], LoadedProgram]


class StageModel:
    """`parameters` and `gradient` are float32 vectors of the stage's exchange order.

    One program is resident at a time: the peak is that of the training program, not the sum of two.
    """

    def __init__(self, manifest: Manifest, stage: int, engine: EngineName, open_program: OpenProgram) -> None:
        if engine not in manifest.stages[stage].train:
            raise EngineError(f"run {manifest.plan.name!r} has no programs for {engine!r}; it has {list(manifest.engines)}")
        self._manifest = manifest
        self._stage = stage
        self.train_program = manifest.programs[manifest.stages[stage].train[engine]]
        # One file may serve both roles (torch derives the gradients itself), so the role is that of the place, not the file's.
        self.train_program = self.train_program.model_copy(update={"role": "train"})
        self.eval_program = manifest.programs[manifest.stages[stage].eval[engine]].model_copy(update={"role": "eval"})
        self._limits = limits_of(manifest.plan.model)
        self._specs = manifest.exchange_specs(stage)
        count = sum(spec.count for spec in self._specs)
        self.parameters: Float32 = np.zeros(count, np.float32)
        self.gradient: Float32 = np.zeros(count, np.float32)
        self._weights = _views(self.parameters, self._specs)
        self._gradients = _views(self.gradient, self._specs)
        self._open_program = open_program
        self._resident: tuple[Program, LoadedProgram] | None = None
        shapes = tuple(spec.shape for spec in self._specs)
        for program in (self.train_program, self.eval_program):
            if program.weights != shapes:
                raise EngineError(f"the {program.role} program takes other weights than stage {stage} exchanges")

    def load_weights(self, fetch: Callable[[str], Path], weights: Mapping[str, str]) -> None:
        """Fills the parameters from each active segment's file, one tensor resident at a time."""
        for view, value in self._stored(fetch, weights):
            view[...] = value

    def subtract_weights(self, fetch: Callable[[str], Path], weights: Mapping[str, str]) -> None:
        """Turns the parameters into their difference from these weights, so that no copy of the start is ever held."""
        for view, value in self._stored(fetch, weights):
            view -= value

    def gradients(self, batch: Batch) -> tuple[float, int]:
        """Adds the gradient of the batch's mean loss to `gradient`; gives loss and how many were correct.

        Raises EngineError or DataError before the step for a batch that the program must not see, and NonFiniteError
        after it for a loss or gradient that must not reach the parameters.
        """
        loss, correct, *gradients = self._run(self.train_program, batch)
        value, count = self._loss(loss, batch), int(correct)
        for view, gradient in zip(self._gradients, gradients, strict=True):
            view += gradient.reshape(view.shape)
        if not is_finite(self.gradient):
            bad = next(s.name for s, v in zip(self._specs, self._gradients, strict=True) if not is_finite(v))
            raise NonFiniteError(
                f"the gradient of {bad} in stage {self._stage} is not finite (loss {value:g}); "
                f"lower the learning rate of the stage, or look for extreme values in the data"
            )
        return value, count

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """Mean loss of the batch and how many were correct; the same checks as `gradients`."""
        loss, correct = self._run(self.eval_program, batch)
        return self._loss(loss, batch), int(correct)

    def tensors(self) -> dict[str, Float32]:
        """Views of the parameters by the names of the exchange, `segment/tensor`."""
        return {spec.name: view for spec, view in zip(self._specs, self._weights, strict=True)}

    def close(self) -> None:
        """Frees the resident program; the next step loads its program again."""
        if self._resident is not None:
            self._resident[1].close()
            self._resident = None
            give_back_free_memory()

    def _run(self, program: Program, batch: Batch) -> list[Array]:
        lacking = [spec.name for spec in program.inputs if spec.name not in batch]
        if lacking:
            raise EngineError(f"the {program.role} program needs the input {lacking[0]!r}, the batch has {sorted(batch)}")
        inputs = [batch[spec.name] for spec in program.inputs]
        check_inputs(program, inputs, self._limits)
        if self._resident is None or self._resident[0] is not program:
            self.close()
            self._resident = (program, self._open_program(program))
        outputs = self._resident[1].run([*self._weights, *inputs])
        expected = 2 + (len(self._weights) if program.role == "train" else 0)
        if len(outputs) != expected:
            raise EngineError(f"the {program.role} program gave {len(outputs)} outputs instead of {expected}")
        return outputs

    def _loss(self, loss: Array, batch: Batch) -> float:
        value = float(loss)
        if not np.isfinite(value):
            raise NonFiniteError(
                f"the loss in stage {self._stage} is {value}, though the inputs {sorted(batch)} are finite; "
                f"lower the learning rate of the stage, or look for extreme values in the data"
            )
        return value

    def _stored(self, fetch: Callable[[str], Path], weights: Mapping[str, str]) -> Iterator[tuple[Float32, Float32]]:
        """(view of the parameters, stored value) of each tensor."""
        views = iter(self._weights)
        for name in self._manifest.plan.stages[self._stage].active:
            segment = self._manifest.segment(name)
            for _, value in decode_one_by_one(str(fetch(weights[name])), segment.tensors):
                yield next(views), value


def _views(vector: Float32, specs: list[TensorSpec]) -> list[Float32]:
    views, start = [], 0
    for spec in specs:
        views.append(vector[start : start + spec.count].reshape(spec.shape))
        start += spec.count
    return views

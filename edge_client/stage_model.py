"""The active segments of one stage: flat parameters, flat gradient, and the programs that compute on them.

All tensors are views into two float32 vectors in exchange order, so the optimiser, the difference and the upload work on
whole vectors, and a program sees a changed parameter at its next call.

A batch goes through the programs in micro-batches, read one at a time, and the gradient is that of the whole batch:

    supervised    the loss is a mean over samples, so the gradients of the pieces are added by their share of the batch
    contrastive   the loss joins all samples: embed every piece, differentiate the loss of the batch with respect to the
                  embeddings, send each piece's part of that back through the piece (cached gradients, arXiv 2101.06983)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from edge_client.checks import check_inputs, is_finite
from edge_client.engines.base import Array, LoadedProgram
from edge_client.job import ProgramFile, SegmentFile
from edge_client.memory import give_back_free_memory
from edge_client.rows import Indices
from lamina.errors import EngineError, NonFiniteError
from lamina.names import Role
from lamina.tensors import Float32, decode_one_by_one

Read = Callable[[Indices], Mapping[str, Array]]
"""The batch inputs of some examples, by name."""
OpenProgram = Callable[[ProgramFile], LoadedProgram]
_PIECE = 1 << 15


class StageModel:
    """`parameters` and `gradient` are float32 vectors of the stage's exchange order.

    `programs` are those of one phase: train (or embed, loss, backward), or eval (or embed, loss). Each is loaded when it is
    first needed and stays until `close`.
    """

    def __init__(
        self,
        where: str,
        segments: Sequence[SegmentFile],
        programs: Mapping[Role, ProgramFile],
        limits: Mapping[str, int],
        micro_batch: int,
        open_program: OpenProgram,
    ) -> None:
        self._where, self._segments, self._programs, self._limits = where, segments, programs, dict(limits)
        self._micro_batch, self._open_program = micro_batch, open_program
        self._names = [f"{segment.name}/{tensor.name}" for segment in segments for tensor in segment.tensors]
        self._shapes = tuple(tensor.shape for segment in segments for tensor in segment.tensors)
        count = sum(tensor.count for segment in segments for tensor in segment.tensors)
        self.parameters: Float32 = np.zeros(count, np.float32)
        self.gradient: Float32 = np.zeros(count if "train" in programs or "backward" in programs else 0, np.float32)
        self._weights = _views(self.parameters, self._shapes)
        self._open: dict[Role, LoadedProgram] = {}
        for role, program in programs.items():
            if program.weights != (() if role == "loss" else self._shapes):
                raise EngineError(f"the {role} program takes other weights than {where} exchanges")

    def load_weights(self) -> None:
        """Fills the parameters from each active segment's file, one tensor resident at a time."""
        for view, value in self._stored():
            view[...] = value

    def subtract_weights(self) -> None:
        """Turns the parameters into their difference from the files, so that no copy of the start is ever held."""
        for view, value in self._stored():
            view -= value

    def gradients(self, read: Read, indices: Indices) -> tuple[float, int]:
        """Sets `gradient` to that of the mean loss over these examples; gives the loss and how many were correct.

        Raises EngineError or DataError before the step for a batch that the program must not see, and NonFiniteError
        after it for a loss or gradient that must not reach the parameters.
        """
        self.gradient.fill(0)
        loss, correct = self._supervised(read, indices) if "train" in self._programs else self._contrastive(read, indices)
        if not is_finite(self.gradient):
            views = _views(self.gradient, self._shapes)
            bad = next(name for name, view in zip(self._names, views, strict=True) if not is_finite(view))
            raise NonFiniteError(
                f"the gradient of {bad} in {self._where} is not finite (loss {loss:g}); "
                f"lower the learning rate of the stage, or look for extreme values in the data"
            )
        return loss, correct

    def evaluate(self, read: Read, indices: Indices) -> tuple[float, int]:
        """Mean loss of these examples and how many were correct; the same checks as `gradients`."""
        if "eval" not in self._programs:
            loss, correct, _ = self._loss_of(self._embeddings(read, indices))
            return loss, correct
        total, right = 0.0, 0
        for piece in self._pieces(indices):
            given = self._run("eval", read(piece), 2)
            total += self._finite(given[0]) * len(piece)
            right += int(given[1])
        return total / len(indices), right

    def tensors(self) -> dict[str, Float32]:
        """Views of the parameters by the names of the exchange, `segment/tensor`."""
        return dict(zip(self._names, self._weights, strict=True))

    def close(self) -> None:
        """Frees the programs; the next step loads what it needs again."""
        for program in self._open.values():
            program.close()
        self._open.clear()
        give_back_free_memory()

    def _supervised(self, read: Read, indices: Indices) -> tuple[float, int]:
        total, right = 0.0, 0
        for piece in self._pieces(indices):
            share = len(piece) / len(indices)
            loss, correct, *gradients = self._run("train", read(piece), 2 + len(self._shapes))
            total, right = total + self._finite(loss) * share, right + int(correct)
            self._add(gradients, share)
            del gradients  # not beside those of the next piece
        return total, right

    def _contrastive(self, read: Read, indices: Indices) -> tuple[float, int]:
        loss, correct, cotangents = self._loss_of(self._embeddings(read, indices))
        names = [spec.name for spec in self._programs["backward"].inputs[-len(cotangents) :]]
        first = 0
        for piece in self._pieces(indices):
            parts = (np.ascontiguousarray(cotangent[first : first + len(piece)]) for cotangent in cotangents)
            batch = {**read(piece), **dict(zip(names, parts, strict=True))}
            self._add(self._run("backward", batch, len(self._shapes)), 1.0)
            first += len(piece)
        return loss, correct

    def _embeddings(self, read: Read, indices: Indices) -> list[Array]:
        """One array (examples, output) for each modality."""
        pieces: list[list[Array]] = []
        for piece in self._pieces(indices):
            pieces.append([embedding.copy() for embedding in self._run("embed", read(piece), None)])  # noqa: PERF401
        return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]

    def _loss_of(self, embeddings: list[Array]) -> tuple[float, int, list[Array]]:
        names = [spec.name for spec in self._programs["loss"].inputs]
        outputs = self._run("loss", dict(zip(names, embeddings, strict=True)), 2 + len(embeddings), with_weights=False)
        return self._finite(outputs[0]), int(outputs[1]), outputs[2:]

    def _pieces(self, indices: Indices) -> Iterator[Indices]:
        return (indices[start : start + self._micro_batch] for start in range(0, len(indices), self._micro_batch))

    def _add(self, gradients: Sequence[Array], share: float) -> None:
        """gradient += share * gradients, in pieces that need no array of a tensor's size beside it."""
        start, factor = 0, np.float32(share)
        for gradient in gradients:
            flat = gradient.reshape(-1)
            for at in range(0, flat.size, _PIECE):
                part = flat[at : at + _PIECE]
                target = self.gradient[start + at : start + at + part.size]
                target += part if share == 1.0 else part * factor
            start += flat.size

    def _run(self, role: Role, batch: Mapping[str, Array], outputs: int | None, with_weights: bool = True) -> list[Array]:
        program = self._programs[role]
        lacking = [spec.name for spec in program.inputs if spec.name not in batch]
        if lacking:
            raise EngineError(f"the {role} program needs the input {lacking[0]!r}, the batch has {sorted(batch)}")
        inputs = [batch[spec.name] for spec in program.inputs]
        check_inputs(program, inputs, self._limits)
        if role not in self._open:
            self._open[role] = self._open_program(program)
        given = self._open[role].run([*self._weights, *inputs] if with_weights else inputs)
        if outputs is not None and len(given) != outputs:
            raise EngineError(f"the {role} program gave {len(given)} outputs instead of {outputs}")
        return given

    def _finite(self, loss: Array) -> float:
        value = float(loss)
        if not np.isfinite(value):
            raise NonFiniteError(
                f"the loss in {self._where} is {value}, though its inputs are finite; "
                f"lower the learning rate of the stage, or look for extreme values in the data"
            )
        return value

    def _stored(self) -> Iterator[tuple[Float32, Float32]]:
        """(view of the parameters, stored value) of each tensor."""
        views = iter(self._weights)
        for segment in self._segments:
            for _, value in decode_one_by_one(segment.path, segment.tensors):
                yield next(views), value


def _views(vector: Float32, shapes: Sequence[tuple[int, ...]]) -> list[Float32]:
    views, start = [], 0
    for shape in shapes:
        count = int(np.prod(shape, dtype=np.int64))
        views.append(vector[start : start + count].reshape(shape))
        start += count
    return views

"""The active segments of one stage: flat parameters, flat gradient, and the programs that compute on them.

All tensors are views into two float32 vectors in exchange order, so the optimiser, the difference and the upload work on
whole vectors, and a program sees a changed parameter at its next call.

A batch goes through the programs in micro-batches, read one at a time, and the gradient is that of the whole batch:

    supervised    the loss is a mean over samples, so the gradients of the pieces are added by their share of the batch
    others        the loss joins all samples: embed every piece, differentiate the loss of the batch with respect to the
                  embeddings, send each piece's part of that back through the piece (cached gradients, arXiv 2101.06983)

References, copies of some tensors from another time, are held only as far as a program asks for them
(`edge_client.train.references`). Tensors that the model's author froze stand beside the parameters: programs take them, and
nothing changes them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from edge_client.engines.base import Array, LoadedProgram
from edge_client.job import ProgramFile, SegmentFile
from edge_client.process.memory import give_back_free_memory
from edge_client.rows.checks import check_inputs, is_finite
from edge_client.rows.row_files import Indices
from edge_client.train.references import PIECE, Copy, make_copies
from lamina.encoding.tensors import Float32, decode_one_by_one
from lamina.errors import EngineError, NonFiniteError
from lamina.names import LABEL, MOST_LOSS, Role

Read = Callable[[Indices], Mapping[str, Array]]
"""The batch inputs of some examples, by name."""
OpenProgram = Callable[[ProgramFile], LoadedProgram]


class StageModel:
    """`parameters` and `gradient` are float32 vectors of the stage's exchange order.

    `programs` are those of one phase: train (or embed, loss, backward), or eval (or embed, loss). Each is loaded when it is
    first needed and stays until `close`. `teacher` are the files of `teacher` references. With `keep_start`, the weights as
    they were loaded stay beside the parameters, for `add_proximal`.
    """

    def __init__(
        self,
        where: str,
        segments: Sequence[SegmentFile],
        programs: Mapping[Role, ProgramFile],
        limits: Mapping[str, int],
        micro_batch: int,
        open_program: OpenProgram,
        teacher: Sequence[SegmentFile] = (),
        keep_start: bool = False,
    ) -> None:
        self._where, self._segments, self._programs, self._limits = where, segments, programs, dict(limits)
        self._micro_batch, self._open_program = micro_batch, open_program
        self._names = [f"{segment.name}/{tensor.name}" for segment in segments for tensor in segment.tensors]
        self._shapes = tuple(tensor.shape for segment in segments for tensor in segment.tensors)
        count = sum(tensor.count for segment in segments for tensor in segment.tensors)
        self.parameters: Float32 = np.zeros(count, np.float32)
        self.gradient: Float32 = np.zeros(count if "train" in programs or "backward" in programs else 0, np.float32)
        self._weights = _views(self.parameters, self._shapes)
        self._frozen = [np.zeros(tensor.shape, np.float32) for segment in segments for tensor in segment.frozen]
        self._teacher = teacher
        self._copies = make_copies(self.parameters, self._shapes, programs, keep_start)
        self._given = {role: self._before_the_batch(program) for role, program in programs.items()}
        self._open: dict[Role, LoadedProgram] = {}
        shapes = (*self._shapes, *(array.shape for array in self._frozen))
        for role, program in programs.items():
            # Together, because a program without gradients may serve another stage, where other tensors are frozen.
            if (*program.weights, *program.frozen) != (() if role == "loss" else shapes):
                raise EngineError(f"the {role} program takes other weights than {where} has")

    def load_weights(self) -> None:
        """Fills the parameters and the frozen tensors from each active segment's files, one tensor resident at a time; and the
        references.

        `momentum`, `start` and `previous` begin as copies of the parameters. Raises EngineError if a teacher lacks a tensor.
        """
        for view, value in self._stored():
            view[...] = value
        for view, value in self._stored_frozen():
            view[...] = value
        for kind, copy in self._copies.items():
            if kind == "teacher":
                self._load_teacher(copy)
            else:
                copy.take()

    @property
    def previous(self) -> Copy | None:
        """The reference to the model that the device ended its last round with; None if no program asks for it."""
        return self._copies.get("previous")

    def follow(self, momentum: float) -> None:
        """After a step: copy = momentum * copy + (1 - momentum) * parameters, of a `momentum` reference if there is one."""
        if "momentum" in self._copies:
            self._copies["momentum"].follow(momentum)

    def add_proximal(self, weight: float) -> None:
        """gradient += weight * (parameters - start): that of weight / 2 |parameters - start|^2. Needs `keep_start`."""
        start = self._copies["start"].values
        for at in range(0, self.gradient.size, PIECE):
            piece = slice(at, at + PIECE)
            away = self.parameters[piece] - start[piece]
            away *= np.float32(weight)
            self.gradient[piece] += away

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
            loss, correct, _ = self._loss_of(read, indices)
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
        loss, correct, cotangents = self._loss_of(read, indices)
        # Keys of a momentum copy come last, and nothing goes back through them.
        names = [spec.name for spec in self._programs["backward"].inputs[len(self._programs["embed"].inputs) :]]
        first = 0
        for piece in self._pieces(indices):
            parts = (np.ascontiguousarray(cotangent[first : first + len(piece)]) for cotangent in cotangents[: len(names)])
            batch = {**read(piece), **dict(zip(names, parts, strict=True))}
            self._add(self._run("backward", batch, len(self._shapes)), 1.0)
            first += len(piece)
        return loss, correct

    def _loss_of(self, read: Read, indices: Indices) -> tuple[float, int, list[Array]]:
        """Loss of the batch, how many were correct, and the gradient of the loss for each embedding."""
        names = [spec.name for spec in self._programs["loss"].inputs]
        modalities = [name for name in names if name != LABEL]
        pieces: list[list[Array]] = []
        labels: list[Array] = []
        for piece in self._pieces(indices):
            batch = read(piece)
            pieces.append([embedding.copy() for embedding in self._run("embed", batch, len(modalities))])
            if LABEL in names:
                labels.append(batch[LABEL])
        whole = dict(zip(modalities, (np.concatenate(parts) for parts in zip(*pieces, strict=True)), strict=True))
        if labels:
            whole[LABEL] = np.concatenate(labels)
        outputs = self._run("loss", whole, 2 + len(modalities))
        return self._finite(outputs[0]), int(outputs[1]), outputs[2:]

    def _pieces(self, indices: Indices) -> Iterator[Indices]:
        return (indices[start : start + self._micro_batch] for start in range(0, len(indices), self._micro_batch))

    def _add(self, gradients: Sequence[Array], share: float) -> None:
        """gradient += share * gradients, in pieces that need no array of a tensor's size beside it."""
        start, factor = 0, np.float32(share)
        for gradient in gradients:
            flat = gradient.reshape(-1)
            for at in range(0, flat.size, PIECE):
                part = flat[at : at + PIECE]
                target = self.gradient[start + at : start + at + part.size]
                target += part if share == 1.0 else part * factor
            start += flat.size

    def _run(self, role: Role, batch: Mapping[str, Array], outputs: int) -> list[Array]:
        program = self._programs[role]
        lacking = [spec.name for spec in program.inputs if spec.name not in batch]
        if lacking:
            raise EngineError(f"the {role} program needs the input {lacking[0]!r}, the batch has {sorted(batch)}")
        inputs = [batch[spec.name] for spec in program.inputs]
        check_inputs(program, inputs, self._limits)
        if role not in self._open:
            self._open[role] = self._open_program(program)
        given = self._open[role].run([*self._given[role], *inputs])
        if len(given) != outputs:
            raise EngineError(f"the {role} program gave {len(given)} outputs instead of {outputs}")
        return given

    def _finite(self, loss: Array) -> float:
        value = float(loss)
        if not abs(value) <= MOST_LOSS:
            what = f"beyond {MOST_LOSS:,.0f}" if np.isfinite(value) else "though its inputs are finite"
            raise NonFiniteError(
                f"the loss in {self._where} is {value:g}, {what}: training has diverged; "
                f"lower the learning rate of the stage, or look for extreme values in the data"
            )
        return value

    def _before_the_batch(self, program: ProgramFile) -> list[Array]:
        """What a program takes before its batch: the weights, the frozen tensors, then the tensors of each reference. The loss
        takes none."""
        if program.role == "loss":
            return []
        references = [self._copies[each.kind].arrays(each.tensors) for each in program.references]
        return [*self._weights, *self._frozen, *(array for arrays in references for array in arrays)]

    def _load_teacher(self, copy: Copy) -> None:
        wanted = {name: view for place, name in enumerate(self._names) if (view := copy.get(place)) is not None}
        for segment in self._teacher:
            for name, value in decode_one_by_one(segment.path, segment.tensors):
                view = wanted.pop(f"{segment.name}/{name}", None)
                if view is not None:
                    view[...] = value
        if wanted:
            raise EngineError(f"{self._where}: a program asks for {min(wanted)} of the stage before, which is not here")

    def _stored(self) -> Iterator[tuple[Float32, Float32]]:
        """(view of the parameters, stored value) of each tensor."""
        views = iter(self._weights)
        for segment in self._segments:
            for _, value in decode_one_by_one(segment.path, segment.tensors):
                yield next(views), value

    def _stored_frozen(self) -> Iterator[tuple[Float32, Float32]]:
        """(array, stored value) of each frozen tensor."""
        arrays = iter(self._frozen)
        for segment in self._segments:
            if segment.frozen:
                for _, value in decode_one_by_one(segment.frozen_path, segment.frozen):
                    yield next(arrays), value


def _views(vector: Float32, shapes: Sequence[tuple[int, ...]]) -> list[Float32]:
    views, start = [], 0
    for shape in shapes:
        count = int(np.prod(shape, dtype=np.int64))
        views.append(vector[start : start + count].reshape(shape))
        start += count
    return views

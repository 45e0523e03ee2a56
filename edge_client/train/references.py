"""References: copies of some of the parameters from another time, which programs take after their weights.

Memory is the point: a kind of reference holds the tensors that a program asks for and no others, however many programs share
them, in one flat vector. Its arrays stay the same objects while their values change, as an engine may count on.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from edge_client.job import ProgramFile
from lamina.encoding.tensors import Float32
from lamina.names import Reference, Role

PIECE = 1 << 15
"""Vectors are worked through in pieces of so many values: temporary values then stay in the processor's cache."""


class Copy:
    """The values of some tensors of a flat parameter vector: `tensors` are places in `shapes`, the order of that vector."""

    def __init__(self, parameters: Float32, shapes: Sequence[tuple[int, ...]], tensors: Iterable[int]) -> None:
        self._parameters = parameters
        starts = [0]
        for shape in shapes:
            starts.append(starts[-1] + int(np.prod(shape, dtype=np.int64)))
        places = sorted(set(tensors))
        self.values: Float32 = np.zeros(sum(starts[place + 1] - starts[place] for place in places), np.float32)
        self._views: dict[int, Float32] = {}
        self._runs: list[slice] = []  # where the tensors are in the parameters; neighbours are one run
        at = 0
        for place in places:
            start, stop = starts[place], starts[place + 1]
            self._views[place] = self.values[at : at + stop - start].reshape(shapes[place])
            at += stop - start
            if self._runs and self._runs[-1].stop == start:
                self._runs[-1] = slice(self._runs[-1].start, stop)
            else:
                self._runs.append(slice(start, stop))

    def arrays(self, tensors: Iterable[int]) -> list[Float32]:
        """Views of these tensors, in this order."""
        return [self._views[place] for place in tensors]

    def get(self, tensor: int) -> Float32 | None:
        """A view of one tensor; None if it is not among those that are held."""
        return self._views.get(tensor)

    def originals(self) -> list[Float32]:
        """The parts of the parameters that the copy has, without a copy of them; together as long as `values`."""
        return [self._parameters[run] for run in self._runs]

    def take(self) -> None:
        """Becomes a copy of the parameters as they are now."""
        for ours, theirs in self._pieces():
            ours[...] = theirs

    def follow(self, momentum: float) -> None:
        """copy = momentum * copy + (1 - momentum) * parameters."""
        keep, add = np.float32(momentum), np.float32(1 - momentum)
        for ours, theirs in self._pieces():
            ours *= keep
            ours += theirs * add

    def _pieces(self) -> Iterator[tuple[Float32, Float32]]:
        at = 0
        for run in self._runs:
            for start in range(run.start, run.stop, PIECE):
                theirs = self._parameters[start : min(start + PIECE, run.stop)]
                yield self.values[at : at + theirs.size], theirs
                at += theirs.size


def make_copies(
    parameters: Float32, shapes: Sequence[tuple[int, ...]], programs: Mapping[Role, ProgramFile], keep_start: bool
) -> dict[Reference, Copy]:
    """One copy for each kind of reference that these programs ask for; with `keep_start`, one of all tensors as `start`."""
    wanted: dict[Reference, set[int]] = {"start": set(range(len(shapes)))} if keep_start else {}
    for program in programs.values():
        for reference in program.references:
            wanted.setdefault(reference.kind, set()).update(reference.tensors)
    return {kind: Copy(parameters, shapes, tensors) for kind, tensors in wanted.items()}

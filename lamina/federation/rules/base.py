"""An aggregation rule: how the updates of a round become new weights.

    accumulator = rule.begin(specs, state, rate)     once a round; `state` is what the round before left, by slot and tensor
    accumulator.add(name, difference, weight, scale) each tensor of each update, in an order that the updates alone decide
    weights, state = accumulator.result(start)       the new weights, and the state for the next round

All arithmetic is in float64; weights and state are rounded to float32 once a round, so that a state that was written and read
again gives the same bits. Tensors that no update has keep weights and state, bit for bit. `rate` is the plan's
`server_learning_rate`, the eta of the formulas. A rule is a file of this folder, and nothing else has to know of it.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lamina.plans.segments import TensorSpec
from lamina.record import Record

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
State = dict[str, Float32]
"""The server's own tensors: `slot/tensor` -> values of the tensor's shape."""
Access = Literal["stream", "by_tensor"]
"""In which order a rule wants the differences: update by update, or all updates of one tensor before those of the next."""


class Accumulator(Protocol):
    """One round of a rule."""

    def add(self, name: str, difference: Float32, weight: float, scale: float = 1.0) -> None:
        """A difference counts times `scale`, with this weight."""
        ...

    def result(self, start: Mapping[str, Float32]) -> tuple[dict[str, Float32], State]:
        """The new weights of all tensors, and the state; `start` are the weights that the differences belong to."""
        ...


class Rule(Record):
    """Settings of a rule, as a plan says them; `rule` is its name there."""

    rule: str
    access: ClassVar[Access] = "stream"
    slots: ClassVar[tuple[str, ...]] = ()
    """What it keeps from round to round: for each slot a tensor of the shape of every trained tensor."""

    @property
    def gain(self) -> float:
        """How far a round may move a value at most, as a multiple of the largest difference of an update, at rate 1."""
        return 1.0

    def weight(self, num_examples: int) -> float:
        """What an update counts."""
        return float(num_examples)

    def factor(self, norm: float) -> float:
        """By how much an update of this L2 norm is scaled before it is added."""
        return 1.0

    def fault(self, rate: float) -> str | None:
        """Why this rule makes no sense with this server learning rate, and the way out."""
        return None

    @abstractmethod
    def begin(self, specs: Sequence[TensorSpec], state: Mapping[str, Float32], rate: float) -> Accumulator:
        """Of `state`, tensors that are missing begin anew."""


class MeanRule(Rule):
    """Rules that look at the weighted mean of the differences alone: one update is resident at a time."""

    def begin(self, specs: Sequence[TensorSpec], state: Mapping[str, Float32], rate: float) -> Accumulator:
        return _Means(self, specs, state, rate)

    def fresh(self, slot: str) -> float:
        """The value with which a slot begins."""
        return 0.0

    @abstractmethod
    def direction(self, mean: Float64, slots: dict[str, Float64]) -> Float64:
        """What is added to the weights, times the rate. Replaces in `slots` what the next round needs."""


class _Means:
    def __init__(self, rule: MeanRule, specs: Sequence[TensorSpec], state: Mapping[str, Float32], rate: float) -> None:
        self._rule, self._state, self._rate = rule, state, rate
        self._sums: dict[str, Float64] = {spec.name: np.zeros(spec.shape, np.float64) for spec in specs}
        self._weights = dict.fromkeys(self._sums, 0.0)

    def add(self, name: str, difference: Float32, weight: float, scale: float = 1.0) -> None:
        self._sums[name] += difference.astype(np.float64) * (scale * weight)
        self._weights[name] += weight

    def result(self, start: Mapping[str, Float32]) -> tuple[dict[str, Float32], State]:
        weights: dict[str, Float32] = {}
        state: State = {}
        for name, total in self._sums.items():
            keys = {slot: f"{slot}/{name}" for slot in self._rule.slots}
            if not self._weights[name]:
                weights[name] = start[name]
                state |= {key: self._state[key] for key in keys.values() if key in self._state}
                continue
            slots = {
                slot: self._state[key].astype(np.float64)
                if key in self._state
                else np.full(total.shape, self._rule.fresh(slot))
                for slot, key in keys.items()
            }
            direction = self._rule.direction(total / self._weights[name], slots)
            weights[name] = (start[name].astype(np.float64) + self._rate * direction).astype(np.float32)
            state |= {key: slots[slot].astype(np.float32) for slot, key in keys.items()}
        return weights, state


_BLOCK_VALUES = 1 << 16


class OrderRule(Rule):
    """Rules that look at the sorted values of each coordinate, one update like another. All updates of one tensor are resident
    at a time, in float32."""

    access: ClassVar[Access] = "by_tensor"

    def begin(self, specs: Sequence[TensorSpec], state: Mapping[str, Float32], rate: float) -> Accumulator:
        return _Sorted(self, specs, rate)

    def weight(self, num_examples: int) -> float:
        return 1.0

    @abstractmethod
    def middle(self, values: Float64) -> Float64:
        """(updates, values), ascending along the first axis -> (values,)."""


class _Sorted:
    def __init__(self, rule: OrderRule, specs: Sequence[TensorSpec], rate: float) -> None:
        self._rule, self._specs, self._rate = rule, specs, rate
        self._tensor, self._rows = "", list[Float32]()
        self._directions: dict[str, Float64] = {}

    def add(self, name: str, difference: Float32, weight: float, scale: float = 1.0) -> None:
        if name != self._tensor:
            self._reduce()
            self._tensor = name
        self._rows.append(difference if scale == 1.0 else (difference.astype(np.float64) * scale).astype(np.float32))

    def result(self, start: Mapping[str, Float32]) -> tuple[dict[str, Float32], State]:
        self._reduce()
        weights = dict(start)
        for name, direction in self._directions.items():
            weights[name] = (start[name].astype(np.float64) + self._rate * direction).astype(np.float32)
        return {spec.name: weights[spec.name] for spec in self._specs}, {}

    def _reduce(self) -> None:
        if not self._rows:
            return
        shape = self._rows[0].shape
        flat = [row.reshape(-1) for row in self._rows]
        direction = np.empty(flat[0].size, np.float64)
        for begin in range(0, direction.size, _BLOCK_VALUES):
            block = np.stack([row[begin : begin + _BLOCK_VALUES] for row in flat])
            block.sort(axis=0)
            direction[begin : begin + _BLOCK_VALUES] = self._rule.middle(block.astype(np.float64))
        self._directions[self._tensor] = direction.reshape(shape)
        self._rows = []

"""Synchronous rounds: all devices of a cohort train the same weights, and the next round begins when this one is over."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lamina.federation.influence import Counted, Size, count_within_bounds
from lamina.federation.policy import Position, draw_cohort
from lamina.federation.self_tuning import has_stalled
from lamina.plans.plan import Plan


@dataclass(frozen=True)
class SyncRounds:
    """By the plan's `cohort` and `self_tuning`."""

    plan: Plan

    def may_start(self, here: int) -> bool:
        return here >= self.plan.cohort.present

    def draw(self, names: Iterable[str], position: Position) -> list[str] | None:
        cohort = self.plan.cohort
        return None if cohort.pool is None else draw_cohort(names, cohort.size, self.plan.seed, *position)

    def may_join(self, held: int) -> bool:
        return held < self.plan.cohort.size

    def closes(self, updates: int, seconds: float) -> bool:
        cohort = self.plan.cohort
        return updates >= cohort.size or (seconds >= cohort.deadline_seconds and updates >= cohort.min_updates)

    def weight(self, sizes: Sequence[Size]) -> list[Counted]:
        return count_within_bounds(self.plan.cohort, sizes)

    def ends_stage(self, position: Position, losses: Sequence[float]) -> bool:
        if position.round + 1 >= self.plan.stages[position.stage].rounds:
            return True
        return self.plan.self_tuning is not None and has_stalled(losses, self.plan.self_tuning)

    def next(self, position: Position, losses: Sequence[float]) -> Position | None:
        if not self.ends_stage(position, losses):
            return Position(position.stage, position.round + 1)
        return Position(position.stage + 1, 0) if position.stage + 1 < len(self.plan.stages) else None

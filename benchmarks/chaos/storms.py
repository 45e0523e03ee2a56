"""Runs, one after another, until so many kills were done; each is held against the one in peace."""

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from benchmarks.chaos.disturb import Tally
from benchmarks.chaos.house import COORDINATOR
from benchmarks.chaos.left import Difference, difference
from benchmarks.chaos.plan import ENGINE, small_plan, write_data
from benchmarks.chaos.run import Bundle, Outcome, Storm, calm_run, stormy_run
from export.build import export_bundle
from lamina.plans.plan import Plan

Say = Callable[[str], None]
_TELL_SECONDS = 10.0


@dataclass
class Result:
    """`runs` has each disturbed run with its difference from the calm one, `tallies` what was done to it."""

    plan: Plan
    calm: Outcome
    runs: list[tuple[Outcome, Difference]] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)

    @property
    def kills(self) -> Counter[str]:
        return _sum(tally.kills for tally in self.tallies)

    @property
    def killed(self) -> tuple[int, int]:
        """Coordinators and devices."""
        coordinators = sum(count for what, count in self.kills.items() if what.startswith(COORDINATOR))
        return coordinators, self.kills.total() - coordinators

    @property
    def full_disks(self) -> Counter[str]:
        return _sum(tally.full_disks for tally in self.tallies)

    @property
    def clock_jumps(self) -> int:
        return sum(tally.clock_jumps for tally in self.tallies)

    @property
    def faults(self) -> Counter[str]:
        return _sum(run.faults for run, _ in self.runs)

    @property
    def ended(self) -> Counter[str]:
        return _sum(run.ended for run, _ in self.runs)

    @property
    def is_equal(self) -> bool:
        return bool(self.runs) and all(found.is_none for _, found in self.runs)


async def storms(
    folder: Path,
    kills: int,
    seed: int,
    plan: Plan | None = None,
    runs: int = 1,
    mean_bytes: float = 20_000,
    pause_seconds: float = 1.0,
    timeout_seconds: float = 900,
    with_full_disks: bool = True,
    cache: Path | None = None,
    say: Say = lambda line: None,
    on_run: Callable[["Result"], None] = lambda result: None,
) -> Result:
    """`kills` of the coordinator and as many of devices, spread over so many runs, or more if they are over too soon.

    `on_run` is called after each run with what there is. Stops after the first run that differs; its state folders stay in
    `folder`, with the logs of all. Raises LaminaError if a run does not come to its end in `timeout_seconds`.
    """
    plan = plan or small_plan(devices=3, layers=3, rounds=1)
    say(f"exporting {len(plan.stages)} stages for {ENGINE}")
    manifest = await asyncio.to_thread(export_bundle, plan, folder / "bundle", (ENGINE,), cache=cache)
    bundle = Bundle(folder / "bundle", manifest, write_data(plan, folder / "data"))
    calm = await calm_run(bundle, folder / "calm", timeout_seconds)
    result = Result(plan, calm)
    say(f"in peace: {calm.rounds} rounds, {len(calm.left.updates)} updates in {calm.seconds:.0f} s")
    while any(left := [kills - done for done in result.killed]):
        number = len(result.runs)
        tally = Tally(*(ceil(count / max(1, runs - number)) for count in left))
        place = folder / f"run-{number}"
        storm = Storm(seed * 1000 + number, mean_bytes, pause_seconds, with_full_disks)
        teller = asyncio.create_task(_tell(tally, number, say))
        try:
            outcome = await stormy_run(bundle, place, storm, tally, timeout_seconds)
        finally:
            teller.cancel()
        result.tallies.append(tally)
        found = difference(outcome.left, calm.left)
        result.runs.append((outcome, found))
        say(f"run {number}: {'byte-equal' if found.is_none else found} after {outcome.seconds:.0f} s; {_words(outcome)}")
        on_run(result)
        if not found.is_none:
            break
        for state in (place / "states").iterdir():  # the logs stay
            shutil.rmtree(state)
    return result


def _sum(counters: Iterable[Counter[str]]) -> Counter[str]:
    return sum(counters, Counter())


async def _tell(tally: Tally, number: int, say: Say) -> None:
    started = time.monotonic()
    while True:
        await asyncio.sleep(_TELL_SECONDS)
        left = f"{tally.coordinator_kills_left} + {tally.device_kills_left} kills to come"
        say(f"run {number}, {time.monotonic() - started:.0f} s: {left}, {tally.clock_jumps} clock jumps")


def _words(outcome: Outcome) -> str:
    ended = ", ".join(f"{count} x {what}" for what, count in outcome.ended.items()) or "nothing"
    return f"{outcome.faults.total()} faults on {outcome.connections} connections; ended by itself: {ended}"

"""Runs, one after another, until so many kills were done; each is held against the one in peace."""

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos.disturb import Tally
from benchmarks.chaos.left import Difference, difference
from benchmarks.chaos.plan import ENGINE, small_plan, write_data
from benchmarks.chaos.run import Bundle, Outcome, Storm, calm_run, stormy_run
from export.bundle import export_bundle
from lamina.plan import Plan

Say = Callable[[str], None]
_TELL_SECONDS = 10.0


@dataclass
class Result:
    """`runs` has each disturbed run with its difference from the calm one."""

    plan: Plan
    calm: Outcome
    tally: Tally
    runs: list[tuple[Outcome, Difference]] = field(default_factory=list)

    @property
    def faults(self) -> Counter[str]:
        return sum((run.faults or Counter() for run, _ in self.runs), Counter())

    @property
    def ended(self) -> Counter[str]:
        return sum((run.ended or Counter() for run, _ in self.runs), Counter())

    @property
    def is_equal(self) -> bool:
        return bool(self.runs) and all(found.is_none for _, found in self.runs)


async def storms(
    folder: Path,
    kills: int,
    seed: int,
    plan: Plan | None = None,
    mean_bytes: float = 20_000,
    pause_seconds: float = 1.0,
    timeout_seconds: float = 900,
    with_full_disks: bool = True,
    cache: Path | None = None,
    say: Say = lambda line: None,
) -> Result:
    """`kills` of the coordinator and as many of devices, over as many runs as that takes; logs stay in `folder`.

    Stops after the first run that differs. Raises LaminaError if a run does not come to its end in `timeout_seconds`.
    """
    plan = plan or small_plan(devices=4, layers=3, rounds=2)
    say(f"exporting {len(plan.stages)} stages for {ENGINE}")
    manifest = await asyncio.to_thread(export_bundle, plan, folder / "bundle", (ENGINE,), cache=cache)
    bundle = Bundle(folder / "bundle", manifest, write_data(plan, folder / "data"))
    calm = await calm_run(bundle, folder / "calm", timeout_seconds)
    result = Result(plan, calm, Tally(kills, kills))
    say(f"in peace: {calm.rounds} rounds, {len(calm.left.updates)} updates in {calm.seconds:.0f} s")
    while not result.tally.is_done:
        number = len(result.runs)
        place = folder / f"run-{number}"
        storm = Storm(seed * 1000 + number, mean_bytes, pause_seconds, with_full_disks)
        teller = asyncio.create_task(_tell(result.tally, number, say))
        try:
            outcome = await stormy_run(bundle, place, storm, result.tally, timeout_seconds)
        finally:
            teller.cancel()
        found = difference(outcome.left, calm.left)
        result.runs.append((outcome, found))
        say(f"run {number}: {'byte-equal' if found.is_none else found} after {outcome.seconds:.0f} s; {_words(outcome)}")
        if not found.is_none:
            break
        for state in (place / "states").iterdir():  # the logs stay
            shutil.rmtree(state)
    return result


async def _tell(tally: Tally, number: int, say: Say) -> None:
    started = time.monotonic()
    while True:
        await asyncio.sleep(_TELL_SECONDS)
        left = f"{tally.coordinator_kills_left} + {tally.device_kills_left} kills to come"
        say(f"run {number}, {time.monotonic() - started:.0f} s: {left}, {tally.clock_jumps} clock jumps")


def _words(outcome: Outcome) -> str:
    ended = ", ".join(f"{count} x {what}" for what, count in (outcome.ended or {}).items()) or "nothing"
    return f"{sum((outcome.faults or {}).values())} faults on {outcome.connections} connections; ended by itself: {ended}"

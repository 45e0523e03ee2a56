"""Does anything get lost, or count twice, when everything around a run fails?

Question   Final weights and accepted updates of a small run whose coordinator and devices are killed, whose connections are
           cut, truncated, delayed and bit-flipped in both directions, whose disks are full and whose clock jumps, against
           those of the same run in peace.
Method     Real processes (`lamina join`, the coordinator of `lamina serve`) on loopback, with a relay in between that does
           the damage; kills are SIGKILL, at any time and at instants that are worth one (benchmarks/chaos/moments.py). Each
           run begins with new devices, so that enrolment is disturbed as well. What ends is started again with the same
           command. Equal: the bytes of every segment's weights, and every (stage, round, device) with its update's values,
           once.
Not shown  Power loss (files that were written but not synced stay here); TLS, under which a flipped bit ends the connection.

    python -m benchmarks.chaos [--kills 100] [--runs 5] [--seed 0] [--out FILE] [--folder FOLDER]
    python -m benchmarks.chaos --kills 5 --runs 1 --out ""     a short one; writes no results

Full disks need the right to mount a tmpfs; without it that part is left out, and the result says so. Status 1 if anything
differs; the folder then has the states and the logs.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.chaos.storms import Result, storms
from benchmarks.results_file import write_results
from lamina.bundles.keys import VARIABLE
from lamina.errors import LaminaError


def rows_of(result: Result) -> list[dict[str, Any]]:
    return [
        {
            "run": number,
            "seconds": round(run.seconds, 1),
            "updates": len(run.left.updates),
            "lost": len(found.lost),
            "double": len(found.double),
            "other": len(found.other),
            "segments_that_differ": len(found.segments),
            "devices_enrolled_twice": found.devices,
            "connections": run.connections,
            "faults": dict(sorted(run.faults.items())),
            "ended_by_themselves": dict(sorted(run.ended.items())),
        }
        for number, (run, found) in enumerate(result.runs)
    ]


def facts_of(result: Result, seed: int) -> dict[str, Any]:
    plan = result.plan
    return {
        "seed": seed,
        "plan": {"stages": len(plan.stages), "rounds": result.calm.rounds, "devices": plan.cohort.size},
        "updates_of_a_run": len(result.calm.left.updates),
        "byte_equal": result.is_equal,
        "lost": sum(len(found.lost) for _, found in result.runs),
        "double": sum(len(found.double) for _, found in result.runs),
        "kills": dict(sorted(result.kills.items())),
        "faults": dict(sorted(result.faults.items())),
        "full_disks": dict(result.full_disks) or next((run.no_disks for run, _ in result.runs), ""),
        "clock_jumps": result.clock_jumps,
        "ended_by_themselves": dict(sorted(result.ended.items())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills of the coordinator, and as many of devices")
    parser.add_argument("--runs", type=int, default=5, help="over so many runs, each with new devices")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="chaos", help="name in benchmarks/results, written after each run; empty: none")
    parser.add_argument("--folder", type=Path, help="keep bundle, states and logs there (default: a temporary folder)")
    options = parser.parse_args()

    def write(result: Result) -> None:
        if options.out:
            write_results(options.out, "make chaos", rows_of(result), **facts_of(result, options.seed))

    with TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[VARIABLE] = str(folder / "keys")  # the user's own keys are left alone
        work = storms(folder, options.kills, options.seed, runs=options.runs, say=_say, on_run=write)
        try:
            result = asyncio.run(_until_told(work))
        except LaminaError as error:
            _say(error.message)
            return 1
        except (asyncio.CancelledError, KeyboardInterrupt):
            _say("stopped before the end")
            return 130
    facts = facts_of(result, options.seed)
    _say(f"{facts['lost']} lost, {facts['double']} double, {'byte-equal' if result.is_equal else 'NOT EQUAL'}")
    return 0 if result.is_equal else 1


async def _until_told(work: Coroutine[Any, Any, Result]) -> Result:
    """SIGTERM ends it as Ctrl-C does: with all of its processes, and nothing mounted."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

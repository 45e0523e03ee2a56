"""Measuring: every prepared case in a fresh process, one after the other, into one result."""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.demo.report import versions
from benchmarks.device.cases import CASES, BenchBundle, PreparedCase
from benchmarks.device.machine import machine
from benchmarks.device.power import Sensors
from benchmarks.device.results import MemoryResult, Row
from benchmarks.device.watch import Watched, watch

FLOAT_BYTES = 4
MOMENTS = {"sgd": 1, "adamw": 2}
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
Watch = Callable[..., Watched]


@dataclass(frozen=True)
class Settings:
    """How every case of a run is measured. `tegrastats` is the program, None for the one on the path."""

    steps: int
    optimizers: tuple[str, ...]
    is_cuda: bool = False
    tegrastats: str | None = None


def measure(
    bundle: BenchBundle,
    folder: Path,
    cases: Sequence[PreparedCase],
    settings: Settings,
    command: str,
    on_row: Callable[[MemoryResult], None] = lambda result: None,
    on_progress: Callable[[str], None] = lambda text: None,
    watch_case: Watch = watch,
) -> MemoryResult:
    """Runs the cases with each optimiser. `on_row` is called with what is known so far, after every row."""
    result = MemoryResult(
        command=command, machine=machine(), versions=versions(), prepared=bundle.versions, sensors="", rows=()
    )
    with Sensors(settings.tegrastats) as sensors, TemporaryDirectory(prefix="lamina-bench-") as scratch:
        for case in cases:
            for optimizer in settings.optimizers:
                row = _row(case, optimizer, settings, folder, Path(scratch), sensors, on_progress, watch_case)
                result = result.model_copy(update={"rows": (*result.rows, row), "sensors": sensors.notes})
                on_row(result)
    return result


def _row(
    case: PreparedCase,
    optimizer: str,
    settings: Settings,
    folder: Path,
    scratch: Path,
    sensors: Sensors,
    on_progress: Callable[[str], None],
    watch_case: Watch,
) -> Row:
    row = Row(
        workload=case.workload,
        side=case.side,
        case=case.case,
        optimizer=optimizer,
        batch=case.batch,
        micro_batch=case.micro_batch,
        block=case.block,
        status="not run",
        planned_bytes=planned_bytes(case, optimizer),
    )
    reason = case.unavailable or lacking(case)
    if reason:
        return row.model_copy(update={"detail": reason})
    with TemporaryDirectory(dir=scratch) as data:
        kind = CASES[case.case]
        spec = case.model_dump() | {
            "optimizer": optimizer,
            "steps": settings.steps,
            "window_seconds": sensors.window_seconds,
            "is_cuda": settings.is_cuda,
            "on_disk": kind.on_disk,
            "prefix": kind.prefix,
            "folder": str(folder.resolve()),
            "scratch": data,
        }
        path = scratch / "case.json"
        path.write_text(json.dumps(spec))

        def show(watched: Watched) -> None:
            done = watched.last("step").get("done", 0)
            peak = watched.peak_rss_bytes / 2**20
            on_progress(f"{case.label()}, {optimizer}: step {done} of {settings.steps}, {peak:.0f} MiB so far")

        watched = watch_case([sys.executable, "-m", "benchmarks.device.case", str(path)], _ENVIRONMENT, show)
    return row.model_copy(update=_measured(watched, sensors))


def _measured(watched: Watched, sensors: Sensors) -> dict[str, Any]:
    """What a watched process gives to its row; a process that did not finish gives what was seen of it."""
    facts: dict[str, Any] = {
        "status": watched.status,
        "detail": watched.detail,
        "peak_rss_bytes": watched.peak_rss_bytes or None,
        "peak_pss_bytes": watched.peak_pss_bytes,
        "memory_bytes": {e["at"]: e["bytes"] for e in watched.events if e["event"] == "memory" and e["bytes"]},
    }
    load = sensors.load(watched.begin, watched.end)
    if load is not None:
        facts |= {
            "ram_before_bytes": load.ram_before_bytes,
            "ram_peak_bytes": load.ram_peak_bytes,
            "gpu_load_mean": load.gpu_load_mean,
            "gpu_load_peak": load.gpu_load_peak,
        }
    cuda, fill, end = watched.last("cuda"), watched.last("fill"), watched.last("end")
    facts |= {
        "cuda_peak_bytes": cuda.get("peak_bytes"),
        "gpu": cuda.get("name"),
        "fill_cpu_seconds": fill.get("cpu_seconds"),
    }
    if not end:
        lost = watched.detail or "the process ended without a result"
        return facts | {"status": "failed" if watched.status == "ok" else watched.status, "detail": lost}
    steps = len(end["cpu_seconds"])
    energy = sensors.energy(end["begin"], end["end"])
    peaks = [value for value in (end["peak_rss_bytes"], watched.peak_rss_bytes) if value]
    return facts | {
        "steps": steps,
        "peak_rss_bytes": max(peaks, default=None),
        "cpu_seconds_per_step": statistics.median(end["cpu_seconds"]),
        "wall_seconds_per_step": (end["end"] - end["begin"]) / steps,
        "joules_per_step": energy.joules / steps if energy.joules is not None else None,
        "energy_source": energy.source,
        "energy_reason": energy.reason,
    }


def planned_bytes(case: PreparedCase, optimizer: str) -> int | None:
    """Weights, gradients and moments as float32, and the values between them for what is in memory at a time."""
    if case.planned_activation_bytes is None:
        return None
    counts = [prod(shape) for shape in case.weights]
    trained = sum(count for count, flag in zip(counts, case.is_trained, strict=True) if flag)
    return FLOAT_BYTES * (sum(counts) + trained * (1 + MOMENTS[optimizer])) + case.planned_activation_bytes


def lacking(case: PreparedCase) -> str | None:
    """Why this machine cannot run the case. Engines say it themselves, when they are loaded."""
    if case.side == "eager" and find_spec("torch") is None:
        return "torch is not installed here"
    return None

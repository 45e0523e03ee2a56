"""Energy: from a Jetson's power rails or from the processor's RAPL counters, whichever this machine has.

Both count the whole module or package, idle current and other programs included; on a quiet machine that is the training.
"""

import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.device.tegrastats import INTERVAL_MILLISECONDS, Tegrastats, find_tegrastats

POWERCAP = Path("/sys/class/powercap")
RAPL_SECONDS = 0.05
WINDOW_SECONDS = 2.0
"""Measured steps are repeated for so long where there is a sensor: a shorter window holds too few of its samples."""


@dataclass(frozen=True)
class Energy:
    """Joules of a span of time, or the reason why there are none. `source` names sensor and rails."""

    joules: float | None
    source: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Load:
    """What tegrastats saw of the whole machine in a span of time; loads are fractions in [0, 1]."""

    ram_peak_bytes: int
    ram_before_bytes: int
    gpu_load_mean: float | None
    gpu_load_peak: float | None


def integrate(points: Sequence[tuple[float, float]]) -> float:
    """Trapezoids under (seconds, watts): joules."""
    return sum((b - a) * (p + q) / 2 for (a, p), (b, q) in pairwise(points))


class Sensors:
    """The sensors of this machine, read for the length of the block. What is missing is told by `notes`, never raised."""

    def __init__(self, tegrastats: str | None = None, powercap: Path = POWERCAP) -> None:
        self._chosen, self._powercap = tegrastats, powercap
        self._tegra: Tegrastats | None = None
        self._rapl: Rapl | None = None
        self._reason = ""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        program = find_tegrastats(self._chosen)
        if program is not None:
            self._tegra = self._stack.enter_context(Tegrastats(program))
            if self._tegra.problem is None:
                return self
            self._reason = self._tegra.problem
            self._tegra = None
        elif self._chosen:
            self._reason = f"there is no program {self._chosen!r}"
        zones, problem = find_zones(self._powercap)
        if zones:
            self._rapl = self._stack.enter_context(Rapl(zones))
        else:
            self._reason = "; ".join(filter(None, (self._reason, problem)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    @property
    def notes(self) -> str:
        """A sentence for the user: what is read, or why nothing is."""
        if self._tegra is not None:
            return "energy, RAM and GPU load from tegrastats" + (f"; {self._tegra.problem}" if self._tegra.problem else "")
        if self._rapl is not None:
            return f"energy from RAPL ({self._rapl.source})" + (f"; {self._reason}" if self._reason else "")
        return f"no energy: {self._reason}"

    @property
    def window_seconds(self) -> float:
        return WINDOW_SECONDS if self._tegra is not None or self._rapl is not None else 0.0

    def energy(self, begin: float, end: float) -> Energy:
        """Energy between two moments of `time.monotonic()`."""
        if self._rapl is not None:
            return Energy(self._rapl.joules(begin, end), self._rapl.source)
        if self._tegra is None:
            return Energy(None, reason=self._reason)
        samples = self._tegra.between(begin, end)
        # Of one set of rails, though a line may lack one: a board for a moment and its parts for another make no integral.
        seen = Counter(sample.whole_rails for _, sample in samples if sample.rails)
        rails = max(seen, key=lambda rails: (seen[rails], -len(rails)), default=())
        points = [(at, sample.watts_of(rails)) for at, sample in samples]
        known = [(at, watts) for at, watts in points if watts is not None]
        if len(known) < 2:
            if self._tegra.problem:
                return Energy(None, reason=self._tegra.problem)
            if points:
                return Energy(None, reason="tegrastats reports no power rails here")
            return Energy(None, reason=f"{end - begin:.2f} s is too short for samples every {INTERVAL_MILLISECONDS} ms")
        # The samples do not reach to the ends of the window: the mean power of what they span stands for all of it.
        watts = integrate(known) / (known[-1][0] - known[0][0])
        return Energy(watts * (end - begin), f"tegrastats {' + '.join(rails)}")

    def load(self, begin: float, end: float) -> Load | None:
        """What tegrastats saw between two moments; None without it."""
        if self._tegra is None:
            return None
        samples = [sample for _, sample in self._tegra.between(begin, end)]
        if not samples:
            return None
        before = [sample for at, sample in list(self._tegra.samples) if at <= begin][-1:] or samples[:1]
        gpu = [sample.gpu_load for sample in samples if sample.gpu_load is not None]
        return Load(
            ram_peak_bytes=max(sample.ram_used_bytes for sample in samples),
            ram_before_bytes=before[0].ram_used_bytes,
            gpu_load_mean=sum(gpu) / len(gpu) if gpu else None,
            gpu_load_peak=max(gpu, default=None),
        )


@dataclass(frozen=True)
class Zone:
    """A RAPL counter: microjoules that start again at 0 after `range_microjoules`."""

    name: str
    counter: Path
    range_microjoules: int


def find_zones(folder: Path = POWERCAP) -> tuple[list[Zone], str]:
    """The packages and their memory controllers, and, if there are none, why.

    Cores and integrated graphics are part of the package; `psys` and the `mmio` twins count the same energy again.
    """
    zones, refused = [], ""
    for path in sorted(folder.glob("intel-rapl:*")) if folder.is_dir() else []:
        try:
            name = (path / "name").read_text().strip()
            if not name.startswith(("package", "dram")):
                continue
            int((path / "energy_uj").read_text())
            zones.append(Zone(name, path / "energy_uj", int((path / "max_energy_range_uj").read_text())))
        except PermissionError:
            refused = f"{path}/energy_uj can be read by root only: use sudo, or `sudo chmod a+r` it until the next start"
        except (OSError, ValueError):
            continue
    if zones:
        return zones, ""
    return [], refused or "this machine has neither tegrastats nor RAPL counters (/sys/class/powercap)"


class Rapl:
    """Reads the zones all the time, often enough to notice that a counter has started again."""

    def __init__(self, zones: Sequence[Zone], seconds: float = RAPL_SECONDS) -> None:
        self._zones, self._seconds = zones, seconds
        self._last = [0] * len(zones)
        self._total = 0.0
        self._times: list[float] = []
        self._joules: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def source(self) -> str:
        return "RAPL " + " + ".join(zone.name for zone in self._zones)

    def __enter__(self) -> Self:
        self._last = [_read(zone) or 0 for zone in self._zones]
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def joules(self, begin: float, end: float) -> float:
        """Between two moments; waits for the sample after the second."""
        while self._times[-1] < end and self._thread.is_alive():
            time.sleep(self._seconds / 5)
        return self._at(end) - self._at(begin)

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self._sample()

    def _sample(self) -> None:
        for index, zone in enumerate(self._zones):
            value = _read(zone)
            if value is not None:
                step = value - self._last[index]
                self._total += (step if step >= 0 else step + zone.range_microjoules) / 1e6
                self._last[index] = value
        self._joules.append(self._total)
        self._times.append(time.monotonic())

    def _at(self, moment: float) -> float:
        """The running total at a moment, straight between the samples beside it."""
        after = bisect_right(self._times, moment)
        if after == 0 or after >= len(self._times):
            return self._joules[0 if after == 0 else -1]
        a, b = self._times[after - 1], self._times[after]
        share = (moment - a) / (b - a) if b > a else 0.0
        return self._joules[after - 1] + share * (self._joules[after] - self._joules[after - 1])


def _read(zone: Zone) -> int | None:
    try:
        return int(zone.counter.read_text())
    except (OSError, ValueError):
        return None

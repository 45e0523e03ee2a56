"""tegrastats, the statistics that every NVIDIA Jetson prints: a parser of one line, and a sampler around the program.

The line has changed with every generation (`tests/benchmarks/test_tegrastats.py` holds recorded ones), so fields are looked
for one by one, wherever they stand; what is not known is passed over.
"""

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

INTERVAL_MILLISECONDS = 100
FIRST_LINE_SECONDS = 3.0
GARBAGE_LINES = 10  # so many lines without a single statistic: this is not tegrastats

_UNITS = {"kB": 2**10, "MB": 2**20, "GB": 2**30}
_RAM = re.compile(r"(?<!\w)RAM (\d+)/(\d+)(kB|MB|GB)")
_SWAP = re.compile(r"(?<!\w)SWAP (\d+)/(\d+)(kB|MB|GB)")
_CPU = re.compile(r"(?<!\w)cpu \[([^\]]*)\]", re.IGNORECASE)
_GPU = re.compile(r"(?<!\w)GR3D(?:_FREQ)? (\d+)%")
_TEMPERATURE = re.compile(r"(?<!\S)(\w+)@(-?\d+(?:\.\d+)?)C(?!\S)")
# `NAME 900/943` (old), `NAME 900mW/943mW` (since L4T 32.6) or `NAME 900mW`; never `RAM 613/3964MB`.
# A sensor of no current may read a little below zero.
_RAIL = re.compile(r"(?<!\S)([A-Za-z]\w*) (-?\d+)(?:(?:mW)?/(-?\d+)(?:mW)?|mW)(?!\S)")
_POWERED_OFF_CELSIUS = -256.0
_NOT_CONNECTED = "NC"

# The rail that feeds the whole module, or, as VIN of AGX Thor, the whole board; the others are parts of it.
_WHOLE = ("VDD_IN", "POM_5V_IN", "VIN")
# AGX Orin has none. Its memory's rail is fed by VIN_SYS_5V0, so adding it would count it twice.
_FED_BY_ANOTHER = {"VDDQ_VDD2_1V8AO": "VIN_SYS_5V0"}


@dataclass(frozen=True)
class Rail:
    """Power of one rail now, and its average since tegrastats was started."""

    milliwatts: int
    average_milliwatts: int | None


@dataclass(frozen=True)
class TegraSample:
    """One line. RAM is that of the whole machine; a load is a fraction in [0, 1], None for a core that is off."""

    ram_used_bytes: int
    ram_total_bytes: int
    swap_used_bytes: int | None = None
    swap_total_bytes: int | None = None
    cpu_loads: tuple[float | None, ...] = ()
    gpu_load: float | None = None
    temperatures_celsius: dict[str, float] = field(default_factory=dict)
    rails: dict[str, Rail] = field(default_factory=dict)

    @property
    def whole_rails(self) -> tuple[str, ...]:
        """The rails whose sum is the power of the whole module, or of the board where that is measured; empty if none are
        reported."""
        for name in _WHOLE:
            if name in self.rails:
                return (name,)
        return tuple(name for name in self.rails if _FED_BY_ANOTHER.get(name) not in self.rails)

    @property
    def watts(self) -> float | None:
        """Power of the `whole_rails`."""
        return self.watts_of(self.whole_rails)

    def watts_of(self, rails: Sequence[str]) -> float | None:
        """The sum of these rails; None if one of them is not in the line, or if there are none."""
        if not rails or not set(rails) <= self.rails.keys():
            return None
        return sum(self.rails[name].milliwatts for name in rails) / 1000


def parse_line(line: str) -> TegraSample | None:
    """The statistics of one line; None if it has no RAM, which every generation prints."""
    ram = _RAM.search(line)
    if ram is None:
        return None
    swap, cpu, gpu = _SWAP.search(line), _CPU.search(line), _GPU.search(line)
    return TegraSample(
        ram_used_bytes=int(ram[1]) * _UNITS[ram[3]],
        ram_total_bytes=int(ram[2]) * _UNITS[ram[3]],
        swap_used_bytes=int(swap[1]) * _UNITS[swap[3]] if swap else None,
        swap_total_bytes=int(swap[2]) * _UNITS[swap[3]] if swap else None,
        cpu_loads=tuple(_load(core) for core in cpu[1].split(",")) if cpu else (),
        gpu_load=int(gpu[1]) / 100 if gpu else None,
        temperatures_celsius={
            name: float(value) for name, value in _TEMPERATURE.findall(line) if float(value) != _POWERED_OFF_CELSIUS
        },
        rails={
            name: Rail(int(now), int(average) if average else None)
            for name, now, average in _RAIL.findall(line)
            if name != _NOT_CONNECTED
        },
    )


def _load(core: str) -> float | None:
    """`12%@1190`, `12%` or `off`."""
    found = re.match(r"\s*(\d+)%", core)
    return int(found[1]) / 100 if found else None


def find_tegrastats(chosen: str | None = None) -> str | None:
    """Path of the program: the given one, else $TEGRASTATS, else the one on the path; None if there is none."""
    return shutil.which(chosen or os.environ.get("TEGRASTATS") or "tegrastats")


class Tegrastats:
    """Runs tegrastats for the length of the block and keeps what it printed as (monotonic seconds, sample).

    Whatever is wrong with the program ends up in `problem` as a sentence; nothing is ever raised.
    """

    def __init__(self, program: str | Path, interval_milliseconds: int = INTERVAL_MILLISECONDS) -> None:
        self._command = [str(program), "--interval", str(interval_milliseconds)]
        self.samples: list[tuple[float, TegraSample]] = []
        self.problem: str | None = None
        self._process: subprocess.Popen[str] | None = None
        self._heard = threading.Event()
        self._ending = False

    def __enter__(self) -> Self:
        name = self._command[0]
        try:
            # A session of its own: the program may be a script, and its children must end with it. Should this process be
            # killed, tegrastats loses the reader of its output, and its next line ends it.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            self.problem = f"{name} cannot be started: {error.strerror or error}"
            return self
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._heard.wait(FIRST_LINE_SECONDS):
            self.problem = f"{name} printed nothing for {FIRST_LINE_SECONDS:.0f} s"
        if self.problem:
            self._end()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def between(self, begin: float, end: float) -> list[tuple[float, TegraSample]]:
        return [(at, sample) for at, sample in list(self.samples) if begin <= at <= end]

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        name, strange, last = self._command[0], 0, ""
        for line in self._process.stdout:
            sample = parse_line(line)
            if sample is not None:
                self.samples.append((time.monotonic(), sample))
                self._heard.set()
                continue
            strange, last = strange + 1, line.strip()[:80]
            if strange >= GARBAGE_LINES and not self.samples:
                self.problem = f"{name} does not print what tegrastats prints, but {last!r}"
                self._heard.set()
                return
        if not self._ending and self.problem is None:
            status = self._process.wait()
            self.problem = f"{name} ended by itself with status {status}" + (f", saying {last!r}" if last else "")
        self._heard.set()

    def _end(self) -> None:
        self._ending = True
        if self._process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)  # the group may live on when its first process has ended
            except ProcessLookupError:
                break
            try:
                self._process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                continue
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

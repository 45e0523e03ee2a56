"""A process seen from outside: its peaks while it runs, what it said, and how it ended.

Whatever happens to the process, even if the kernel kills it, ends up as a status and a sentence.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import IO, Any, Literal

from benchmarks.device.case import FAILED
from benchmarks.device.kernel import oom_kills, peak_rss_bytes, pss_bytes

SAMPLE_SECONDS = 0.02
# Reading PSS makes the kernel walk over all pages of the process while it holds the lock of its memory map. The pause after
# a reading is this many times as long as the reading took, so that a large process is not slowed down by being watched.
PAUSE_PER_READING = 10
TIMEOUT_SECONDS = 3600.0

Status = Literal["ok", "failed", "killed", "crashed", "not run"]
_CRASHES = {"SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP", "SIGSYS"}


@dataclass
class Watched:
    """`events` are the objects that the process printed; the peaks are the largest values that were seen from outside."""

    status: Status = "ok"
    detail: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    peak_rss_bytes: int = 0
    peak_pss_bytes: int | None = None
    begin: float = 0.0
    end: float = 0.0

    def last(self, event: str) -> dict[str, Any]:
        """The last event of this name; empty if there was none."""
        return next((found for found in reversed(self.events) if found["event"] == event), {})


def watch(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    on_sample: Callable[[Watched], None] = lambda watched: None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Watched:
    """Runs the command to its end. `on_sample` is called about every 20 ms. The process never outlives this function."""
    watched = Watched(begin=time.monotonic())
    kills = oom_kills()
    with TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        reader = threading.Thread(target=_read_events, args=(process, watched.events), daemon=True)
        reader.start()
        try:
            is_late = _sample_until_end(process, watched, on_sample, watched.begin + timeout_seconds)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            reader.join()
            assert process.stdout is not None
            process.stdout.close()
        watched.end = time.monotonic()
        if is_late:
            watched.status, watched.detail = "killed", f"ended by lamina: it took longer than {timeout_seconds:.0f} s"
        else:
            watched.status, watched.detail = describe_end(
                process.returncode, watched.last("error").get("detail", ""), _last_words(errors), oom_kills() > kills
            )
    return watched


def describe_end(returncode: int, said: str, last_words: str, is_oom_kill: bool) -> tuple[Status, str]:
    """How a process ended: `said` is its own explanation, `last_words` the end of its stderr."""
    if returncode == 0:
        return "ok", ""
    if returncode < 0:
        name = signal.Signals(-returncode).name
        if name == "SIGKILL":
            who = (
                "the kernel's out-of-memory killer ended it"
                if is_oom_kill
                else "ended by SIGKILL: by hand, or by a memory limit (of a container, or an out-of-memory service)"
            )
            return "killed", who
        if name in _CRASHES:
            return "crashed", f"crashed in native code with {name}" + (f": {last_words}" if last_words else "")
        return "killed", f"ended by {name}"
    if returncode == FAILED and said:
        return "failed", said
    return "failed", f"ended with status {returncode}" + (f": {last_words}" if last_words else "")


def _sample_until_end(
    process: subprocess.Popen[str], watched: Watched, on_sample: Callable[[Watched], None], deadline: float
) -> bool:
    """Whether the process was still running at the deadline."""
    while process.poll() is None:
        start = time.monotonic()
        if start > deadline:
            return True
        watched.peak_rss_bytes = max(watched.peak_rss_bytes, peak_rss_bytes(process.pid) or 0)
        pss = pss_bytes(process.pid)
        if pss is not None:
            watched.peak_pss_bytes = max(watched.peak_pss_bytes or 0, pss)
        on_sample(watched)
        pause = max(SAMPLE_SECONDS, PAUSE_PER_READING * (time.monotonic() - start))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=pause)
    return False


def _read_events(process: subprocess.Popen[str], events: list[dict[str, Any]]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        with contextlib.suppress(json.JSONDecodeError):  # a line that was cut when the process ended
            found = json.loads(line)
            if isinstance(found, dict) and "event" in found:
                events.append(found)


def _last_words(errors: IO[bytes]) -> str:
    """The last line of stderr."""
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else ""

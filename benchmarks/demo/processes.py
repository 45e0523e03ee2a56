"""Child processes of a demo or a benchmark: started with a log file each, ended together, and never left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from lamina.errors import LaminaError

_STATUS = 128 + signal.SIGTERM


class Processes:
    """`lamina` commands running in the background; leaving the block ends those that it started and no others.

    SIGTERM leaves the block too: within it, the main thread takes the signal as SystemExit, with the status 143 that a shell
    gives to a process ended so. A block in another thread cannot change what signals do, and leaves them as they are.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._takes_signals = False
        self._handler_before: Any = None
        self._is_starting = False
        self._must_leave = False
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Runs `lamina <arguments>` with one thread for arithmetic, its output in `<logs>/<name>.log`."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.log(name).open("wb") as log:
            # SIGTERM waits until the process is in the list of those to end.
            self._is_starting = True
            try:
                self._running[name] = subprocess.Popen(
                    [sys.executable, "-m", "lamina.cli.main", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
            finally:
                self._is_starting = False
        if self._must_leave:
            raise SystemExit(_STATUS)

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def check(self) -> None:
        """Raises LaminaError with the last words of the first process that has ended by itself."""
        for name, process in self._running.items():
            if process.poll() is not None:
                words = self.log(name).read_text(errors="replace").strip().splitlines()[-5:]
                raise LaminaError(f"{name} ended with status {process.returncode}: {' / '.join(words) or 'no output'}")

    def wait_for_file(self, path: Path, timeout_seconds: float) -> str:
        """The text of a file that a process is about to write. Raises LaminaError if it does not come in time."""
        end = time.monotonic() + timeout_seconds
        while time.monotonic() < end:
            self.check()
            if path.exists() and (text := path.read_text().strip()):
                return text
            time.sleep(0.05)
        raise LaminaError(f"{path} did not appear within {timeout_seconds:.0f} s; see the logs in {self._logs}")

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._takes_signals = True
            self._handler_before = signal.signal(signal.SIGTERM, self._leave)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._takes_signals:
            self._end_all()
            return
        # A second SIGTERM would otherwise interrupt the ending itself, and leave children behind after all.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            self._end_all()
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._handler_before is None else self._handler_before)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        self._must_leave = True
        if not self._is_starting:
            raise SystemExit(_STATUS)

    def _end_all(self) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._running.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

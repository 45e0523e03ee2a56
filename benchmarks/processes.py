"""Child processes of a demo or a benchmark: started with a log file each, ended together, and never left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from lamina.errors import LaminaError


class Processes:
    """`lamina` commands running in the background; leaving the block ends those that it started and no others."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Runs `lamina <arguments>` with one thread for arithmetic, its output in `<logs>/<name>.log`."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.log(name).open("wb") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", "lamina.cli.main", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

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
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._running.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

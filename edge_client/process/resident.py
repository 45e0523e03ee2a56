"""A training process that stays between jobs: rounds start a second sooner, and the device holds two processes at a time.

It is a process of its own all the same: when it dies, that is a failed attempt, and the next job gets a new one.
"""

import os
import subprocess
import sys
from pathlib import Path

from edge_client.process.outcome import write_outcome
from edge_client.process.supervisor import PARENT, STORE_STATUS, describe


class ResidentTrainer:
    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def do_job(self, work: Path) -> bool:
        """True when the job in this folder has an outcome, be it that the process died; False if the disk took none."""
        if self._process is None:
            command = [sys.executable, "-P", "-m", "edge_client.train.trainer", "--serve"]
            own = {**os.environ, PARENT: str(os.getpid())}
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own)
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(f"{work}\n")
            self._process.stdin.flush()
            is_done = bool(self._process.stdout.readline())
        except BrokenPipeError:  # it died between two jobs
            is_done = False
        if not is_done:
            status = self._process.wait()
            self._process = None
            if status == STORE_STATUS:
                return False
            write_outcome(work, "died", how=describe(status))
        return True

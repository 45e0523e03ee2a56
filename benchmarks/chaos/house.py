"""The processes of one run. Whatever ends is started again with the same command, as somebody who looks after it would do."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Literal

from benchmarks.chaos.plan import ENGINE
from lamina.errors import LaminaError
from lamina.files import write_durably

Part = Literal["supervisor", "talker", "trainer"]
"""The processes of a device. Talker and trainer are children of the supervisor; a resident trainer is one of the talker."""
COORDINATOR = "coordinator"
_MODULES: dict[Part, bytes] = {"talker": b"edge_client.talk.device", "trainer": b"edge_client.train.trainer"}
_SAID_ERROR = re.compile(r"error \[([a-z-]+)\]")
_START_SECONDS = 60
_PAUSE_SECONDS = 0.5  # at most, before something that ended is started again


class House:
    """One coordinator and its devices, each with an address for it in `urls`.

    All devices but the first are resident ones, with fewer processes to start: results must not tell.

    `states` are the state folders by name: `coordinator`, `device-0` and so on; logs lie in `folder`.
    """

    def __init__(self, folder: Path, states: dict[str, Path], data: list[Path], seed: int) -> None:
        self.folder, self.states, self._data = folder, states, data
        self.devices = [f"device-{index}" for index in range(len(data))]
        self.clock_offset = folder / "clock-offset"
        self.urls: dict[str, str] = {}
        self.port = 0
        self.ended: Counter[str] = Counter()
        """Processes that ended without having been killed, as `<who>: <error code, or the exit status>`."""
        self._random = Random(f"{seed} house")
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._killed: set[int] = set()
        self._keepers: list[asyncio.Task[None]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.set_clock(0)

    @property
    def state(self) -> Path:
        return self.states[COORDINATOR]

    @property
    def url(self) -> str:
        """The coordinator's own address, without anything in between."""
        return f"http://127.0.0.1:{self.port}"

    def set_clock(self, offset_seconds: float) -> None:
        """What the coordinator's wall clock is ahead of the real one."""
        write_durably(self.clock_offset, str(offset_seconds).encode())

    async def start_coordinator(self) -> None:
        """Returns when it listens; from then on its port stays the same, and it is started again whenever it ends."""
        address = self.state / "address"
        self._start(COORDINATOR)
        async with asyncio.timeout(_START_SECONDS):
            while not (address.exists() and (url := address.read_text().strip())):
                if self._running[COORDINATOR].poll() is not None:
                    raise LaminaError(f"the coordinator does not start: {self.last_words(COORDINATOR)}")
                await asyncio.sleep(0.02)
        self.port = int(url.rpartition(":")[2])
        self._keepers.append(asyncio.create_task(self._keep(COORDINATOR)))

    def start_devices(self) -> None:
        for name in self.devices:
            self._start(name)
            self._keepers.append(asyncio.create_task(self._keep(name)))

    def kill_coordinator(self) -> bool:
        """False if it does not run at this moment."""
        process = self._running[COORDINATOR]
        return process.poll() is None and self._kill(process.pid)

    def kill_device(self, name: str, part: Part) -> bool:
        """False if the device has no such process at this moment."""
        process = self._running[name]
        if process.poll() is not None:
            return False
        if part == "supervisor":
            return self._kill(process.pid)
        return any([self._kill(child) for child in _descendants(process.pid) if _runs(child, _MODULES[part])])

    def is_enrolled(self, name: str) -> bool:
        """The device knows that it is: its identity file, which is made before it asks, has the coordinator's answer."""
        try:
            return bool(json.loads((self.states[name] / "identity.json").read_bytes()).get("device_id"))
        except (OSError, ValueError):
            return False

    def last_words(self, name: str) -> str:
        return " / ".join(self.log(name).strip().splitlines()[-3:])

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    async def close(self) -> None:
        """Ends everything; the coordinator last and regularly, so that its database is whole in one file."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for name in reversed(list(self._running)):
            process = self._running[name]
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(process.wait, 15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            with suppress(ProcessLookupError):  # what is left of the session that this process was the first of
                os.killpg(process.pid, signal.SIGKILL)

    def _command(self, name: str) -> list[str]:
        if name == COORDINATOR:
            return ["benchmarks.chaos.coordinator", str(self.state), str(self.port), str(self.clock_offset)]
        index = self.devices.index(name)
        files = ["--data", str(self._data[index]), "--state", str(self.states[name])]
        token = ["--token-file", str(self.folder / "enrolment.token")]
        resident = ["--resident"] if index else []
        options = ["--name", name, "--engine", ENGINE, *files, *token, *resident]
        return ["lamina.cli.main", "join", self.urls[name], *options]

    def _start(self, name: str) -> None:
        if name == COORDINATOR:
            (self.state / "address").unlink(missing_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", *self._command(name)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    async def _keep(self, name: str) -> None:
        while True:
            process = self._running[name]
            if process.poll() is None:
                await asyncio.sleep(0.02)
                continue
            if not self._was_killed(process):
                self.ended[f"{name.partition('-')[0]}: {self._why(name, process.returncode)}"] += 1
            await asyncio.sleep(self._random.uniform(0, _PAUSE_SECONDS))
            self._start(name)

    def _kill(self, pid: int) -> bool:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self._killed.add(pid)
        return True

    def _was_killed(self, process: subprocess.Popen[bytes]) -> bool:
        """By this house, or it ended as a supervisor does whose talker was."""
        return process.pid in self._killed or process.returncode == 128 + signal.SIGKILL

    def _why(self, name: str, status: int) -> str:
        codes = _SAID_ERROR.findall(self.log(name)[-3000:])
        return codes[-1] if codes and status == 1 else f"status {status}"


def _descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(grandchild for child in children for grandchild in _descendants(child))]


def _runs(pid: int, module: bytes) -> bool:
    try:
        return module in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False

"""The parent of a device's processes: it holds almost nothing, and outlives whatever happens to them.

    talk     edge_client.talk.device    checks in, downloads, uploads; ends with status 75 when a job is ready
    train    edge_client.train.trainer   does the job, leaves its outcome, and ends

The two never run at the same time, so that training has the memory of the device to itself. A trainer that dies, by a
fault of the runtime or by the kernel's out-of-memory killer, is one failed attempt: it is written down, and the talking
process reports it and decides what next. Run as a file in Python's isolated mode, this takes 5 MiB and imports none of
lamina.
"""

import errno
import fcntl
import json
import os
import signal
import sys
import time
from types import FrameType
from typing import IO, Any

# The names that all processes share; the other two import them from here, because this one imports nothing of ours.
WORK_STATUS = 75
"""With this exit status the talking process says that a job lies in the work folder."""
STORE_STATUS = 74
"""With this one the training process says that the disk did not take its outcome; it has told why, and it did not die."""
OUTCOME = "outcome.json"
"""What became of the job in a work folder (`edge_client.process.outcome`)."""
PARENT = "LAMINA_PARENT"
"""Who starts a process of the device writes its own number into this variable of the environment."""
_child = 0
_is_stopping = False


def main() -> int:
    options: dict[str, Any] = json.loads(sys.argv[1])
    os.environ[PARENT] = str(os.getpid())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    os.umask(0o077)  # what a device keeps is nobody else's business
    try:
        os.makedirs(options["state"], mode=0o700, exist_ok=True)  # noqa: PTH103 (pathlib is 1 MiB)
        lock = _lock(options["state"])
    except OSError as error:
        return _disk_failed(options["state"], error)
    if lock is None:
        _say(f"error [config]: another process uses {options['state']}; give each device its own --state folder")
        return 1
    work = os.path.join(options["state"], "work")  # noqa: PTH118
    status = _run("edge_client.train.trainer", "--check", options["engine"])
    while not status and not _is_stopping:
        status = _run("edge_client.talk.device", json.dumps(options))
        if status != WORK_STATUS or _is_stopping:
            break
        options["has_worked"] = True
        outcome = _run("edge_client.train.trainer", work)
        status = 0
        if outcome == STORE_STATUS:
            status = 1
        elif outcome and not _is_stopping:
            status = _write_down(work, describe(outcome))
    if _is_stopping:
        _say("stopped; run the same command to go on where this device was")
        return 0
    return status if status >= 0 else 128 - status


def _run(module: str, *arguments: str) -> int:
    """Exit status of a process; the negative number of the signal that ended it."""
    global _child
    command = [sys.executable, "-P", "-m", module, *arguments]
    _child = os.posix_spawn(sys.executable, command, os.environ)
    if _is_stopping:
        os.kill(_child, signal.SIGTERM)
    _, status = os.waitpid(_child, 0)
    _child = 0
    return os.waitstatus_to_exitcode(status)


def _stop(number: int, frame: FrameType | None) -> None:
    global _is_stopping
    _is_stopping = True
    if _child:
        os.kill(_child, signal.SIGTERM)


def _lock(state: str) -> IO[str] | None:
    """The lock ends with this process, however that ends."""
    file = open(os.path.join(state, "lock"), "w")  # noqa: PTH118, PTH123, SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def describe(status: int) -> str:
    """How a process ended: its status, or the negative number of a signal."""
    if status >= 0:
        return f"it ended with status {status}"
    return f"it was ended by {signal.Signals(-status).name}{_WHY.get(-status, '')}"


_WHY: dict[int, str] = {
    signal.SIGKILL: " (when nobody sent it, the kernel did for want of memory)",
    signal.SIGALRM: " (it did no batch and no feature rows for too long)",
}


def _write_down(work: str, how: str) -> int:
    """Notes that the trainer died. Status 1 if the disk does not take it; the work is then simply done again."""
    path = os.path.join(work, OUTCOME)  # noqa: PTH118
    try:
        with open(path + ".partial", "w") as file:  # noqa: PTH123
            json.dump({"kind": "died", "how": how}, file)
        os.replace(path + ".partial", path)  # noqa: PTH105
    except OSError as error:
        return _disk_failed(work, error)
    return 0


def _disk_failed(folder: str, error: OSError) -> int:
    code = "disk-full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "store"
    _say(f"error [{code}]: {error.strerror}: {error.filename or folder}; mend that and run the same command: nothing was lost")
    return 1


def _say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")


if __name__ == "__main__":
    sys.exit(main())

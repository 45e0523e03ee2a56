"""Children of a demo or a benchmark end with their parent, also when it is asked to end by a signal."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.demo.processes import Processes

_TIMEOUT_SECONDS = 30
_PARENT = """
import signal, sys
from pathlib import Path
from benchmarks.demo.processes import Processes

folder = Path(sys.argv[1])
with Processes(folder / "logs") as processes:
    processes.start("coordinator", ["serve", "--state", str(folder / "state"), "--port", "0"])
    if sys.argv[2] == "running":
        processes.wait_for_file(folder / "state" / "address", timeout_seconds=30)
    print(processes._running["coordinator"].pid, flush=True)
    signal.pause()
"""


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("when", ["starting", "running"])
def test_a_parent_that_gets_sigterm_ends_its_child_first(tmp_path: Path, when: str) -> None:
    words = tmp_path / "stderr"
    with (
        words.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", _PARENT, str(tmp_path), when], stdout=subprocess.PIPE, stderr=errors, text=True
        ) as parent,
    ):
        assert parent.stdout is not None
        told = parent.stdout.readline().strip()
        assert told, words.read_text()
        child = int(told)
        try:
            assert is_there(child)
            parent.send_signal(signal.SIGTERM)

            assert parent.wait(timeout=_TIMEOUT_SECONDS) == 128 + signal.SIGTERM
            assert not is_there(child)
        finally:
            if is_there(child):
                os.kill(child, signal.SIGKILL)
            parent.kill()


def test_a_child_that_has_just_been_started_is_ended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def interrupted(*arguments: object, **options: object) -> object:
        started.append(popen(*arguments, **options))  # type: ignore[call-overload]
        os.kill(os.getpid(), signal.SIGTERM)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", interrupted)

    with pytest.raises(SystemExit), Processes(tmp_path) as processes:
        processes.start("one", ["--help"])

    assert started[0].returncode is not None


def test_the_handler_before_is_there_again_after_the_block(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    with Processes(tmp_path):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before

    with pytest.raises(SystemExit) as left, Processes(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_block_in_another_thread_leaves_signals_as_they_are(tmp_path: Path) -> None:
    before, within = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with Processes(tmp_path):
            within.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(_TIMEOUT_SECONDS)

    assert within == [before] and signal.getsignal(signal.SIGTERM) == before

"""The supervisor with the real talking process, over HTTP on loopback, and trainers that die in every way."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from edge_client.process import supervisor
from tests.edge_client.fake_coordinator import ENROLMENT_TOKEN, FakeCoordinator

SUPERVISOR = Path(supervisor.__file__)


@pytest.fixture
def served(programs):
    """A coordinator of two rounds at an address."""
    coordinator = FakeCoordinator(*programs.bundle("onnxruntime"))
    coordinator.steps = coordinator.steps[:4]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = httpx.Request(self.command, f"http://c{self.path}", headers=dict(self.headers), content=body)
            response = coordinator(request)
            content = response.read()
            self.send_response(response.status_code)
            headers = {"Content-Length": str(len(content))} | {"ETag": response.headers.get("ETag", '""')}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield coordinator, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def start(tmp_path, data_file, served):
    """start(**options) -> the running supervisor, with its stderr as a pipe."""
    _, url = served
    running = []

    def run(extra_path=None, **changes):
        options = {
            "url": url,
            "data": str(data_file),
            "name": "attic",
            "engine": "onnxruntime",
            "state": str(tmp_path / "state"),
            "until_finished": True,
        } | changes
        environment = {**os.environ, "LAMINA_TOKEN": ENROLMENT_TOKEN}
        if extra_path:
            environment["PYTHONPATH"] = os.pathsep.join([str(extra_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-I", "-S", str(SUPERVISOR), json.dumps(options)]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.communicate(timeout=30)  # ends when the last child has let go of the pipe


def finished(process, timeout=120):
    return process.communicate(timeout=timeout)[1], process.returncode


def fake_engine(folder, body):
    """A folder in which a native fault stands for the engine: it is imported before the real onnxruntime."""
    (folder / "onnxruntime").mkdir(parents=True)
    (folder / "onnxruntime" / "__init__.py").write_text(body)
    return folder


def test_a_device_of_processes_trains_and_finishes(start, served):
    said, status = finished(start())
    assert status == 0, said
    assert served[0].steps == []
    assert "finished: all runs are finished" in said
    assert said.count("device attic: 21 training") == 1
    first = served[0].reports[0]
    assert 30 << 20 < first.peak_bytes < 120 << 20
    assert first.bytes_down > 1000


def test_a_resident_device_keeps_its_processes_and_sends_the_same(start, served, tmp_path):
    said, status = finished(start(is_resident=True))
    assert status == 0, said
    assert len(served[0].updates) == 2
    assert served[0].reports[0].peak_bytes > 80 << 20  # two processes at a time


FAULTS = {
    "abort": ("import os; os.abort()", "SIGABRT"),
    "segmentation fault": ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    "no memory": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL (when nobody sent it"),
    "status": ("import os; os._exit(3)", "it ended with status 3"),
}


@pytest.mark.parametrize(("fault", "resident"), [*((fault, False) for fault in FAULTS), ("abort", True)])
def test_a_fault_of_the_runtime_is_reported_and_survived(start, served, tmp_path, fault, resident):
    """The runtime dies in the first two jobs and works afterwards, as it might when memory is short for a while."""
    body, words = FAULTS[fault]
    counter = tmp_path / "count"
    broken = fake_engine(
        tmp_path / "path",
        f"""
import sys
from pathlib import Path
counter = Path({str(counter)!r})
count = int(counter.read_text()) if counter.exists() else 0
counter.write_text(str(count + 1))
if count in (1, 2):  # 0 is the check at the start
    {body}
sys.path.remove({str(tmp_path / "path")!r})
del sys.modules["onnxruntime"]
import onnxruntime
sys.modules[__name__] = onnxruntime
""",
    )
    said, status = finished(start(extra_path=broken, is_resident=resident))
    assert status == 0, said
    assert served[0].steps == []
    assert f"attempt 1 failed, it was ended by {words}" in said or f"attempt 1 failed, {words}" in said
    assert "attempt 2 failed" in said
    assert served[0].reports[0].failed_attempts == 2
    assert words.removeprefix("it was ") in served[0].reports[0].failure or words in served[0].reports[0].failure
    assert "trying again in" in said


def test_a_second_device_on_the_same_folder_is_refused(start, tmp_path, served):
    served[0].steps = []  # so that the first one waits
    first = start()
    lock = tmp_path / "state" / "lock"
    end = time.monotonic() + 30
    while not lock.exists() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.2)
    said, status = finished(start())
    assert status == 1
    assert "another process uses" in said
    assert first.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_supervisor_and_child_with_one_line(start, served, number):
    served[0].steps = []
    process = start()
    for line in process.stderr:
        if "waiting" in line:
            break
    process.send_signal(number)
    said, status = finished(process)
    assert status == 0
    assert said.endswith("stopped; run the same command to go on where this device was\n")
    assert "Traceback" not in said


def test_children_do_not_outlive_a_killed_supervisor(start, served, tmp_path):
    served[0].steps = []
    process = start()
    for line in process.stderr:
        if "waiting" in line:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while Path(f"/proc/{children[0]}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not Path(f"/proc/{children[0]}").exists()


@pytest.mark.parametrize("module", ["edge_client.talk.device", "edge_client.train.trainer"])
def test_a_child_whose_parent_ended_before_it_looked_ends_as_well(module):
    environment = {**os.environ, "LAMINA_PARENT": "1"}
    done = subprocess.run([sys.executable, "-m", module, "{}"], env=environment, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == -signal.SIGKILL


def test_an_engine_that_cannot_run_here_is_said_before_anything_else(start, served, tmp_path):
    broken = fake_engine(tmp_path / "path", "raise ImportError('no such library')")
    said, status = finished(start(extra_path=broken))
    assert status == 1
    assert said.startswith("error [engine-missing]: engine 'onnxruntime' is not installed here (no such library)")
    assert served[0].requests == []


def test_data_that_cannot_be_used_is_said_before_the_coordinator_is_asked(start, served, tmp_path):
    said, status = finished(start(data=str(tmp_path / "none.npz")))
    assert status == 1
    assert "error [data]" in said
    assert served[0].requests == []

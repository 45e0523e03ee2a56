"""The engine tests for arm64. pytest runs on this machine, the engines and the training in an emulated arm64 process.

    python -m tests.arm64.run [pytest's options]

Status 0: passed. 1: a test failed, or they were not finished in time. 3: NOT RUN, because this machine cannot have the
tools; then nothing has been tested, and the last line says why.
"""

import os
import platform
import signal
import subprocess
import sys
import time

from tests.arm64.tools import ROOT, NotPossibleError, prepare

LIMIT_SECONDS = 15 * 60
PASSED, FAILED, NOT_RUN = 0, 1, 3
TESTS = (
    "tests/arm64",
    "tests/conformance",
    "tests/edge_client/test_engines.py",
    "tests/edge_client/test_executorch_shim.py",
)


def main(options: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(FAILED))  # so that pytest and its processes are ended as well
    end = time.monotonic() + LIMIT_SECONDS
    try:
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            raise NotPossibleError(f"the tools are for Linux on x86_64, this is {sys.platform} on {platform.machine()}")
        prepare(lambda: end - time.monotonic())
    except NotPossibleError as error:
        sys.stdout.write(f"\n{'!' * 100}\nARM64 TESTS NOT RUN: {' '.join(str(error).split())}\n")
        return NOT_RUN
    command = [sys.executable, "-m", "pytest", "-p", "tests.arm64.emulated", "-n", "2", "--dist", "worksteal"]
    environment = {
        **os.environ,
        "LAMINA_CACHE": os.environ.get("LAMINA_CACHE") or str(ROOT / ".cache" / "programs"),
        "OMP_NUM_THREADS": "1",  # torch's threads would wait for each other where two pytest processes have two cores
    }
    pytest = subprocess.Popen([*command, *TESTS, *options], cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = pytest.wait(timeout=end - time.monotonic())
    except subprocess.TimeoutExpired:
        sys.stdout.write(f"\nARM64 TESTS FAILED: not finished within {LIMIT_SECONDS} seconds\n")
        return FAILED
    finally:
        if pytest.poll() is None:
            os.killpg(pytest.pid, signal.SIGKILL)
            pytest.wait()
    return FAILED if status else PASSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

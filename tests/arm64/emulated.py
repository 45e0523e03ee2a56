"""pytest plugin: `load_engine` gives engines of an emulated arm64 process, so the engine tests ask that one, unchanged.

Tests that no emulated process can answer are left out (`NOT_HERE`, with the reason), and those of the engine `torch`.
"""

import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest

import edge_client.engines
from edge_client.engines import Array
from edge_client.job import ProgramFile, Tensor
from lamina.names import EngineName, ProgramShape
from tests.arm64.server import PACKAGES
from tests.arm64.tools import CPU, PYTHON, ROOT

EMULATED: tuple[EngineName, ...] = ("executorch", "onnxruntime")
NOT_HERE = {
    "test_inputs_are_read_in_place_and_outputs_are_not_copied": "compares addresses, which are those of another process",
    "test_an_engine_of_its_own_process_has_no_torch_one_thread_and_nothing_to_say": "the emulator has threads of its own",
    "test_loading_and_closing_again_and_again_keeps_the_memory": "measures the memory of the emulator",
    "test_the_engine_costs_less_than_8_mib": "measures the memory of the emulator",
    "test_the_source_of_the_shim_is_part_of_the_package": "asks no engine",
}
ASKED_BEFORE = pytest.StashKey[int]()


class Device:
    """The emulated process, started when it is first asked. `asked` counts what was loaded, run or started there."""

    def __init__(self) -> None:
        self.asked = 0
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, verb: str, *arguments: object) -> Any:
        if self._process is None:
            self._process = subprocess.Popen(
                [PYTHON, "-m", "tests.arm64.server"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        self.asked += verb in ("load", "run")
        assert self._process.stdin and self._process.stdout
        try:
            pickle.dump((verb, arguments), self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            status = self._process.wait()
            self._process = None
            raise RuntimeError(f"the emulated process ended with status {status} when it was asked to {verb}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def python(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Another Python process on the device, run to its end."""
        self.asked += 1
        command = [str(word) for word in (PYTHON, *arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)

    def close(self) -> None:
        if self._process is not None:
            with self._process as process:
                process.terminate()


DEVICE = Device()


class EmulatedProgram:
    def __init__(self, index: object) -> None:
        self._index = index

    def run(self, arrays: list[Array]) -> list[Array]:
        return DEVICE.ask("run", self._index, list(arrays))

    def close(self) -> None:
        DEVICE.ask("close", self._index)


class EmulatedEngine:
    def __init__(self, name: EngineName) -> None:
        self.name = name

    def load(self, path: Path, program: ProgramShape) -> EmulatedProgram:
        inputs = tuple(Tensor(getattr(spec, "name", ""), spec.shape, spec.dtype) for spec in program.inputs)
        shape = ProgramFile(str(path), "", program.role, program.weights, inputs, program.max_batch, program.precision)
        return EmulatedProgram(DEVICE.ask("load", self.name, str(path), shape))


def load_engine(name: EngineName) -> EmulatedEngine:
    assert name in EMULATED, f"no test may ask for {name} here"
    DEVICE.ask("engine", name)
    return EmulatedEngine(name)


def pytest_configure(config: pytest.Config) -> None:
    edge_client.engines.load_engine = load_engine  # before any test module takes it from there


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if not asks_the_device(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if asks_the_device(item)]


def asks_the_device(item: pytest.Function) -> bool:
    if item.path.name in ("test_jobs.py", "test_executorch_shim.py"):
        return item.originalname not in NOT_HERE
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("engine", parameters.get("name")) in EMULATED


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    item.stash[ASKED_BEFORE] = DEVICE.asked
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    try:
        return (yield)
    finally:
        item.user_properties.append(("asked", DEVICE.asked - item.stash[ASKED_BEFORE]))


@pytest.fixture(autouse=True)
def processes_of_the_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python processes that a test starts are processes of the device."""
    module = request.module
    if hasattr(module, "fresh"):
        monkeypatch.setattr(module, "fresh", lambda code, *arguments: DEVICE.python("-c", module.OPEN + code, *arguments))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Tests that asked the device nothing, such as those of a manifest, are counted apart: they say nothing about arm64."""
    if hasattr(config, "workerinput"):  # the process that started this one counts for all
        return
    counts = {
        outcome: [
            dict(getattr(report, "user_properties", ())).get("asked", 0) for report in terminalreporter.stats.get(outcome, [])
        ]
        for outcome in ("passed", "failed", "error")
    }
    about = DEVICE.ask("about")
    DEVICE.close()
    passed = [count for count in counts["passed"] if count]
    terminalreporter.write_line(
        f"arm64: {len(passed)} passed, {len(counts['failed'] + counts['error'])} failed, "
        f"{len(counts['passed']) - len(passed)} asked the device nothing; {sum(passed)} loads, runs and processes "
        f"on {about['machine']} ({CPU}, emulated); {', '.join(f'{name} {about[name]}' for name in PACKAGES)}"
    )
    if not passed or about["machine"] != "aarch64":
        pytest.exit("no test was passed on arm64", returncode=1)


def pytest_unconfigure(config: pytest.Config) -> None:
    DEVICE.close()

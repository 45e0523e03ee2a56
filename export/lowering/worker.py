"""Lowering in processes of their own, a few at a time: it takes seconds per program and one core each.

    python -m export.lowering.worker        one JSON line per job on stdin: {"engine", "graph", "out"}; one JSON line back for
    each

The processes are started with the command line above instead of `multiprocessing`, because the latter would run the user's
script again in each of them.
"""

import atexit
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any, NamedTuple

import torch
from torch.export import ExportedProgram

from export.lowering.lower_torch import lower_torch
from lamina.bundles.manifest import EngineName
from lamina.errors import ExportError


class LoweredProgram(NamedTuple):
    """A program file's bytes; `arena_bytes` is what the runtime plans for intermediate values, if it says."""

    data: bytes
    arena_bytes: int | None


def lower(engine: EngineName, graph: ExportedProgram) -> LoweredProgram:
    """Lowers in this process. Raises ExportError with the compiler's own words if it refuses the graph."""
    try:
        if engine == "executorch":
            from export.lowering.lower_executorch import lower_executorch

            return LoweredProgram(*lower_executorch(graph))
        if engine == "onnxruntime":
            from export.lowering.lower_onnx import lower_onnx

            return LoweredProgram(lower_onnx(graph), None)
        return LoweredProgram(lower_torch(graph), None)
    except ImportError as error:
        raise ExportError(f"{engine} cannot be exported here, {error}: pip install 'lamina[export,{engine}]'") from error
    except Exception as error:  # the compilers raise whatever they like
        raise ExportError(f"{engine} refused the graph: {type(error).__name__}: {error}") from error


@contextmanager
def lowering_pool(workers: int) -> Iterator[Callable[[EngineName, ExportedProgram], Callable[[], LoweredProgram]]]:
    """Gives a function that starts lowering a graph and returns a function that waits for the result.

    At most `workers` processes work at the same time. Starting one takes seconds (it imports the compilers), so they stay
    for the next export of this program and end with it.
    """
    numbers = count()
    busy: set[_Process] = set()
    with TemporaryDirectory(prefix="lamina-") as folder, ThreadPoolExecutor(workers) as threads:

        def run(engine: EngineName, path: Path) -> LoweredProgram:
            process = _idle.pop() if _idle else _Process()
            busy.add(process)
            try:
                lowered = process.lower(engine, path)
            except BaseException:
                process.end()
                raise
            finally:
                busy.discard(process)
                path.unlink()
            _idle.append(process)
            return lowered

        def start(engine: EngineName, graph: ExportedProgram) -> Callable[[], LoweredProgram]:
            if engine == "torch":  # the file is the graph as it is: nothing to compile
                program = lower(engine, graph)
                return lambda: program
            path = Path(folder) / f"{next(numbers)}.pt2"
            path.write_bytes(lower_torch(graph))
            return threads.submit(run, engine, path).result

        try:
            yield start
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in list(busy):
                process.kill()  # or leaving the block would wait for minutes
            raise


class _Process:
    """One lowering process; used by one thread at a time."""

    def __init__(self) -> None:
        # Threads of torch would compete with the other workers for the same cores.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._errors: IO[bytes] = TemporaryFile()  # noqa: SIM115 - closed by end()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "export.lowering.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )

    def lower(self, engine: EngineName, graph: Path) -> LoweredProgram:
        assert self._process.stdin is not None and self._process.stdout is not None
        out = graph.with_suffix(".out")
        job = {"engine": engine, "graph": str(graph), "out": str(out)}
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            raise ExportError(f"the process that lowers for {engine} ended ({self._process.wait()}): {self._last_words()}")
        done: dict[str, Any] = json.loads(answer)
        if "error" in done:
            raise ExportError(done["error"])
        data = out.read_bytes()
        out.unlink()
        return LoweredProgram(data, done["arena_bytes"])

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-600:]


_idle: list[_Process] = []


@atexit.register
def end_idle_processes() -> None:
    while _idle:
        _idle.pop().end()


def main() -> None:
    """Serves jobs until stdin ends. Stdout is kept for the answers; whatever the compilers print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    gc.set_threshold(100_000, 50, 50)  # the compilers make millions of small objects: 8 % less time
    for line in sys.stdin:
        job = json.loads(line)
        try:
            lowered = lower(job["engine"], torch.export.load(BytesIO(Path(job["graph"]).read_bytes())))
            Path(job["out"]).write_bytes(lowered.data)
            answer: dict[str, Any] = {"arena_bytes": lowered.arena_bytes}
        except ExportError as error:
            answer = {"error": error.message}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

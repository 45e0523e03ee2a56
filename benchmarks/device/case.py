"""One case, in a process of its own: some training steps, then the kernel's word on the peak.

    python -m benchmarks.device.case CASE.json      prints one JSON object a line: {"event": "begin" | "step" | "end" | ...}

Engine cases import numpy, the engine and what the client imports beside it, as the training process of a device does; eager
cases import torch. Weights and data are random: neither memory nor time depends on the values.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from benchmarks.device.kernel import peak_rss_bytes, rss_bytes

Array = np.ndarray[Any, Any]
RATE, MOMENTUM = 1e-3, 0.9
SAY_SECONDS = 0.2
# In the words of CUDA, of C++, of the C library, and of the loader that finds no room for a runtime's library.
_OUT_OF_MEMORY = ("out of memory", "bad_alloc", "cannot allocate memory", "failed to map segment", "bad allocation")
FAILED = 3  # the status of a process that has said why


@dataclass(frozen=True)
class Tensor:
    """A batch input without its batch axis, as `lamina.names.TensorShape` wants it; `bound` is that of integers."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bound: int

    @property
    def count(self) -> int:
        return prod(self.shape)

    def random(self, rng: np.random.Generator, rows: int) -> Array:
        """(rows, *shape)."""
        if self.dtype == "int64":
            return rng.integers(0, self.bound, (rows, *self.shape))
        return rng.standard_normal((rows, *self.shape), np.float32)


@dataclass(frozen=True)
class Program:
    """A program file, as `lamina.names.ProgramShape` wants it."""

    path: Path
    role: str
    weights: tuple[tuple[int, ...], ...]
    inputs: tuple[Tensor, ...]
    max_batch: int
    precision: str
    references: tuple[Any, ...] = ()
    frozen: tuple[tuple[int, ...], ...] = ()


class Reporter:
    """Events for the watching process, one a line, at most a few steps a second."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._said = 0.0

    def say(self, event: str, **facts: Any) -> None:
        self._stream.write(json.dumps({"event": event, **facts}) + "\n")
        self._stream.flush()
        self._said = time.monotonic()

    def step(self, done: int) -> None:
        if time.monotonic() - self._said > SAY_SECONDS:
            self.say("step", done=done)


def run_engine(case: dict[str, Any], reporter: Reporter) -> None:
    """Prepares the data and takes the steps. `case` is a `cases.PreparedCase` with the settings of this run beside it."""
    reporter.say("memory", at="numpy", bytes=rss_bytes())
    from edge_client.engines import load_engine
    from edge_client.process.memory import give_back_free_memory

    engine = load_engine(case["side"])
    reporter.say("memory", at="engine", bytes=rss_bytes())
    rng, folder = np.random.default_rng(0), Path(case["folder"])
    inputs = [tensor_of(spec) for spec in case["inputs"]]
    batch = Batch(inputs, case["batch"], case["micro_batch"] or case["batch"], Path(case["scratch"]))
    if case["prefix"]:
        start = time.process_time()
        for spec in case["raw_inputs"]:
            chain = [_program(program, folder) for program in case["frozen"].get(spec["name"], [])]
            batch.fill(tensor_of(spec), chain, engine, rng, give_back_free_memory)
        reporter.say("fill", cpu_seconds=time.process_time() - start)
    batch.make(rng, case["on_disk"])
    step = EngineStep(case, {role: _program(program, folder) for role, program in case["programs"].items()}, engine, batch, rng)
    reporter.say("memory", at="loaded", bytes=rss_bytes())
    take_steps(step, case["steps"], case["window_seconds"], reporter)


def take_steps(step: Callable[[], None], steps: int, window_seconds: float, reporter: Reporter) -> None:
    """Takes `steps` steps and as many as fill the window, after one that is not timed: it makes what is made only once."""
    step()
    cpu: list[float] = []
    begin = time.monotonic()
    while len(cpu) < steps or time.monotonic() - begin < window_seconds:
        start = time.process_time()
        step()
        cpu.append(time.process_time() - start)
        reporter.step(len(cpu))
    end = time.monotonic()
    reporter.say("end", begin=begin, end=end, cpu_seconds=cpu, peak_rss_bytes=peak_rss_bytes())


class Batch:
    """The data of one step: (batch, *shape) for each input, in memory or in one file each, of which pieces are read."""

    def __init__(self, inputs: list[Tensor], batch: int, micro_batch: int, scratch: Path) -> None:
        self.inputs, self.batch, self.micro_batch = inputs, batch, micro_batch
        self._scratch = scratch
        self._files: dict[str, Path] = {}
        self._arrays: dict[str, Array] = {}

    def fill(
        self,
        raw: Tensor,
        chain: list[Program],
        engine: Any,
        rng: np.random.Generator,
        give_back: Callable[[], None],
    ) -> None:
        """Runs a modality's frozen layers over the batch, one layer and one chunk of rows at a time, as a device does."""
        from lamina.encoding.quantize import frozen_weights

        source: Path | None = None
        for depth, program in enumerate(chain):
            weights = frozen_weights([_weight(rng, shape) for shape in program.weights], program.precision)
            loaded = engine.load(program.path, program)
            target = self._scratch / f"{raw.name}-{depth}"
            shape = raw if source is None else program.inputs[0]
            with target.open("wb") as file:
                for first in range(0, self.batch, program.max_batch):
                    rows = min(program.max_batch, self.batch - first)
                    chunk = raw.random(rng, rows) if source is None else _read(source, shape, first, rows)
                    (features,) = loaded.run([*weights, chunk])
                    np.ascontiguousarray(features).tofile(file)
            loaded.close()
            del loaded, weights
            give_back()
            if source is not None:
                source.unlink()
            source = target
        if source is not None:
            self._files[raw.name] = source

    def make(self, rng: np.random.Generator, on_disk: bool) -> None:
        """Random values for every input that is not filled yet."""
        for spec in self.inputs:
            if spec.name in self._files:
                continue
            if not on_disk or spec.name == "label":
                self._arrays[spec.name] = spec.random(rng, self.batch)
                continue
            self._files[spec.name] = self._scratch / spec.name
            with self._files[spec.name].open("wb") as file:
                for first in range(0, self.batch, self.micro_batch):
                    spec.random(rng, min(self.micro_batch, self.batch - first)).tofile(file)

    def pieces(self) -> Iterator[tuple[int, list[Array]]]:
        """(first row, inputs) of each micro-batch."""
        for first in range(0, self.batch, self.micro_batch):
            yield first, [self._rows(spec, first) for spec in self.inputs]

    def _rows(self, spec: Tensor, first: int) -> Array:
        if spec.name in self._arrays:
            return self._arrays[spec.name][first : first + self.micro_batch]
        return _read(self._files[spec.name], spec, first, self.micro_batch)


class EngineStep:
    """Gradient of the whole batch's loss, micro-batch by micro-batch, and the optimiser on the flat vector of it."""

    def __init__(
        self, case: dict[str, Any], programs: dict[str, Program], engine: Any, batch: Batch, rng: np.random.Generator
    ) -> None:
        shapes, self._is_trained = [tuple(shape) for shape in case["weights"]], case["is_trained"]
        trained = sum(prod(shape) for shape, flag in zip(shapes, self._is_trained, strict=True) if flag)
        self._parameters = np.zeros(trained, np.float32)
        self._gradient = np.zeros(trained, np.float32)
        self._weights: list[Array] = []
        at = 0
        for shape, flag in zip(shapes, self._is_trained, strict=True):
            value = _weight(rng, shape)
            if flag:
                view = self._parameters[at : at + value.size].reshape(shape)
                view[...] = value
                at += value.size
                value = view
            self._weights.append(value)
        self._optimizer = _optimizer(case["optimizer"], trained)
        self._batch = batch
        self._loaded = {role: engine.load(program.path, program) for role, program in programs.items()}

    def __call__(self) -> None:
        self._gradient.fill(0)
        if "backward" in self._loaded:
            self._contrastive()
        else:
            train = self._loaded["train"]
            for _, inputs in self._batch.pieces():
                self._add(train.run([*self._weights, *inputs])[2:])
            # Each piece gave the gradient of its own mean.
            self._gradient *= np.float32(self._batch.micro_batch / self._batch.batch)
        self._optimizer.step(self._parameters, self._gradient)

    def _contrastive(self) -> None:
        """The exact gradient of a loss over the whole batch, in three steps (`lamina.bundles.manifest`)."""
        embeddings: list[Array] = []
        for first, inputs in self._batch.pieces():
            for index, part in enumerate(self._loaded["embed"].run([*self._weights, *inputs])):
                if first == 0:
                    embeddings.append(np.empty((self._batch.batch, *part.shape[1:]), np.float32))
                embeddings[index][first : first + len(part)] = part
        gradients = [value.copy() for value in self._loaded["loss"].run(embeddings)[2:]]
        for first, inputs in self._batch.pieces():
            rows = [value[first : first + self._batch.micro_batch] for value in gradients]
            self._add(self._loaded["backward"].run([*self._weights, *inputs, *rows]))

    def _add(self, parts: list[Array]) -> None:
        at = 0
        for part in parts:
            self._gradient[at : at + part.size] += part.ravel()
            at += part.size
        if at != self._gradient.size:
            raise ValueError(f"the program gave {at} gradient values for {self._gradient.size} trained parameters")


def _optimizer(name: str, count: int) -> Any:
    from edge_client.train.optimizers import make_optimizer

    settings: dict[str, Any] = {"kind": name} | ({} if name == "adamw" else {"momentum": MOMENTUM})
    return make_optimizer(settings, count, RATE)


def _weight(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    value = rng.standard_normal(shape, np.float32)
    value *= np.float32(0.05)
    return value


def _read(path: Path, spec: Tensor, first: int, rows: int) -> Array:
    """(rows, *shape) of a file of raw values."""
    dtype = np.dtype(spec.dtype)
    values = np.fromfile(path, dtype, rows * spec.count, offset=first * spec.count * dtype.itemsize)
    return values.reshape(-1, *spec.shape)


def tensor_of(spec: dict[str, Any]) -> Tensor:
    return Tensor(spec["name"], tuple(spec["shape"]), spec["dtype"], spec["bound"])


def _program(value: dict[str, Any], folder: Path) -> Program:
    return Program(
        path=folder / value["file"],
        role=value["role"],
        weights=tuple(tuple(shape) for shape in value["weights"]),
        inputs=tuple(tensor_of(spec) for spec in value["inputs"]),
        max_batch=value["max_batch"],
        precision=value["precision"],
    )


def explain(error: Exception) -> str:
    """One sentence: what kind of trouble it was, in whose words."""
    words = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, MemoryError) or any(sign in words.lower() for sign in _OUT_OF_MEMORY):
        return f"out of memory: {words}"
    if "CUDA" in words or "AcceleratorError" in type(error).__name__:
        return f"the GPU failed or is not there: {words}"
    return f"{type(error).__name__}: {words}"


def main() -> None:
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some runtimes print to stdout; that must not come between the events
    reporter = Reporter(events)
    from edge_client.process.memory import die_with_parent

    die_with_parent()
    case = json.loads(Path(sys.argv[1]).read_text())
    try:
        if case["side"] == "eager":
            from benchmarks.device.eager import run_eager

            run_eager(case, reporter)
        else:
            run_engine(case, reporter)
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            reporter.say("cuda", peak_bytes=torch.cuda.max_memory_allocated(), name=torch.cuda.get_device_name())
    except Exception as error:  # whatever it was, it is this case's result
        reporter.say("error", detail=explain(error))
        sys.exit(FAILED)


if __name__ == "__main__":
    main()

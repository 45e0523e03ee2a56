"""ExecuTorch: `.pte` files through the bare Python bindings, which need torch but none of ExecuTorch's own Python code."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from executorch.extension.pybindings import _C

from edge_client.engines.base import Array, LoadedProgram
from lamina.errors import EngineError
from lamina.manifest import EngineName, Program


class ExecutorchProgram:
    def __init__(self, path: Path, program: Program) -> None:
        self._file = path.name
        try:
            # By path, not from bytes: the runtime maps the file, and bytes that Python frees would end the process.
            self._module: Any = _C._load_for_executorch(str(path))
            # A damaged file is noticed only when a method is read, so read it now.
            meta = self._module.method_meta("forward")
            sizes = [tuple(meta.input_tensor_meta(i).sizes()) for i in range(meta.num_inputs())]
        except RuntimeError as error:
            raise EngineError(f"executorch cannot load program {path.name}: {error}") from error
        expected = [*program.weights, *((program.max_batch, *spec.shape) for spec in program.inputs)]
        if sizes != expected:
            raise EngineError(f"program {path.name} takes arrays of shapes {sizes}, but its manifest says {expected}")

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        # from_numpy shares memory: the runtime reads the live parameter vector, and nothing is copied.
        tensors = tuple(torch.from_numpy(array) for array in arrays)
        try:
            outputs = self._module.run_method("forward", tensors, clone_outputs=False)
        except RuntimeError as error:
            raise EngineError(f"executorch failed in program {self._file}: {error}") from error
        return [output.numpy() for output in outputs]

    def close(self) -> None:
        self._module = None


class Executorch:
    name: ClassVar[EngineName] = "executorch"

    def __init__(self) -> None:
        torch.set_num_threads(1)
        _C._unsafe_reset_threadpool(1)

    def load(self, path: Path, program: Program) -> LoadedProgram:
        return ExecutorchProgram(path, program)


ENGINE = Executorch

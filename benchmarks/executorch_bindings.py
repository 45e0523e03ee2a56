"""ExecuTorch through its own Python bindings, which link to torch: the side that lamina's shim is compared with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from executorch.extension.pybindings import _C

from edge_client.engines.base import Array
from lamina.names import ProgramShape


class BindingsProgram:
    def __init__(self, path: Path) -> None:
        self._module: Any = _C._load_for_executorch(str(path))

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        # from_numpy shares memory, and the outputs are not cloned: nothing is copied, as in the shim.
        tensors = tuple(torch.from_numpy(array) for array in arrays)
        return [output.numpy() for output in self._module.run_method("forward", tensors, clone_outputs=False)]

    def close(self) -> None:
        self._module = None


class Bindings:
    """In place of an engine of `edge_client`."""

    def __init__(self) -> None:
        _C._unsafe_reset_threadpool(1)

    def load(self, path: Path, program: ProgramShape) -> BindingsProgram:
        return BindingsProgram(path)

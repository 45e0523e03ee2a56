"""PyTorch: `.pt2` files of the forward pass; the gradients come from autograd. For servers, workstations and comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils import _pytree as pytree

from edge_client.engines.base import Array, LoadedProgram
from lamina.errors import EngineError
from lamina.manifest import EngineName, Program


class TorchProgram:
    def __init__(self, path: Path, program: Program) -> None:
        self._file = path.name
        self._is_train = program.role == "train"
        self._num_weights = len(program.weights)
        try:
            with path.open("rb") as file:  # by name, torch warns about files that do not end in .pt2
                exported = torch.export.load(file)
            self._module: Any = exported.module()
            self._arguments = exported.call_spec.in_spec
        except Exception as error:  # zip, pickle-free JSON and torch errors, depending on where the file is damaged
            raise EngineError(f"torch cannot load program {path.name}: {error}") from error

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        tensors = [torch.from_numpy(array) for array in arrays]
        if len(tensors) != self._arguments.num_leaves:
            raise EngineError(f"program {self._file} takes {self._arguments.num_leaves} arrays, given {len(tensors)}")
        weights = tensors[: self._num_weights]
        try:
            with torch.set_grad_enabled(self._is_train):
                if self._is_train:
                    for weight in weights:
                        weight.requires_grad_()
                # The file may take its arrays flat or as (weights, inputs); their order is the same.
                positional, named = pytree.tree_unflatten(tensors, self._arguments)
                outputs = pytree.tree_leaves(self._module(*positional, **named))
                if self._is_train:
                    outputs += torch.autograd.grad(outputs[0], weights)
        except Exception as error:  # guards raise AssertionError, kernels RuntimeError, arguments TypeError
            raise EngineError(f"torch failed in program {self._file}: {error}") from error
        return [output.detach().numpy() for output in outputs]

    def close(self) -> None:
        self._module = None


class Torch:
    name: ClassVar[EngineName] = "torch"

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def load(self, path: Path, program: Program) -> LoadedProgram:
        return TorchProgram(path, program)


ENGINE = Torch

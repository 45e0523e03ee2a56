"""PyTorch: `.pt2` files of the forward pass; the gradients come from autograd. For servers, workstations and comparison.

Programs run on the first CUDA device if there is one, else on the processor.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from edge_client.engines.base import Array, LoadedProgram, program_arrays
from lamina.errors import EngineError
from lamina.names import EngineName, ProgramShape


class TorchProgram:
    def __init__(self, path: Path, program: ProgramShape, device: str) -> None:
        self._device = device
        self._file = path.name
        self._role = program.role
        self._num_weights = len(program.weights)
        self._num_arrays = len(program_arrays(program))
        try:
            with path.open("rb") as file:  # by name, torch warns about files that do not end in .pt2
                exported = torch.export.load(file)
            if device != "cpu":  # where it was exported
                exported = move_to_device_pass(exported, device)
            self._module: Any = exported.module()
            self._arguments = exported.call_spec.in_spec
        except Exception as error:  # zip, pickle-free JSON and torch errors, depending on where the file is damaged
            raise EngineError(f"torch cannot load program {path.name}: {error}") from error

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        if len(arrays) != self._num_arrays:
            raise EngineError(f"program {self._file} takes {self._num_arrays} arrays, given {len(arrays)}")
        tensors = [torch.from_numpy(array).to(self._device) for array in arrays]
        # Only float32 programs are differentiated, so a weight is one array here.
        weights = tensors[: self._num_weights]
        embeddings = [tensor for tensor in tensors if tensor.is_floating_point()]  # and not the label, if there is one
        leaves = {"train": weights, "backward": weights, "loss": embeddings}
        differentiated = leaves.get(self._role, [])
        try:
            with torch.set_grad_enabled(bool(differentiated)):
                for leaf in differentiated:
                    leaf.requires_grad_()
                outputs = self._forward(tensors)
                if self._role == "backward":
                    outputs = list(torch.autograd.grad(outputs, differentiated, tensors[-len(outputs) :]))
                elif differentiated:
                    outputs += torch.autograd.grad(outputs[0], differentiated)
        except Exception as error:  # guards raise AssertionError, kernels RuntimeError, arguments TypeError
            raise EngineError(f"torch failed in program {self._file}: {error}") from error
        return [output.detach().cpu().numpy() for output in outputs]

    def _forward(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        # The file may take its arrays flat or as (weights, inputs); their order is the same. The embed graph serves
        # `backward` too: the gradients that come after its own inputs are for autograd.
        positional, named = pytree.tree_unflatten(tensors[: self._arguments.num_leaves], self._arguments)
        return list(pytree.tree_leaves(self._module(*positional, **named)))

    def close(self) -> None:
        self._module = None


class Torch:
    name: ClassVar[EngineName] = "torch"

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(self, path: Path, program: ProgramShape) -> LoadedProgram:
        return TorchProgram(path, program, self._device)


ENGINE = Torch

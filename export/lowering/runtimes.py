"""Running program files where they are made: each engine's own runtime on the exporting machine, by torch tensors.

Devices run the same files through `edge_client.engines`, which this room does not import.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from export.graphs.trace import Arrays
from export.ops.quiet import quiet
from lamina.bundles.manifest import EngineName, Role


class Run(Protocol):
    """Weights as the program takes them, batch inputs, then what it takes as constants between the two, its frozen tensors and
    those of its references -> outputs as the role promises them."""

    def __call__(self, weights: Arrays, inputs: Arrays, references: Arrays = ()) -> list[Tensor]: ...


def is_installed(engine: EngineName) -> bool:
    """Whether programs of this engine can be run here."""
    return find_spec(engine) is not None


def open_program(engine: EngineName, data: bytes, role: Role) -> Run:
    """The program, loaded once."""
    return _OPENERS[engine](data, role)


def differentiate(
    role: Role, weights: Arrays, inputs: Arrays, forward: Callable[[Arrays, Arrays], Any], references: Arrays = ()
) -> list[Tensor]:
    """The outputs of a role, from a forward pass and autograd: what eager PyTorch gives, and what a torch program does.

    `references` are all constants that it takes behind its weights. `forward` takes (weights and constants, inputs). That of
    `backward` gives the embeddings; the last inputs are their gradients. `loss` is differentiated by the embeddings, which are
    all inputs but the label.
    """
    leaves: Arrays = ()
    if role == "loss":
        leaves = _leaves(tuple(value for value in inputs if value.is_floating_point()))
        inputs = (*leaves, *inputs[len(leaves) :])
    elif role in ("train", "backward"):
        weights = leaves = _leaves(weights)
    given = forward((*weights, *references), inputs)
    if role == "backward":
        return list(torch.autograd.grad(given, leaves, inputs[-len(given) :]))
    outputs = [given] if isinstance(given, Tensor) else list(given)
    if leaves:
        outputs += torch.autograd.grad(outputs[0], leaves)
    return [output.detach() for output in outputs]


def _leaves(values: Arrays) -> Arrays:
    return tuple(value.detach().requires_grad_(True) for value in values)


def _open_executorch(data: bytes, role: Role) -> Run:
    with quiet():
        from executorch.extension.pybindings import _C

        program = _C._load_for_executorch_from_buffer(data)  # reads `data` in place: it must outlive the program

    def run(weights: Arrays, inputs: Arrays, references: Arrays = ()) -> list[Tensor]:
        assert data
        with quiet():
            return list(program.run_method("forward", (*weights, *references, *inputs), clone_outputs=True))

    return run


def _open_onnxruntime(data: bytes, role: Role) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(weights: Arrays, inputs: Arrays, references: Arrays = ()) -> list[Tensor]:
        arrays = [value.numpy() for value in (*weights, *references, *inputs)]
        return [torch.from_numpy(np.asarray(output)) for output in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


def _open_torch(data: bytes, role: Role) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.load(BytesIO(data)).module()

    def run(weights: Arrays, inputs: Arrays, references: Arrays = ()) -> list[Tensor]:
        return differentiate(role, weights, inputs, module, references)

    return run


_OPENERS: dict[EngineName, Callable[[bytes, Role], Run]] = {
    "executorch": _open_executorch,
    "onnxruntime": _open_onnxruntime,
    "torch": _open_torch,
}

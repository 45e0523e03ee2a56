"""Parity: each new program is run once, by its own runtime, against eager autograd on random weights and inputs.

A program that computes something else than the model is worse than none, and exporters do write such programs silently; so
nothing leaves the exporter unchecked where the runtime is installed.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from export.quiet import quiet
from lamina.errors import ParityError
from lamina.manifest import EngineName, Role

TOLERANCE = 1e-5  # absolute, for values up to 1; relative to the largest value above
Arrays = tuple[Tensor, ...]


def check_parity(data: bytes, engine: EngineName, role: Role, name: str, module: nn.Module, inputs: Arrays) -> None:
    """Raises ParityError that names the program and the output that differs. Says nothing where the runtime is missing."""
    if find_spec(_RUNTIMES[engine]) is None:
        return
    weights = _perturbed(module)
    actual = RUNNERS[engine](data, role, weights, inputs)
    expected = eager(module, role, weights, inputs)
    if len(actual) != len(expected):
        raise ParityError(f"{name} for {engine} gives {len(actual)} outputs, expected {len(expected)}")
    for index, (left, right) in enumerate(zip(actual, expected, strict=True)):
        allowed = TOLERANCE * max(1.0, float(right.abs().max()))
        error = float((left - right).abs().max()) if left.shape == right.shape else float("inf")
        if not error <= allowed:
            raise ParityError(
                f"{name} for {engine}: output {index} is off by {error:.2g}, allowed {allowed:.2g}; the runtime does not "
                "compute what PyTorch computes. Find the operation by leaving out parts of the layer, and rewrite it"
            )


def eager(module: nn.Module, role: Role, weights: Arrays, inputs: Arrays) -> list[Tensor]:
    """What the program must give, by PyTorch itself."""
    leaves = [weight.detach().requires_grad_(True) for weight in weights]
    names = [name for name, _ in module.named_parameters()]
    given = functional_call(module, dict(zip(names, leaves, strict=True)), inputs)
    if role == "frozen":
        return [given.detach()]
    loss, correct = given
    gradients = torch.autograd.grad(loss, leaves) if role == "train" else ()
    return [loss.detach(), correct, *gradients]


def run_executorch(data: bytes, role: Role, weights: Arrays, inputs: Arrays) -> list[Tensor]:
    with quiet():
        from executorch.extension.pybindings import _C
    program = _C._load_for_executorch_from_buffer(data)  # reads `data` in place: it must outlive the program
    with quiet():
        return list(program.run_method("forward", (*weights, *inputs), clone_outputs=True))


def run_onnxruntime(data: bytes, role: Role, weights: Arrays, inputs: Arrays) -> list[Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    arrays = [value.numpy() for value in (*weights, *inputs)]
    return [torch.from_numpy(np.asarray(output)) for output in session.run(None, dict(zip(names, arrays, strict=True)))]


def run_torch(data: bytes, role: Role, weights: Arrays, inputs: Arrays) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.load(BytesIO(data)).module()
    leaves = [weight.detach().requires_grad_(True) for weight in weights]
    given = module(tuple(leaves), inputs)
    if role == "frozen":
        return [given.detach()]
    loss, correct = given
    gradients = torch.autograd.grad(loss, leaves) if role == "train" else ()
    return [loss.detach(), correct, *gradients]


RUNNERS: dict[EngineName, Callable[[bytes, Role, Arrays, Arrays], list[Tensor]]] = {
    "executorch": run_executorch,
    "onnxruntime": run_onnxruntime,
    "torch": run_torch,
}
_RUNTIMES: dict[EngineName, str] = {"executorch": "executorch", "onnxruntime": "onnxruntime", "torch": "torch"}


def _perturbed(module: nn.Module) -> Arrays:
    """Weights near the module's own; untouched norms (all 1 and 0) would hide terms of the gradient."""
    generator = torch.Generator().manual_seed(1)
    return tuple(value.detach() + 0.05 * torch.randn(value.shape, generator=generator) for value in module.parameters())

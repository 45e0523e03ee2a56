"""Parity: each new program is run by its own runtime, with one sample and with two, against eager autograd on random
weights and inputs.

A program that computes something else than the model is worse than none, and exporters do write such programs silently; so
nothing leaves the exporter unchecked where the runtime is installed.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from export.graphs.frozen import restore, take
from export.graphs.trace import Arrays
from export.lowering.runtimes import differentiate, is_installed, open_program
from export.models.parameters import in_order, trained
from lamina.bundles.manifest import EngineName, Precision, Role
from lamina.errors import ParityError

TOLERANCE = 1e-5  # absolute, for values up to 1; relative to the largest value above


def check_parity(
    data: bytes,
    engine: EngineName,
    role: Role,
    name: str,
    module: nn.Module,
    inputs: Arrays,
    precision: Precision = "fp32",
    references: Arrays = (),
) -> float | None:
    """The largest error over all outputs and batches, as a fraction of the output's largest value where that is above 1; None
    where the runtime is missing. Raises ParityError that names the program and the output that differs.

    An int8 program is held to the model with the weights that its int8 weights stand for: rounding is not an error of the
    program. What it does to the features is measured apart (`export.lowering.prefix_errors`). `references` are tensors other
    than the weights, or a program that takes one for the other would pass.
    """
    if not is_installed(engine):
        return None
    run = open_program(engine, data, role)
    taken, values = _weights(module, precision)
    # A program with int8 weights gives no gradients, so what it takes need not be told apart.
    count = len(trained(module)) if precision == "fp32" else len(taken)
    weights, constants = values[: len(trained(module))], (*values[len(trained(module)) :], *references)
    largest = 0.0
    for batch in sorted({1, len(inputs[0])}):
        part = tuple(value[:batch] for value in inputs)
        try:
            actual = run(taken[:count], part, (*taken[count:], *references))
        except Exception as error:  # each runtime has its own classes
            raise ParityError(f"{name} for {engine} cannot run with a batch of {batch}: {error}") from error
        largest = max(largest, _compare(f"{name} for {engine}", actual, eager(module, role, weights, part, constants)))
    return largest


def check_finite(
    role: Role, name: str, module: nn.Module, inputs: Arrays, precision: Precision = "fp32", references: Arrays = ()
) -> None:
    """Raises ParityError if PyTorch itself gives NaN or infinity where the program would be compared with it."""
    _, values = _weights(module, precision)
    count = len(trained(module))
    for value in eager(module, role, values[:count], inputs, (*values[count:], *references)):
        if not value.isfinite().all():
            raise ParityError(
                f"{name} gives NaN or infinity for random inputs and weights, in PyTorch as well; keep logarithms, roots and "
                "quotients away from zero and below, such as by clamp(min=1e-6), also where only their gradient is infinite"
            )


def _weights(module: nn.Module, precision: Precision) -> tuple[Arrays, Arrays]:
    """Weights as the program takes them, and the float32 ones that they stand for."""
    weights = _perturbed(module)
    taken = take(weights, precision)
    return taken, restore(taken, [weight.ndim for weight in weights]) if precision == "int8" else weights


def _compare(name: str, actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of all outputs, in units of max(1, the output's largest value)."""
    largest = 0.0
    if len(actual) != len(expected):
        raise ParityError(f"{name} gives {len(actual)} outputs, expected {len(expected)}")
    for index, (left, right) in enumerate(zip(actual, expected, strict=True)):
        scale = max(1.0, float(right.abs().max()))
        allowed = TOLERANCE * scale
        error = float((left - right).abs().max()) if left.shape == right.shape else float("inf")
        if not error <= allowed:
            raise ParityError(
                f"{name}: output {index} is off by {error:.2g}, allowed {allowed:.2g}; the runtime does not "
                "compute what PyTorch computes. Find the operation by leaving out parts of the layer, and rewrite it"
            )
        largest = max(largest, error / scale)
    return largest


def eager(module: nn.Module, role: Role, weights: Arrays, inputs: Arrays, constants: Arrays = ()) -> list[Tensor]:
    """What the program must give, by PyTorch itself. `constants` are the module's frozen tensors, then those of references."""
    names = list(in_order(module))

    def forward(weights: Arrays, inputs: Arrays) -> object:
        own, copies = weights[: len(names)], weights[len(names) :]
        return functional_call(module, dict(zip(names, own, strict=True)), (*copies, *inputs))

    return differentiate(role, weights, inputs, forward, constants)


def _perturbed(module: nn.Module) -> Arrays:
    """Weights near the module's own; untouched norms (all 1 and 0) would hide terms of the gradient."""
    generator = torch.Generator().manual_seed(1)
    return tuple(value.detach() + 0.05 * torch.randn(value.shape, generator=generator) for value in in_order(module).values())

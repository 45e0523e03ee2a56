"""The programs of a split plan as functions of (weights, inputs), and as graphs.

A program is a forward pass, or what autograd makes of one. `SplitFunction.eager` runs the modules themselves and is what the
program is held to; `SplitFunction.graph` traces the forward pass as `export.graphs.trace` does, and differentiates the trace.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.func import functional_call

from export.graphs.differentiate import as_leaves, results, trace_step
from export.graphs.trace import Arrays, trace_function
from lamina.split.plan import Party

Forward = Callable[[Arrays, Arrays], Arrays]
Finish = Callable[[Forward, Arrays, Arrays], Arrays]


@dataclass(frozen=True)
class SplitFunction:
    """`parts` name the weights, `axes` are the shapes that the modules want of them; `forward_inputs` is how many of the inputs
    the forward pass takes, the others are gradients of the outputs named by `cotangents`."""

    name: str
    runs_on: Party
    module: nn.Module
    parts: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    finish: Finish | None = None
    cotangents: tuple[int, ...] = ()

    @property
    def forward_inputs(self) -> int:
        return len(self.inputs) - len(self.cotangents)


Restore = Callable[[Arrays], Arrays]
"""Weights as a program takes them (int8 or flat where it is so) -> the modules' float32 tensors."""


def eager(function: SplitFunction, restore: Restore, weights: Arrays, inputs: Arrays) -> list[Tensor]:
    """What the program must give, by the modules themselves."""
    given = _finished(function, _forward_of(function.module, restore), weights, inputs)
    return [value.detach() for value in given]


def graph(function: SplitFunction, restore: Restore, weights: Arrays, example: Arrays, max_batch: int) -> ExportedProgram:
    """The program as a graph; `example` are inputs of two samples."""
    forward = trace_function(_forward_of(function.module, restore), weights, example[: function.forward_inputs], max_batch)
    if function.finish is None:
        return forward
    run, given = forward.module(), results(forward)

    def step(weights: Arrays, inputs: Arrays) -> Arrays:
        return _finished(function, lambda w, x: tuple(run(w, x)), weights, inputs)

    return trace_step(step, forward, [given[place] for place in function.cotangents])  # a gradient has the shape of its output


def gradients_of_weights(trained: int) -> Finish:
    """(weights, inputs, gradients of the outputs) -> gradients of the first `trained` weights."""

    def finish(run: Forward, weights: Arrays, inputs: Arrays) -> Arrays:
        leaves = as_leaves(weights[:trained])
        (output,) = run((*leaves, *weights[trained:]), inputs[:-1])
        return torch.autograd.grad(output, leaves, inputs[-1])

    return finish


def gradients_of_input_and_weights(trained: int) -> Finish:
    """The same, with the gradient of the only input before those of the weights."""

    def finish(run: Forward, weights: Arrays, inputs: Arrays) -> Arrays:
        (x,) = as_leaves(inputs[:1])
        leaves = as_leaves(weights[:trained])
        (output,) = run((*leaves, *weights[trained:]), (x,))
        return torch.autograd.grad(output, (x, *leaves), inputs[1])

    return finish


def gradients_of_logits(run: Forward, weights: Arrays, inputs: Arrays) -> Arrays:
    """The fusion net: (features..., gradient of its logits) -> gradients of its weights; the features are constants."""
    leaves = as_leaves(weights)
    _, logits = run(leaves, inputs[:-1])
    return torch.autograd.grad(logits, leaves, inputs[-1])


def classified(run: Forward, weights: Arrays, inputs: Arrays) -> Arrays:
    """Metrics, then gradients: of the loss for features and weights, of the fused loss for the fused logits."""
    features, fused_logits = as_leaves(inputs[:2])
    leaves = as_leaves(weights)
    loss, fused, *counts = run(leaves, (features, fused_logits, inputs[2]))
    own = torch.autograd.grad(loss, (features, *leaves))
    (of_logits,) = torch.autograd.grad(fused, (fused_logits,))
    return (loss.detach(), fused.detach(), *counts, own[0], of_logits, *own[1:])


def transferred(run: Forward, weights: Arrays, inputs: Arrays) -> Arrays:
    """Metrics, then gradients of the loss for features and weights."""
    (features,) = as_leaves(inputs[:1])
    leaves = as_leaves(weights)
    loss, *rest = run(leaves, (features, *inputs[1:]))
    return (loss.detach(), *(value.detach() for value in rest), *torch.autograd.grad(loss, (features, *leaves)))


def device_step(trained: Sequence[int]) -> Finish:
    """Metrics of all modalities, then gradients of the sum of losses for the weights at these places."""

    def finish(run: Forward, weights: Arrays, inputs: Arrays) -> Arrays:
        own = dict(zip(trained, as_leaves(tuple(weights[i] for i in trained)), strict=True))
        total, *rest = run(tuple(own.get(i, value) for i, value in enumerate(weights)), inputs)
        return (*(value.detach() for value in rest), *torch.autograd.grad(total, tuple(own.values())))

    return finish


def _finished(function: SplitFunction, run: Forward, weights: Arrays, inputs: Arrays) -> Arrays:
    return run(weights, inputs) if function.finish is None else function.finish(run, weights, inputs)


def _forward_of(module: nn.Module, restore: Restore) -> Forward:
    names = [name for name, _ in module.named_parameters()]

    def forward(weights: Arrays, inputs: Arrays) -> Arrays:
        given = functional_call(module, dict(zip(names, restore(weights), strict=True)), inputs)
        return (given,) if isinstance(given, Tensor) else tuple(given)

    return forward

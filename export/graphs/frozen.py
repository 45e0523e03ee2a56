"""Frozen segments with int8 weights: the graph takes an int8 matrix and its row scales, and computes in float32.

    (int8 matrices, scales and other weights, features) -> features

Which weights are int8, and in what order they come, is `lamina.encoding.quantize.frozen_weights`. Tensors that the model's
author froze are weights like the others here: they are most of a layer with an adapter, and int8 in the program's memory leaves
their file, and so the assembled model, as it is. The stem stays float32: it is
small, and its error would enter every layer.
"""

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.func import functional_call

from export.graphs.order import make_weights_late
from export.graphs.trace import Arrays, forward_graph, trace_function
from export.models.parameters import in_order
from lamina.bundles.manifest import Precision
from lamina.encoding.quantize import frozen_weights
from lamina.plans.plan import Plan

_MATRIX_AXES = 2


def segment_precision(plan: Plan, name: str) -> Precision:
    """The precision of a frozen segment's weights: that of the plan for layers, fp32 for stems."""
    return plan.training.prefix_precision if ".layers." in name else "fp32"


def frozen_graph(module: nn.Module, example: Arrays, max_batch: int, precision: Precision) -> ExportedProgram:
    """The graph of `module(*inputs)` that takes its weights in this precision."""
    if precision == "fp32":
        return forward_graph(module, example, max_batch)
    names = list(in_order(module))
    weights = tuple(value.detach() for value in in_order(module).values())
    axes = [weight.ndim for weight in weights]

    def run(taken: Arrays, inputs: Arrays) -> Tensor:
        return functional_call(module, dict(zip(names, restore(taken, axes), strict=True)), inputs)

    program = trace_function(run, take(weights, precision), example, max_batch, tuple(module.buffers()))
    make_weights_late(program.graph)
    program.graph_module.recompile()
    return program


def take(weights: Arrays, precision: Precision) -> Arrays:
    """A segment's weights as its frozen program takes them."""
    return tuple(torch.from_numpy(value) for value in frozen_weights([weight.numpy() for weight in weights], precision))


def restore(taken: Arrays, axes: list[int]) -> Arrays:
    """The float32 weights that an int8 program computes with; `axes` counts those of each weight."""
    values = iter(taken)
    return tuple(
        next(values).to(torch.float32) * next(values).unsqueeze(1) if n == _MATRIX_AXES else next(values) for n in axes
    )

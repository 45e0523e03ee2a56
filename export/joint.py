"""The joint graph: forward and backward of a stage in one graph, which every engine runs as plain inference.

(weights, inputs) -> loss, correct, gradient of the loss for each weight
"""

import warnings

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from export.decompositions import LEAN
from export.trace import Arrays, trace_function
from lamina.errors import CutError


def joint_graph(
    forward: ExportedProgram, module: nn.Module, weight_names: list[str], example: Arrays, max_batch: int
) -> ExportedProgram:
    """The joint graph of a stage, made from its forward graph; the module gives shapes and example values only.

    Raises CutError that names a weight which the loss does not depend on: its gradient would not exist.
    """
    run = forward.module()

    def step(weights: Arrays, inputs: Arrays) -> tuple[Tensor, ...]:
        leaves = [weight.detach().requires_grad_(True) for weight in weights]
        loss, correct = run(tuple(leaves), inputs)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        for name, gradient in zip(weight_names, gradients, strict=True):
            if gradient is None:
                raise CutError(f"the loss does not depend on {name}; remove the parameter, or use it in forward()")
        return (loss.detach(), correct, *gradients)  # type: ignore[arg-type]

    weights = tuple(value.detach() for value in module.parameters())
    # The forward graph's own placeholders have one symbol, the batch. From plain example tensors, torch would take any other
    # axis that happens to have the example's batch size for the batch.
    symbolic = [node.meta["val"] for node in forward.graph.nodes if node.op == "placeholder"]
    arguments = (tuple(symbolic[: len(weights)]), tuple(symbolic[len(weights) :]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = make_fx(step, decomposition_table=LEAN, tracing_mode="symbolic")(*arguments)
    _drop_detaches(graph)
    return trace_function(lambda weights, inputs: graph(weights, inputs), weights, example, max_batch)


def _drop_detaches(graph: GraphModule) -> None:
    """The graph is not differentiated again, so a detach is a copy for nothing."""
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()

"""Joint graphs: forward and backward of a stage in one graph, which every engine runs as plain inference.

    joint_graph       (weights, references, inputs) -> loss, correct, gradient of the loss for each weight
    loss_graph        (embeddings, and the label if there is one) -> loss, correct, gradient of the loss for each embedding
    backward_graph    (weights, inputs and gradients of the embeddings) -> gradient for each weight

The last two are the halves of a contrastive step in micro-batches (`lamina.manifest`). Each graph is made from a forward
graph of `export.trace`.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from export.decompositions import LEAN
from export.lean_compilers import lean_torch
from export.trace import Arrays, trace_function
from lamina.errors import CutError

Step = Callable[[Arrays, Arrays], Arrays]


def joint_graph(
    forward: ExportedProgram,
    module: nn.Module,
    weight_names: list[str],
    example: Arrays,
    max_batch: int,
    references: Arrays = (),
) -> ExportedProgram:
    """The joint graph of a stage, made from its forward graph; the module gives shapes and example values only.

    `references` are the tensors that come behind the weights; they are constants, and get no gradient.

    Raises CutError that names a weight which the loss does not depend on: its gradient would not exist.
    """
    run = forward.module()

    def step(weights: Arrays, inputs: Arrays) -> Arrays:
        leaves = _leaves(weights[: len(weight_names)])
        loss, correct = run((*leaves, *weights[len(weight_names) :]), inputs)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        return (loss.detach(), correct, *_all_there(gradients, weight_names))

    weights = tuple(value.detach() for value in module.parameters())
    return _trace_step(step, _placeholders(forward), (*weights, *references), example, max_batch)


def loss_graph(forward: ExportedProgram, example: Arrays, max_batch: int) -> ExportedProgram:
    """The loss of a whole batch, differentiated by the embeddings; `example` holds one embedding for each modality, and then
    the label if there is one."""
    run = forward.module()

    def step(weights: Arrays, inputs: Arrays) -> Arrays:
        leaves = _leaves(tuple(value for value in inputs if value.is_floating_point()))
        loss, correct = run(weights, (*leaves, *inputs[len(leaves) :]))
        return (loss.detach(), correct, *torch.autograd.grad(loss, leaves))

    return _trace_step(step, _placeholders(forward), (), example, max_batch)


def backward_graph(
    forward: ExportedProgram, module: nn.Module, weight_names: list[str], example: Arrays, max_batch: int
) -> ExportedProgram:
    """The gradients of an embedding stage's weights; `example` holds its inputs, then a gradient for each embedding.

    Raises CutError that names a weight which no embedding depends on.
    """
    run = forward.module()
    (results,) = (node.args[0] for node in forward.graph.nodes if node.op == "output")
    given = [node.meta["val"] for node in results]  # the gradient of an embedding has the embedding's shape

    def step(weights: Arrays, inputs: Arrays) -> Arrays:
        leaves = _leaves(weights)
        embeddings = run(leaves, inputs[: -len(given)])
        gradients = torch.autograd.grad(embeddings, leaves, inputs[-len(given) :], allow_unused=True)
        return _all_there(gradients, weight_names)

    weights = tuple(value.detach() for value in module.parameters())
    return _trace_step(step, [*_placeholders(forward), *given], weights, example, max_batch)


def _trace_step(step: Step, symbolic: Sequence[Tensor], weights: Arrays, example: Arrays, max_batch: int) -> ExportedProgram:
    """`symbolic` are the values of the forward graph, which have one symbol, the batch. From plain example tensors, torch
    would take any other axis that happens to have the example's batch size for the batch."""
    arguments = (tuple(symbolic[: len(weights)]), tuple(symbolic[len(weights) :]))
    with warnings.catch_warnings(), lean_torch():
        warnings.simplefilter("ignore")
        graph = make_fx(step, decomposition_table=LEAN, tracing_mode="symbolic")(*arguments)
    _drop_detaches(graph)
    return trace_function(lambda weights, inputs: graph(weights, inputs), weights, example, max_batch)


def _placeholders(forward: ExportedProgram) -> list[Tensor]:
    nodes: list[Node] = [node for node in forward.graph.nodes if node.op == "placeholder"]
    return [node.meta["val"] for node in nodes]


def _leaves(values: Arrays) -> Arrays:
    return tuple(value.detach().requires_grad_(True) for value in values)


def _all_there(gradients: Sequence[Tensor | None], weight_names: list[str]) -> Arrays:
    for name, gradient in zip(weight_names, gradients, strict=True):
        if gradient is None:
            raise CutError(f"the loss does not depend on {name}; remove the parameter, or use it in forward()")
    return tuple(gradients)  # type: ignore[arg-type]


def _drop_detaches(graph: GraphModule) -> None:
    """The graph is not differentiated again, so a detach is a copy for nothing."""
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()

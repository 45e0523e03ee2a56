"""Joint graphs: forward and backward of a stage in one graph, which every engine runs as plain inference.

    joint_graph       (weights, frozen tensors, references, inputs) -> loss, correct, gradient of the loss for each weight
    loss_graph        (embeddings, and the label if there is one) -> loss, correct, gradient of the loss for each embedding
    backward_graph    (weights, frozen tensors, inputs and gradients of the embeddings) -> gradient for each weight

The last two are the halves of a step in micro-batches, of a loss that compares samples (`lamina.bundles.manifest`). Each graph
is made from a forward graph of `export.graphs.trace`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram

from export.graphs.differentiate import as_leaves, results, trace_step
from export.graphs.trace import Arrays
from lamina.errors import CutError


def joint_graph(forward: ExportedProgram, weight_names: Sequence[str]) -> ExportedProgram:
    """The joint graph of a stage, made from its forward graph.

    Frozen tensors and those of references, which come behind the weights that are named, are constants and get no gradient.

    Raises CutError that names a weight which the loss does not depend on: its gradient would not exist.
    """
    run = forward.module()

    def step(weights: Arrays, inputs: Arrays) -> Arrays:
        trained = as_leaves(weights[: len(weight_names)])
        loss, correct = run((*trained, *weights[len(weight_names) :]), inputs)
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        return (loss.detach(), correct, *_all_there(gradients, weight_names))

    return trace_step(step, forward)


def loss_graph(forward: ExportedProgram) -> ExportedProgram:
    """The loss of a whole batch, differentiated by the embeddings. The forward graph takes one embedding for each modality or
    view, and then the label if there is one."""
    run = forward.module()

    def step(weights: Arrays, inputs: Arrays) -> Arrays:
        embeddings = as_leaves(tuple(value for value in inputs if value.is_floating_point()))
        loss, correct = run(weights, (*embeddings, *inputs[len(embeddings) :]))
        return (loss.detach(), correct, *torch.autograd.grad(loss, embeddings))

    return trace_step(step, forward)


def backward_graph(forward: ExportedProgram, weight_names: Sequence[str]) -> ExportedProgram:
    """The gradients of an embedding stage's weights; after the forward graph's inputs comes a gradient for each embedding.

    Raises CutError that names a weight which no embedding depends on.
    """
    run = forward.module()
    given = results(forward)  # the gradient of an embedding has the embedding's shape

    def step(weights: Arrays, inputs: Arrays) -> Arrays:
        trained = as_leaves(weights[: len(weight_names)])
        embeddings = run((*trained, *weights[len(weight_names) :]), inputs[: -len(given)])
        gradients = torch.autograd.grad(embeddings, trained, inputs[-len(given) :], allow_unused=True)
        return _all_there(gradients, weight_names)

    return trace_step(step, forward, given)


def _all_there(gradients: Sequence[Tensor | None], weight_names: Sequence[str]) -> Arrays:
    for name, gradient in zip(weight_names, gradients, strict=True):
        if gradient is None:
            raise CutError(
                f"the loss does not depend on {name}; remove the parameter, use it in forward(), or remove what ends its "
                "gradient on the way (.detach(), torch.no_grad(), integer results)"
            )
    return tuple(gradients)  # type: ignore[arg-type]

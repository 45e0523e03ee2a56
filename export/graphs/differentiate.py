"""A step, which asks for gradients on its way, as one graph.

`make_fx` records what a step runs, on the symbolic values of a forward graph; so the record has the forward graph's symbol, the
batch, and no other. It becomes an `ExportedProgram` as it is. `torch.export` would make the same one by tracing the record
again, for as much time as the record took.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_structure

from export.graphs.trace import Arrays, finished
from export.ops.decompositions import LEAN
from export.ops.lean_compilers import lean_torch

Step = Callable[[Arrays, Arrays], Sequence[Tensor]]
"""(weights, inputs) -> results; gradients by `torch.autograd.grad` of leaves that it makes itself (`as_leaves`)."""


def trace_step(step: Step, forward: ExportedProgram, more_inputs: Sequence[Tensor] = ()) -> ExportedProgram:
    """The graph of a step that runs `forward`: it takes the same weights and inputs, and behind them `more_inputs`, each like
    a symbolic value of the forward graph.

    (From plain example tensors torch would take any axis that happens to have the example's batch size for the batch.)

    Raises CutError for what no program may hold (`export.graphs.trace.finished`).
    """
    names = forward.graph_signature.user_inputs
    taken = [node.meta["val"] for node in forward.graph.find_nodes(op="placeholder") if node.name in names]
    weights = sum(str(name).startswith("weights_") for name in names)
    with warnings.catch_warnings(), lean_torch():
        warnings.simplefilter("ignore")  # about torch's own internals
        record = make_fx(step, decomposition_table=LEAN, tracing_mode="symbolic")(
            tuple(taken[:weights]), (*taken[weights:], *more_inputs)
        )
    return finished(_program(record, weights, forward), [v for v in forward.constants.values() if isinstance(v, Tensor)])


def results(forward: ExportedProgram) -> list[Tensor]:
    """The symbolic values that a graph gives."""
    (nodes,) = forward.graph.output_node().args
    return [node.meta["val"] for node in nodes]


def as_leaves(values: Sequence[Tensor]) -> Arrays:
    """The same values, for `torch.autograd.grad` to differentiate by."""
    return tuple(value.detach().requires_grad_(True) for value in values)


def _program(record: GraphModule, weights: int, forward: ExportedProgram) -> ExportedProgram:
    graph, copies, specs = Graph(), dict[Node, Node](), list[InputSpec]()
    constants = {str(node.target): node for node in record.graph.find_nodes(op="get_attr")}
    for number, (target, node) in enumerate(constants.items()):
        copies[node] = graph.placeholder(f"c_{number}")
        specs.append(InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(f"c_{number}"), target))
    for number, node in enumerate(record.graph.find_nodes(op="placeholder")):
        name = f"weights_{number}" if number < weights else f"inputs_{number - weights}"
        copies[node] = graph.placeholder(name)
        specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(name), None))
    sizes: dict[str, Node] = {}
    for node in record.graph.nodes:
        size = str(node.meta["val"]) if isinstance(node.meta.get("val"), SymInt) else None
        if node.op == "get_attr":
            copies[node] = copies[constants[str(node.target)]]
        elif node.target is torch.ops.aten.detach.default:
            copies[node] = copies[node.args[0]]  # the graph is not differentiated again: a detach is a copy for nothing
        elif size in sizes:
            copies[node] = sizes[size]  # every operation asks for the batch size, or a multiple of it, anew
        elif node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
        if size is not None:
            sizes[size] = copies[node]
    graph.eliminate_dead_code()
    (given,) = graph.output_node().args
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in given]
    call = ModuleCallSignature([], [], _structure(weights, len(specs) - len(constants) - weights), tree_structure(tuple(given)))
    return ExportedProgram(
        root={},
        graph=graph,
        graph_signature=ExportGraphSignature(specs, outputs),
        state_dict={},
        range_constraints=dict(forward.range_constraints),
        module_call_graph=[ModuleCallEntry("", call)],
        constants={target: getattr(record, target) for target in constants},
        verifiers=forward.verifiers,
    )


def _structure(weights: int, inputs: int) -> TreeSpec:
    """That of the call (weights, inputs)."""
    return tree_structure((((0,) * weights, (0,) * inputs), {}))

"""Tracing: modules -> graphs that take their weights as inputs.

    forward_graph    (weights, inputs) -> what the module gives

The tensors of a module that are never trained come behind its weights, as `weights_frozen_0..`, and behind them those of
references (`lamina.names.Reference`), as `weights_n..`: none of them has a batch axis.

A graph is an ATen `ExportedProgram` whose placeholders are `weights_0..` and `inputs_0..`, whose batch axis may be
1..max_batch, and which holds neither tensors nor source paths. So two layers of equal shape give equal graphs, whatever
their place in the model, and `graph_text` tells whether two graphs are equal.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call
from torch.utils._sympy.value_ranges import ValueRanges

from export.faults.trace_errors import opaque
from export.models.parameters import frozen, in_order, trained
from export.ops.lean_compilers import lean_torch
from export.ops.rewrites import plain_operations
from lamina.encoding.tensors import hash_bytes
from lamina.errors import CutError

EXAMPLE_BATCH = 2
_MAX_CONSTANT_ELEMENTS = 16  # a scalar of the code is fine; more is data that belongs in a parameter or a buffer
_KEPT_META = ("val", "tensor_meta")  # the rest are stack traces and module paths of the machine that exported

Arrays = tuple[Tensor, ...]


def example_batch(max_batch: int) -> int:
    """How many samples the example inputs of a graph have."""
    return min(EXAMPLE_BATCH, max_batch)


def forward_graph(module: nn.Module, example: Arrays, max_batch: int, references: Arrays = ()) -> ExportedProgram:
    """The graph of `module(*references, *inputs)` as a function of (weights, frozen tensors and references, inputs)."""
    names = list(in_order(module))
    weights = tuple(value.detach() for value in in_order(module).values())

    def run(weights: Arrays, inputs: Arrays) -> Any:
        own, copies = weights[: len(names)], weights[len(names) :]
        return functional_call(module, dict(zip(names, own, strict=True)), (*copies, *inputs))

    program = trace_function(run, (*weights, *references), example, max_batch, tuple(module.buffers()))
    name_frozen(program, len(trained(module)), len(frozen(module)))
    return program


def name_frozen(program: ExportedProgram, first: int, count: int) -> None:
    """Renames the placeholders `weights_first..`, `count` of them. Two graphs that differ in nothing but what is trained would
    else be one program, and the torch engine, which derives the gradients itself, could not tell which it is to derive."""
    renamed = {f"weights_{first + number}": f"weights_frozen_{number}" for number in range(count)}
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in renamed:
            node.target = renamed[node.name]
            node._rename(renamed[node.name])
    for spec in program.graph_signature.input_specs:
        if spec.arg.name in renamed:
            spec.arg.name = renamed[spec.arg.name]
    program.graph_module.recompile()


def trace_function(
    function: Callable[[Arrays, Arrays], Any], weights: Arrays, example: Arrays, max_batch: int, constants: Arrays = ()
) -> ExportedProgram:
    """Exports a function of (weights, inputs); every input has a leading batch axis of 1..max_batch. The graph may hold the
    `constants`, which are buffers.

    A batch that is always 1 is traced as a size like any other: torch has no symbol for an axis that cannot vary.
    """
    batch = traced_batch(max_batch)
    shapes = (tuple(None for _ in weights), tuple({0: batch} for _ in example)) if max_batch > 1 else None
    with warnings.catch_warnings(), lean_torch():
        warnings.simplefilter("ignore")  # about torch's own internals
        with plain_operations():
            program = torch.export.export(_Function(function), (weights, example), dynamic_shapes=shapes)
    if max_batch > 1:
        allow_batches(program, max_batch)
    return finished(program, constants)


def finished(program: ExportedProgram, constants: Iterable[Tensor] = ()) -> ExportedProgram:
    """The program without what tracing left in it. Raises CutError for what no program may hold: data other than the
    `constants`, random numbers, or a layer that is one operator."""
    _drop_dtype_checks(program)
    _strip(program)
    _refuse_state(program, list(constants))
    return program


def traced_batch(max_batch: int) -> Any:
    """The batch axis while tracing: two samples or more, because torch takes size 1 for a special case."""
    return Dim("batch", min=2, max=max(3, max_batch))


def allow_batches(program: ExportedProgram, max_batch: int) -> None:
    """Declares the graph's only symbol, the batch, as 1..max_batch: no operation of it asks for the size."""
    if len(program.range_constraints) != 1:
        raise CutError(
            f"the graph has {len(program.range_constraints)} sizes that vary, expected the batch alone: a layer must treat "
            "samples alike and use no batch size of its own"
        )
    for symbol in program.range_constraints:
        program.range_constraints[symbol] = ValueRanges(1, max_batch)
    program._guards_code = []


def graph_text(program: ExportedProgram) -> str:
    """A text that is equal for two graphs if and only if they compute the same in the same order, for the same shapes."""
    lines = [f"{node.format_node()} # {_describe(node.meta.get('val'))}" for node in program.graph.nodes]
    ranges = {str(symbol): str(bounds) for symbol, bounds in program.range_constraints.items()}
    constants = {name: _content(value) for name, value in program.constants.items() if isinstance(value, Tensor)}
    return "\n".join([*lines, json.dumps([ranges, constants], sort_keys=True)])


def _content(value: Tensor) -> object:
    if value.numel() <= _MAX_CONSTANT_ELEMENTS:
        return value.tolist()
    return [str(value.dtype), list(value.shape), hash_bytes(value.contiguous().numpy().tobytes())]


class _Function(nn.Module):
    """A module without parameters around a function, because torch exports modules."""

    def __init__(self, function: Callable[[Arrays, Arrays], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, weights: Arrays, inputs: Arrays) -> Any:
        return self.function(weights, inputs)


def _strip(program: ExportedProgram) -> None:
    """Leaves the graph alone: torch would keep the example arrays, that is the weights, and write them into the file."""
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key in _KEPT_META}


def _drop_dtype_checks(program: ExportedProgram) -> None:
    """Tracing `.to()` leaves a check of the dtype that it saw; the manifest promises it."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
    program.graph_module.recompile()


def _refuse_state(program: ExportedProgram, constants: list[Tensor]) -> None:
    for name, value in {**program.state_dict, **program.constants}.items():
        is_data = isinstance(value, Tensor) and value.numel() > _MAX_CONSTANT_ELEMENTS
        if is_data and not any(_is_same(value, constant) for constant in constants):
            raise CutError(
                f"the graph holds a constant tensor {name!r} of shape {tuple(value.shape)}; a program carries no weights: "
                "make it a parameter if it is to be trained, or a buffer (register_buffer) if it is a constant"
            )
    for node in program.graph.nodes:
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            reason, remedy = opaque(str(node.target))
            raise CutError(f"{reason}; {remedy}")


def _is_same(value: Tensor, constant: Tensor) -> bool:
    return value.dtype == constant.dtype and value.shape == constant.shape and torch.equal(value, constant)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, Sequence):
        return f"({', '.join(_describe(item) for item in value)})"
    return str(value)

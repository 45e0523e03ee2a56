"""Lowering a graph to an ExecuTorch program (`.pte`)."""

import warnings
from typing import NamedTuple

import torch
from torch.export import ExportedProgram
from torch.utils._sympy.value_ranges import ValueRanges

from export.graphs.order import make_weights_late, takes_int8
from export.ops.convolutions import convolution
from export.ops.lean_compilers import lean_torch, lean_xnnpack

FORMAT = 2  # raise it when this file changes what it writes: cached programs of the old number are then not used
_LEAST_MAX = 3  # the compiler assumes that the batch is not 1, and would take one of 1..2 for a constant 2


class Lowered(NamedTuple):
    data: bytes
    arena_bytes: int
    """What the runtime allocates for intermediate values, planned for the largest batch."""


def lower_executorch(program: ExportedProgram) -> Lowered:
    """The program without weights inside: they are inputs, and the arena holds no copy of them.

    `force_non_static_weights_for_f32_linear` is what hands the matrix products of weights that are inputs to XNNPACK;
    without it a training step takes 14 times as long.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    max_batch = _max_batch(program)
    with warnings.catch_warnings(), lean_torch(), lean_xnnpack():
        warnings.simplefilter("ignore")
        if max_batch is not None and max_batch < _LEAST_MAX:
            _set_max_batch(program, _LEAST_MAX)
        program = _without_convolutions(program)
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner(force_non_static_weights_for_f32_linear=True)],
            # Both skip work of the compiler and change nothing for contiguous float32: 8 % less time.
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        graph = edge.exported_program().graph
        if takes_int8(graph):
            make_weights_late(graph)  # only here: handing parts to XNNPACK sorts the graph anew
        if max_batch is not None and max_batch < _LEAST_MAX:
            _set_max_batch(edge.exported_program(), max_batch)  # memory is planned for this one
        done = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False)))
    (plan,) = done.executorch_program.execution_plan
    return Lowered(data=bytes(done.buffer), arena_bytes=sum(plan.non_const_buffer_sizes))


def _without_convolutions(program: ExportedProgram) -> ExportedProgram:
    """As matrix products: XNNPACK convolves by constant weights only, and the portable kernel takes 20 times as long."""
    used = {node.target for node in program.graph.nodes if "aten.conv" in str(node.target)}
    if not used:
        return program
    known = torch.export.default_decompositions()
    forms = {operation: known[operation] for operation in used if operation in known}  # conv2d and such -> convolution
    return program.run_decompositions(forms | {torch.ops.aten.convolution.default: convolution})


def _max_batch(program: ExportedProgram) -> int | None:
    """The upper bound of the batch, the only symbol; None if it is always 1."""
    return next((int(bounds.upper) for bounds in program.range_constraints.values()), None)


def _set_max_batch(program: ExportedProgram, max_batch: int) -> None:
    bounds = ValueRanges(1, max_batch)
    for symbol in program.range_constraints:
        program.range_constraints[symbol] = bounds
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    for size in [size for value in values for size in value.shape if isinstance(size, torch.SymInt)]:
        for symbol in size.node.expr.free_symbols:
            size.node.shape_env.var_to_range[symbol] = bounds

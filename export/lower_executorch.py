"""Lowering a graph to an ExecuTorch program (`.pte`)."""

import warnings
from typing import NamedTuple

from torch.export import ExportedProgram

FORMAT = 1  # raise it when this file changes what it writes: cached programs of the old number are then not used


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

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner(force_non_static_weights_for_f32_linear=True)],
            # Both skip work of the compiler and change nothing for contiguous float32: 8 % less time.
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        done = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False)))
    (plan,) = done.executorch_program.execution_plan
    return Lowered(data=bytes(done.buffer), arena_bytes=sum(plan.non_const_buffer_sizes))

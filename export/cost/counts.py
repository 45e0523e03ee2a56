"""What a stage costs a device, before anything is run. The conventions are those of the methods' papers.

FLOPs are multiply-accumulates of the forward pass for one sample, as a profiler counts them: matrix products and
convolutions; norms and activations are negligible. Training costs three times the forward pass, a frozen part once; four times
where micro-batches are embedded before they are differentiated.
Of a self-supervised step, the branch that trains counts for one view with MoCo and BYOL and for both with SimCLR; what copies
of the model compute (momentum, start, previous, teacher) is not counted.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lamina.plans.model import ModelDescription, SelfSupervised
from lamina.plans.plan import SGD, OptimizerSettings, Plan

TRAINING_FACTOR = 3


# Operators that do dense arithmetic, by the words of their names.
_DENSE = re.compile(
    r"(^|_)(mm|addmm|bmm|baddbmm|mv|addmv|dot|vdot|matmul|linear|trilinear|conv\d?d?|convolution|attention|rnn|lstm|gru)(_|$)"
)


def forward_macs(module: nn.Module, example: Iterable[Tensor]) -> int:
    """Multiply-accumulates of one forward pass; `example` holds one sample. Module and example may be on the meta device."""
    return count_forward(module, example)[0]


def count_forward(module: nn.Module, example: Iterable[Tensor]) -> tuple[int, tuple[str, ...]]:
    """(multiply-accumulates, dense operators that the counter does not know) of one forward pass."""
    counter, watch = FlopCounterMode(display=False), _Watch()
    with torch.no_grad(), _unfused(), watch, counter:
        module(*example)
    known = {str(packet).removeprefix("aten.") for packet in counter.flop_registry}
    strangers = {name for name in watch.seen if _DENSE.search(name) and name not in known}
    return int(counter.get_total_flops()) // 2, tuple(sorted(strangers))


class _Watch(TorchDispatchMode):
    """Names of the operators that reach the kernels, after the counter has decomposed what it can."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def _unfused() -> Iterator[None]:
    """On a CPU, the fused kernels of attention, transformer layers and LSTMs would be counted as nothing."""
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with catch_warnings():
            simplefilter("ignore", UserWarning)  # torch warns that a build without Intel GPUs has no TF32
            with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)


def moments_per_parameter(optimizer: OptimizerSettings) -> int:
    """Numbers that the optimiser keeps for each parameter."""
    if isinstance(optimizer, SGD):
        return 1 if optimizer.momentum else 0
    return 2


def counted_views(description: ModelDescription) -> int:
    """How many forward passes of the trained branch a training sample counts for."""
    objective = description.objective
    return 2 if isinstance(objective, SelfSupervised) and objective.method == "simclr" else 1


def planned_bytes(parameters: int, optimizer: OptimizerSettings, activation_bytes: int, reference_values: int = 0) -> int:
    """Weights, gradients, moments and references as float32, and the values between them for one micro-batch."""
    return 4 * (parameters * (2 + moments_per_parameter(optimizer)) + reference_values) + activation_bytes


def held_values(plan: Plan, parameters: int, references: Iterable[int]) -> int:
    """Numbers that a device holds beside the weights it trains: a copy for each reference, of so many numbers each, and the
    weights it started with, where the proximal term asks for them."""
    return sum(references) + (parameters if plan.training.proximal else 0)


def embedding_bytes(plan: Plan) -> int:
    """The embeddings of a whole batch, or their gradients, which take their place, float32: all modalities or both views, and
    the keys of a momentum copy if there is one."""
    objective, each = plan.model.objective, 1
    if isinstance(objective, SelfSupervised):
        each = 4 if objective.has_predictor else 2
    return 4 * plan.training.batch_size * plan.model.projection.output * len(plan.model.modalities) * each


def peak_live_bytes(program: ExportedProgram, batch: int) -> int:
    """The largest sum of tensors alive at once when the graph runs in its written order at this batch size.

    Weights and batch inputs belong to the caller and are not counted; outputs live to the end; a view owns no memory.
    """
    nodes = list(program.graph.nodes)
    owner: dict[Node, Node | None] = {}
    last_use: dict[Node, int] = {}
    for index, node in enumerate(nodes):
        for source in node.all_input_nodes:
            holder = owner[source]
            if holder is not None:
                last_use[holder] = index
        owner[node] = owner[node.all_input_nodes[0]] if _is_view(node) else (node if _owns(node) else None)
    ends: dict[int, list[Node]] = {}
    for holder, index in last_use.items():
        ends.setdefault(index, []).append(holder)
    live = peak = 0
    for index, node in enumerate(nodes):
        if owner[node] is node:
            live += _bytes(node.meta.get("val"), batch)
        peak = max(peak, live)
        live -= sum(_bytes(done.meta.get("val"), batch) for done in ends.get(index, []))
        if owner[node] is node and node not in last_use:
            live -= _bytes(node.meta.get("val"), batch)
    return peak


def _owns(node: Node) -> bool:
    return node.op == "call_function"


def _is_view(node: Node) -> bool:
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    if getattr(node.target, "__name__", "") == "getitem" or node.target is torch.ops.aten._unsafe_view.default:
        return True
    if _dtype(node) != _dtype(node.all_input_nodes[0]):
        return False  # `.to()` gives its input back only if there is nothing to convert
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(value.alias_info is not None for value in schema.returns)


def _dtype(node: Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def _bytes(value: Any, batch: int) -> int:
    if isinstance(value, Tensor):
        return prod(_size(size, batch) for size in value.shape) * value.element_size()
    if isinstance(value, tuple | list):
        return sum(_bytes(item, batch) for item in value)
    return 0


def _size(size: int | torch.SymInt, batch: int) -> int:
    """A size that may depend on the batch, the only symbol of our graphs."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))

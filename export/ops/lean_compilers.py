"""The compilers of torch, ExecuTorch and ONNX without work that changes no program.

`lean_torch` is for all that traces or decomposes a graph, `lean_xnnpack` for lowering to ExecuTorch, `lean_onnx` for ONNX.
Each puts other functions in the place of private ones for the length of a block. Their versions are pinned; where a name is
gone in another version, its part is left out. Two things hold the rest in place: every program is compared with eager PyTorch
before it leaves (`export.lowering.parity`), and `tests/export/test_lean_compilers.py` compares the results with those of the
compilers as they are.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import Parameter, Signature
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node


@contextmanager
def lean_torch() -> Iterator[None]:
    """Traces and decomposes without the Python stack of every node, and copies nothing of the graphs' histories.

    Tracing makes millions of small objects that live as long as the graph; Python would look for garbage among them every 700.
    """
    import torch._export.utils as utils
    import torch.fx.traceback as histories

    with ExitStack() as stack:
        stack.enter_context(_replaced(torch.fx.config, "do_not_emit_stack_traces", lambda _: True))
        stack.enter_context(_replaced(utils, "_materialize_cpp_cia_ops", _only_for_new_operators))
        stack.enter_context(_replaced(histories, "NodeSource", _shared_history))
        stack.enter_context(_seldom_collected())
        yield


@contextmanager
def _seldom_collected() -> Iterator[None]:
    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


@contextmanager
def lean_xnnpack() -> Iterator[None]:
    """Hands a part of a graph to XNNPACK with the passes that can find something in it: of the 17, most trace it anew. And
    writes the Python code of a graph when somebody calls it, instead of after every change."""
    import executorch.backends.xnnpack.xnnpack_preprocess as xnnpack

    with ExitStack() as stack:
        stack.enter_context(_replaced(xnnpack, "XNNPACKPassManager", _needed_passes))
        stack.enter_context(_replaced(GraphModule, "recompile", _on_first_call))
        stack.enter_context(_one_decomposition(_is_functional))
        yield


@contextmanager
def lean_onnx() -> Iterator[None]:
    """Reads ONNX's table of torch operators once for all programs, and looks for no place in the model: none is written."""
    from torch.onnx._internal.exporter import _core, _registration

    with ExitStack() as stack:
        stack.enter_context(_replaced(_registration.ONNXRegistry, "from_torchlib", _read_once))
        stack.enter_context(_replaced(_core, "_get_node_namespace", lambda _: lambda node: (node.name, [], [])))
        stack.enter_context(_one_decomposition(_is_in_onnx))
        yield


@contextmanager
def _one_decomposition(takes: Callable[[ExportedProgram], bool]) -> Iterator[None]:
    """Leaves out decompositions that find nothing to decompose: each would trace the whole graph for nothing.

    One of them also makes a program functional, where a tensor is changed in place or may share memory with another;
    `takes` tells whether the compiler takes a program as it is.
    """

    def decompose(old: Callable[..., ExportedProgram]) -> Callable[..., ExportedProgram]:
        def run(program: ExportedProgram, decomp_table: Any = None, **options: Any) -> ExportedProgram:
            targets = _targets(program)
            if decomp_table is None or any(map(_is_mutable, targets)):
                return old(program, decomp_table, **options)
            if isinstance(decomp_table, dict) and not decomp_table:
                return program  # ExecuTorch does this first, and then decomposes with a table that is not empty
            # The size of an axis is in some tables, and stays as it is.
            finds = any(target in decomp_table for target in targets if target is not torch.ops.aten.sym_size.int)
            return program if not finds and takes(program) else old(program, decomp_table, **options)

        return run

    with _replaced(ExportedProgram, "run_decompositions", decompose):
        yield


@contextmanager
def _replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`make` is given what stands there, and gives what is there within the block."""
    if not hasattr(owner, name):
        yield
        return
    with patch.object(owner, name, make(getattr(owner, name))):
        yield


def _only_for_new_operators(old: Callable[[], None]) -> Callable[[], None]:
    """torch looks up a thousand operators for every namespace of every table; nothing happens unless there are new ones."""

    def look_up() -> None:
        count = len(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))
        if count not in _looked_up:
            old()
            _looked_up.add(count)

    return look_up


_looked_up: set[int] = set()


def _shared_history(old: type) -> type:
    """Where a node came from, with the history of its source instead of a deep copy; nobody changes one."""

    class Shared(old):  # type: ignore[valid-type, misc]
        def __init__(self, node: Node | None, pass_name: str = "", action: Any = None) -> None:
            super().__init__(None, pass_name, action)
            if node:
                self.node_info = self.NodeInfo(name=node.name, target=str(node.target), graph_id=id(node.graph))
                self.from_node = node.meta.get("from_node", [])

        def __deepcopy__(self, memo: dict[int, Any]) -> "Shared":
            return self

    return Shared


def _on_first_call(old: Callable[[GraphModule], Any]) -> Callable[[GraphModule], Any]:
    """The compilers walk through graphs and hardly ever call one, but each pass over a graph writes its code anew."""

    def recompile(graph: GraphModule) -> Any:
        info = getattr(graph.graph._codegen, "pytree_info", None)
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        names = [str(node.target) for node in inputs] if info is None else list(info.orig_args)
        names = ["self", *names[names[:1] == ["self"] :]]  # a program's graph has it already
        if not all(name.isidentifier() for name in names) or any(node.args for node in inputs):
            return old(graph)

        def forward(self: GraphModule, *values: Any, **options: Any) -> Any:
            old(self)  # puts the real `forward` in the place of this one
            return self(*values, **options)

        # Inputs are named by the parameters of `forward`.
        forward.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])  # type: ignore[attr-defined]
        if info is not None:
            graph._in_spec, graph._out_spec = info.in_spec, info.out_spec
        graph.__dict__.setdefault("_code", "")
        type(graph).forward = forward  # every graph module has a class of its own
        return None

    return recompile


def _needed_passes(old: type) -> type:
    class Needed(old):  # type: ignore[valid-type, misc]
        def __init__(self, exported_program: ExportedProgram, passes: Any = None) -> None:
            super().__init__(exported_program, passes)
            nodes = [node for node in exported_program.graph.nodes if node.op == "call_function"]
            names = {_operator(node) for node in nodes}
            # A pass may find something in a part that holds one of its operators, or that computes with constants alone.
            if (
                names <= _PLAIN.keys()
                and all(node.all_input_nodes for node in nodes)
                and not _is_channels_last(exported_program)
            ):
                kept = {"XNNPACKRemoveCloneOpsTransform", *(_PLAIN[name] for name in names)}
                kept |= {"ConvertToSDPAPass"} if {"_softmax", "bmm"} <= names else set()
                self.passes = [each for each in self.passes if each.__name__ in kept]

    return Needed


_ONE_BY_ONE = (
    "abs add ceil clamp cos div elu exp floor gelu leaky_relu log maximum minimum mul neg pow rsqrt sigmoid sin sqrt sub tanh"
)
_MOVES = "clone permute_copy slice_copy unsqueeze_copy view_copy"
_PLAIN = {
    **dict.fromkeys([*_ONE_BY_ONE.split(), *_MOVES.split(), "linear", "_softmax"], ""),
    **dict.fromkeys(["addmm", "bmm", "mm"], "ConvertToLinearPass"),
    **dict.fromkeys(["hardtanh", "relu"], "FuseActivationPass"),
    "cat": "DecomposeConcatenate",
}
"""Operators that one pass at most cares for, and that pass. A part with any other operator goes through all passes."""


def _operator(node: Node) -> str:
    """`add` of `aten.add.Tensor`; the whole name of what is not aten's."""
    name = getattr(node.target, "__name__", str(node.target))
    return name.split(".")[1] if name.startswith("aten.") else name


def _is_channels_last(program: ExportedProgram) -> bool:
    values = [node.meta.get("val") for node in program.graph.nodes]
    return any(isinstance(value, Tensor) and value.dim_order() != tuple(range(value.ndim)) for value in values)


def _targets(program: ExportedProgram) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def _is_mutable(target: Any) -> bool:
    return bool(getattr(getattr(target, "_schema", None), "is_mutable", False))


def _is_functional(program: ExportedProgram) -> bool:
    """A program is, once it has been decomposed; torch calls what it traces a training program."""
    return program.verifier.dialect != "TRAINING"


_onnx_tables: dict[object, Any] = {}


def _read_once(old: Callable[..., Any]) -> Any:
    def read(**options: Any) -> Any:
        key = tuple(sorted(options.items()))
        if key not in _onnx_tables:
            _onnx_tables[key] = old(**options)
        return _onnx_tables[key]

    return staticmethod(read)


def _is_in_onnx(program: ExportedProgram) -> bool:
    operators = [target for target in _targets(program) if isinstance(target, OpOverload)]
    return any(all(map(table.is_registered, operators)) for table in _onnx_tables.values())

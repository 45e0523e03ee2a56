"""Which operators of a traced graph an engine cannot run, and what to write instead. Quick: nothing is lowered.

What an engine can run is asked of the engine: ONNX has a translation of the operator, or of all that it decomposes into;
ExecuTorch's runtime has a kernel for it. An operator that passes here may still be refused in an export, where every program
is run; one that is listed here would be refused for certain.
"""

import re
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram

from export.lowering.runtimes import is_installed
from export.ops.convolutions import convolution
from export.ops.quiet import quiet
from lamina.bundles.manifest import EngineName

_REMEDIES: tuple[tuple[str, str], ...] = (
    (r"weight_norm", "use weight_norm of torch.nn.utils.parametrizations, or remove it before the export"),
    (
        r"matrix_exp|householder",
        "fix a parametrized weight before the export with torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')",
    ),
    (r"scaled_dot_product|flash_attention|efficient_attention", "write attention as softmax(q @ k.transpose(-2, -1)) @ v"),
    (r"batch_norm", "freeze its statistics (evaluation mode), or use GroupNorm or LayerNorm"),
    (
        r"convolution|conv_transpose",
        "enlarge with repeat_interleave and follow with Conv2d, instead of a transposed convolution",
    ),
    (r"adaptive|avg_pool", "use x.mean((2, 3)), a stride in the convolution, or an average pool without overlap and padding"),
    (r"max_pool|fractional", "use MaxPool2d, or a stride in the convolution before it"),
    (r"upsample|interpolate|grid_sampler", "enlarge with repeat_interleave, or resize when the data is prepared"),
    (r"fft|stft", "make the spectrum when the data is prepared, and give it as the input"),
    (r"lstm|gru|rnn", "use a convolution over time or attention instead of a recurrent layer"),
    (r"sort|topk|kthvalue|median|mode", "use a softmax or a mean: an order has no smooth gradient"),
    (r"cumsum|cumprod|logcumsumexp", "write it as a product with a triangular matrix of ones"),
    (r"index_put|scatter|embedding_dense", "compare with torch.arange and multiply, or use nn.Embedding"),
    (r"index|gather|take", "use slices, or a product with a one-hot matrix"),
    (r"rand|bernoulli|dropout|normal", "set dropout to 0: engines would draw other numbers"),
    (r"linalg|inverse|cholesky|svd|det", "replace the decomposition, or move it to where the data is prepared"),
    (r"cond|while_loop|scan", "write the branch as torch.where and the loop with a fixed number of turns"),
    (r"complex|polar|view_as_real|\breal\b|\bimag\b|conj", "compute with real and imaginary parts as two tensors"),
    (r"sparse|coo|csr", "use dense tensors: call .to_dense() before the export"),
    (r"bucketize|searchsorted|histc|bincount|unique|nonzero", "sort values into bins when the data is prepared"),
)
_DEFAULT_REMEDY = "write it in sums, products, matmul, exp, slices and reshapes, or keep this layer frozen in every stage"


def unsupported(engine: EngineName, graph: ExportedProgram) -> list[tuple[str, str]]:
    """(operator, remedy) for each operator that the engine cannot run, in the order of the graph.

    `graph` is one of `export.graphs.trace` or `export.graphs.joint`. Empty for an engine whose packages are not installed here,
    because nothing can be asked of it, and for torch, which runs everything.
    """
    if engine == "torch" or not is_installed(engine):
        return []
    missing = _missing_for_onnx(graph) if engine == "onnxruntime" else _missing_for_executorch(graph)
    return [(operator, remedy(operator)) for operator in missing]


def remedy(operator: str) -> str:
    """What to write instead of an operator such as `aten.cumsum.default`."""
    return next((words for pattern, words in _REMEDIES if re.search(pattern, operator)), _DEFAULT_REMEDY)


def _missing_for_onnx(graph: ExportedProgram) -> list[str]:
    registered = _onnx_operators()
    return _missing(graph, "onnxruntime", lambda operator: operator in registered, _onnx_table)


def _missing_for_executorch(graph: ExportedProgram) -> list[str]:
    kernels = _executorch_kernels()

    def has(operator: OpOverload) -> bool:
        name = operator.name().split(".")[0]
        return name in kernels or f"{name}_copy" in kernels

    def table() -> Any:
        found = torch.export.default_decompositions()
        found[torch.ops.aten.convolution.default] = convolution  # as export.lowering.lower_executorch does
        return found

    return _missing(graph, "executorch", has, table)


def _missing(
    graph: ExportedProgram, engine: EngineName, has: Callable[[OpOverload], bool], table: Callable[[], Any]
) -> list[str]:
    """Decomposing takes seconds, so an operator that once came out well is not decomposed again."""
    decomposes = _decompose_well.setdefault(engine, set())
    lacking = [operator for operator in _lacking(graph, has) if operator not in decomposes]
    if not lacking:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        missing = _lacking(graph.run_decompositions(table()), has)
    if not missing:
        decomposes.update(lacking)
    return missing


_decompose_well: dict[EngineName, set[str]] = {}


def _lacking(graph: ExportedProgram, has: Callable[[OpOverload], bool]) -> list[str]:
    found = {}
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        is_missing = isinstance(node.target, OpOverload) and not has(node.target)
        if is_missing or isinstance(node.target, HigherOrderOperator):
            found[str(node.target)] = None
    return list(found)


@cache
def _onnx_operators() -> frozenset[OpOverload]:
    from torch.onnx._internal.exporter import _decomp, _registration

    return frozenset(_decomp.get_onnx_implemented_overloads(_registration.ONNXRegistry.from_torchlib()))


@cache
def _onnx_table() -> Any:
    from torch.onnx._internal.exporter import _decomp

    return _decomp.create_onnx_friendly_decomposition_table(set(_onnx_operators()))


@cache
def _executorch_kernels() -> frozenset[str]:
    """Names without overloads, such as `aten::add`."""
    with quiet():
        from executorch.extension.pybindings import _C

        return frozenset(str(name).split(".")[0] for name in _C._get_operator_names())

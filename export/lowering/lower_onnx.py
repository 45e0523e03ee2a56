"""Lowering a graph to a plain ONNX model, which any ONNX Runtime runs as inference; training is in the graph."""

import warnings

import onnx
import torch
from onnx import ModelProto
from torch.export import ExportedProgram

from export.ops.lean_compilers import lean_onnx, lean_torch

FORMAT = 2  # raise it when this file changes what it writes: cached programs of the old number are then not used
OPSET = 20
IR_VERSION = 10  # ONNX Runtime 1.19 reads no newer one


def lower_onnx(program: ExportedProgram) -> bytes:
    """The model with inputs and outputs in the graph's order, without weights and without paths of this machine.

    `optimize=True` merges equal initializers, which is wrong for weights that will be trained apart; here it is safe,
    because weights are inputs.
    """
    with warnings.catch_warnings(), lean_torch(), lean_onnx():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program, (), dynamo=True, optimize=True, opset_version=OPSET, verbose=False, external_data=False
        )
    assert exported is not None
    return serialize(exported.model_proto)


def serialize(model: ModelProto) -> bytes:
    """The model's bytes without names, stack traces and paths of the exporting machine."""
    model.ir_version = IR_VERSION
    _clear(model, "metadata_props", "doc_string", "producer_name", "producer_version")
    graph = model.graph
    _clear(graph, "metadata_props", "doc_string", "value_info")
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        _clear(part, "metadata_props", "doc_string")
    for value in (*graph.input, *graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = "batch"  # the only axis that is not fixed
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def _clear(message: object, *fields: str) -> None:
    for field in fields:
        message.ClearField(field)  # type: ignore[attr-defined]

"""The compilers with less work write what they write with all of it."""

import warnings
from contextlib import nullcontext

import onnx
import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from export.graphs.trace import forward_graph
from export.lowering import lower_executorch, lower_onnx
from export.ops import lean_compilers
from export.ops.lean_compilers import lean_onnx, lean_torch, lean_xnnpack


class Mixed(nn.Module):
    """Something for each pass that stays: products, an activation to fuse, a long concatenation, attention, a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(self.norm(x)))
        x = torch.softmax(x @ x.transpose(1, 2), -1) @ x
        return torch.cat([x, x + 1, x, x, x, x], -1)


class Picture(nn.Module):
    """A convolution and a pooling: parts that go through all passes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(2, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(self.kernel(x), 1)


def graph_of(module: nn.Module, *shape: int) -> ExportedProgram:
    torch.manual_seed(0)
    return forward_graph(module, (torch.randn(2, *shape),), 4)


GRAPHS = {"mixed": (Mixed, (4, 6)), "picture": (Picture, (2, 6, 6))}


@pytest.mark.parametrize("name", GRAPHS)
def test_executorch_programs_are_the_same_to_the_last_byte(name, monkeypatch):
    module, shape = GRAPHS[name]
    lean = lower_executorch.lower_executorch(graph_of(module(), *shape))
    for each in ("lean_torch", "lean_xnnpack"):
        monkeypatch.setattr(lower_executorch, each, nullcontext)
    assert lower_executorch.lower_executorch(graph_of(module(), *shape)) == lean


def test_onnx_programs_are_the_same_but_for_the_names_of_values(monkeypatch):
    lean = lower_onnx.lower_onnx(graph_of(Mixed(), 4, 6))
    for each in ("lean_torch", "lean_onnx"):
        monkeypatch.setattr(lower_onnx, each, nullcontext)
    full = lower_onnx.lower_onnx(graph_of(Mixed(), 4, 6))
    assert operations(lean) == operations(full)


def operations(data: bytes) -> list[object]:
    """Each node with its attributes and the number of its inputs, in order."""
    nodes = onnx.load_from_string(data).graph.node
    return [(node.op_type, [each.SerializeToString() for each in node.attribute], len(node.input)) for node in nodes]


def test_tracing_gives_the_same_graph_without_stacks(monkeypatch):
    from export.graphs import trace

    lean = graph_of(Mixed(), 4, 6)
    monkeypatch.setattr(trace, "lean_torch", nullcontext)
    assert trace.graph_text(lean) == trace.graph_text(graph_of(Mixed(), 4, 6))


@pytest.mark.parametrize("block", [lean_torch, lean_xnnpack, lean_onnx])
def test_all_that_is_replaced_exists_in_the_versions_that_are_pinned_and_is_put_back(block, monkeypatch):
    """A name that is gone would be left out in silence, and the export would be slow again."""
    seen = []
    replaced = lean_compilers._replaced

    def watch(owner, name, make):
        seen.append((owner, name, getattr(owner, name)))
        return replaced(owner, name, make)

    monkeypatch.setattr(lean_compilers, "_replaced", watch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with block():
            assert seen
            assert all(getattr(owner, name) != before for owner, name, before in seen)
    assert all(getattr(owner, name) == before for owner, name, before in seen)


def test_a_change_in_place_is_decomposed_all_the_same():
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 1
            y.add_(1)
            return y

    program = torch.export.export(InPlace(), (torch.ones(2),))
    with lean_onnx():
        targets = [str(node.target) for node in program.run_decompositions({}).graph.nodes]
    assert "aten.add.Tensor" in targets and "aten.add_.Tensor" not in targets

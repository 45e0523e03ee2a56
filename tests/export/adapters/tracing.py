"""Tracing a segment as the exporter does."""

from torch import Tensor, nn

from export.graphs.trace import forward_graph, graph_text
from export.ops.rewrites import plain_operations


def trace(segment: nn.Module, x: Tensor) -> str:
    """The graph's text. Raises CutError where a graph would not do."""
    with plain_operations():
        return graph_text(forward_graph(segment, (x,), 4))

"""The order of a graph: a value that depends on weights alone is computed right before its first use.

A matrix that is made from an int8 weight is then alive for one operation, instead of all of them from the start.
"""

import torch
from torch.fx import Graph, Node

WEIGHT_PREFIX = "weights_"  # placeholders of `export.graphs.trace` are `weights_0..`, then `inputs_0..`


def takes_int8(graph: Graph) -> bool:
    """Whether a weight of the graph is int8."""
    return any(_is_weight(node) and node.meta["val"].dtype == torch.int8 for node in graph.nodes)


def make_weights_late(graph: Graph) -> None:
    """Moves what depends on weights alone; the graph computes the same."""
    made: set[Node] = set()
    for node in graph.nodes:
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if _is_weight(node) or (node.op == "call_function" and sources and made.issuperset(sources)):
            made.add(node)
    for node in [node for node in reversed(graph.nodes) if node in made and node.op == "call_function"]:
        position = {other: index for index, other in enumerate(graph.nodes)}
        if node.users:
            min(node.users, key=position.__getitem__).prepend(node)
    graph.lint()


def _is_weight(node: Node) -> bool:
    return node.op == "placeholder" and node.name.startswith(WEIGHT_PREFIX)

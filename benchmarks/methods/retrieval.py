"""Recall at k: how often one of the k nearest answers is a right one.

Several gallery items may be right, such as the same concept in four styles: the best placed of them counts.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

CUTS = (1, 5, 10)


def recall(
    queries: NDArray[np.floating],
    gallery: NDArray[np.floating],
    query_group: NDArray[np.int64],
    gallery_group: NDArray[np.int64],
    cuts: Sequence[int] = CUTS,
) -> dict[int, float]:
    """k -> share of the queries (n, d) with an item of their group among the k most similar of the gallery (m, d), by cosine.

    A wrong item that is exactly as similar as the best right one is placed before it. Raises ValueError for a query
    without any right item in the gallery.
    """
    if missing := sorted(set(query_group.tolist()) - set(gallery_group.tolist())):
        raise ValueError(f"{len(missing)} groups of queries are not in the gallery, the first is {missing[0]}")
    similarity = _unit(queries) @ _unit(gallery).T
    is_right = query_group[:, None] == gallery_group[None, :]
    best_right = np.where(is_right, similarity, -np.inf).max(axis=1, keepdims=True)
    wrong_before = (~is_right & (similarity >= best_right)).sum(axis=1)
    return {cut: float((wrong_before < cut).mean()) for cut in cuts}


def both_ways(
    images: NDArray[np.floating], texts: NDArray[np.floating], group: NDArray[np.int64], cuts: Sequence[int] = CUTS
) -> dict[str, float]:
    """Recall from each image to the captions and from each caption to the images; `group` is that of the rows of both.

    Captions of a group are the same text, so each is taken once.
    """
    _, first = np.unique(group, return_index=True)
    there = recall(images, texts[first], group, group[first], cuts)
    back = recall(texts[first], images, group[first], group, cuts)
    return {f"image_to_text_r{cut}": there[cut] for cut in cuts} | {f"text_to_image_r{cut}": back[cut] for cut in cuts}


def mean_recall(recalls: Mapping[str, float], cut: int) -> float:
    """Of `both_ways`, the mean of both."""
    return (recalls[f"image_to_text_r{cut}"] + recalls[f"text_to_image_r{cut}"]) / 2


def _unit(rows: NDArray[np.floating]) -> NDArray[np.floating]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

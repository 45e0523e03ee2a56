"""Accuracy per round of every method: one panel for each data set and setting, the changes of stage marked."""

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.device.plot import COLORS
from benchmarks.methods.cells import CENTRALISED, LINEAR

_COLUMNS, _FEW = 3, 5
_STYLES = ("-", "--", ":")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws a .png. A line is the mean over seeds, its band their range, where the panel has few lines; a dot is the last round
    before a change of stage; grey lines are the bounds of the data set. Needs matplotlib (`lamina[bench]`).

    Where the score is no test accuracy, the curve is what devices measure after each round: the share of test samples that find
    their own other view, or pair, first in the batch.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = [row for row in rows if any(value is not None for value in row.get("accuracy_by_round", ()))]
    drawn = [row for row in drawn if row["method"] != CENTRALISED]
    panels = list(dict.fromkeys((row["data"], row["setting"]) for row in drawn))
    lines = -(-max(1, len(panels)) // _COLUMNS)
    figure, axes = plt.subplots(
        lines, _COLUMNS, figsize=(5 * _COLUMNS, 4 * lines), squeeze=False, sharey=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (data, setting) in zip(axes.flat, panels, strict=False):
        here = [row for row in drawn if (row["data"], row["setting"]) == (data, setting)]
        methods = list(dict.fromkeys(row["method"] for row in here))
        for number, method in enumerate(methods):
            style = {"color": COLORS[number % len(COLORS)], "linestyle": _STYLES[number // len(COLORS) % len(_STYLES)]}
            _line(axis, [row for row in here if row["method"] == method], method, style, has_band=len(methods) <= _FEW)
        is_accuracy = here[0]["score_is"] == "test accuracy"
        for name, style in ((CENTRALISED, "-."), (LINEAR, ":")) if is_accuracy else ():
            bound = [row["score"] for row in rows if (row["data"], row["method"]) == (data, name)]
            if bound:
                axis.axhline(statistics.mean(bound), linestyle=style, color="0.4", linewidth=1, label=name)
        axis.set_title(f"{data}, {setting}", fontsize=9)
        axis.set(xlabel="round", ylabel="test accuracy" if is_accuracy else "found first in the batch")
        axis.legend(fontsize=6, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=64)
    plt.close(figure)


def _line(axis: Any, rows: Sequence[dict[str, Any]], method: str, style: dict[str, Any], has_band: bool) -> None:
    """Rows of one method differ in the seed alone; a run that ended earlier than others is drawn as far as all go."""
    length = min(len(row["accuracy_by_round"]) for row in rows)
    places = [at for at in range(length) if all(row["accuracy_by_round"][at] is not None for row in rows)]
    by_round = [[row["accuracy_by_round"][at] for row in rows] for at in places]
    means = [statistics.mean(values) for values in by_round]
    numbers = [at + 1 for at in places]
    axis.plot(numbers, means, linewidth=1.4, label=method, **style)
    if has_band:
        low, high = [min(values) for values in by_round], [max(values) for values in by_round]
        axis.fill_between(numbers, low, high, color=style["color"], alpha=0.15, linewidth=0)
    changes = [at for at, (one, next_one) in enumerate(pairwise(rows[0]["stage_by_round"][:length])) if one != next_one]
    marked = [(at + 1, means[places.index(at)]) for at in changes if at in places]
    axis.plot([x for x, _ in marked], [y for _, y in marked], "o", color=style["color"], markersize=4)

"""Bar charts: as PNG with matplotlib, or as one HTML file that needs nothing, as on a device without matplotlib."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.device.results import MemoryResult, Row
from benchmarks.device.tables import batch_text
from lamina.errors import ConfigError

# Told apart by people who do not see red or green: Okabe and Ito's palette.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_BAR, _GAP, _LABEL, _WIDTH, _NUMBER = 16, 12, 330, 900, 90


@dataclass(frozen=True)
class Group:
    """Bars that belong together; `values` and `notes` (what is written where there is no value) follow the chart's series."""

    label: str
    values: tuple[float | None, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    series: tuple[str, ...]
    groups: tuple[Group, ...]

    @property
    def has_values(self) -> bool:
        return any(value is not None for group in self.groups for value in group.values)

    @property
    def largest(self) -> float:
        return max((value for group in self.groups for value in group.values if value is not None), default=0.0) or 1.0


def check_plot_path(path: Path) -> None:
    """Raises ConfigError for a name that cannot be drawn here. For before the measuring, which takes minutes."""
    if path.suffix not in (".png", ".html"):
        raise ConfigError(f"--plot {path}: the name must end in .png or .html")
    if path.suffix == ".png" and find_spec("matplotlib") is None:
        raise ConfigError(
            f"--plot {path}: a .png needs matplotlib (pip install 'lamina[bench]'); a name that ends in .html needs nothing"
        )


def draw(charts: Sequence[Chart], headline: str, notes: Sequence[str], path: Path) -> None:
    """Draws the charts below each other, in the format that the name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        path.write_text(page(charts, headline, notes), encoding="utf-8")
    else:
        draw_png(charts, headline, path)


def result_charts(result: MemoryResult) -> list[Chart]:
    """For each workload: peak, CPU time and energy, a group for each case and a bar for each engine."""
    charts = []
    for workload in dict.fromkeys(row.workload for row in result.rows):
        rows = [row for row in result.rows if row.workload == workload]
        sides = tuple(dict.fromkeys(row.side for row in rows))
        groups: dict[str, dict[str, Row]] = {}
        for row in rows:
            block = "" if row.block is None else f", block {row.block}"
            groups.setdefault(f"{row.case}, {row.optimizer}, batch {batch_text(row)}{block}", {})[row.side] = row
        for name, unit, of, scale in (
            ("peak resident set of the whole process", "MiB", "peak_rss_bytes", 2**20),
            ("CPU time of a step", "ms", "cpu_seconds_per_step", 1e-3),
            ("energy of a step", "J", "joules_per_step", 1.0),
        ):
            made = tuple(
                Group(
                    label,
                    tuple(_scaled(by_side.get(side), of, scale) for side in sides),
                    tuple(_note(by_side.get(side)) for side in sides),
                )
                for label, by_side in groups.items()
            )
            charts.append(Chart(f"{workload}: {name}", unit, sides, made))
    return [chart for chart in charts if chart.has_values]


def page(charts: Sequence[Chart], headline: str, notes: Sequence[str]) -> str:
    """A whole HTML page with the charts as inline SVG; it loads nothing."""
    body = "\n".join(f"<h2>{html.escape(chart.title)} [{html.escape(chart.unit)}]</h2>\n{svg(chart)}" for chart in charts)
    small = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(headline)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222 }}
svg {{ width: 100%; height: auto }}
text {{ font: 12px system-ui, sans-serif; fill: #222 }}
li {{ color: #555 }}
</style></head><body>
<h1>{html.escape(headline)}</h1>
{body}
<ul>{small}</ul>
</body></html>
"""


def svg(chart: Chart) -> str:
    """Horizontal bars: groups below each other, one bar for each series."""
    scale = (_WIDTH - _LABEL - _NUMBER) / chart.largest
    parts, y = [], 0.0
    x = float(_LABEL)
    for color, name in zip(_colors(chart), chart.series, strict=True):
        parts.append(f'<rect x="{x:.0f}" y="2" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="{x + 17:.0f}" y="12">{html.escape(name)}</text>')
        x += 40 + 7 * len(name)
    y = 26.0
    for group in chart.groups:
        middle = y + len(chart.series) * _BAR / 2 + 4
        parts.append(f'<text x="{_LABEL - 8}" y="{middle:.0f}" text-anchor="end">{html.escape(group.label)}</text>')
        for color, value, note in zip(_colors(chart), group.values, group.notes, strict=True):
            width = 0.0 if value is None else max(1.0, value * scale)
            if value is not None:
                parts.append(f'<rect x="{_LABEL}" y="{y:.0f}" width="{width:.1f}" height="{_BAR - 2}" fill="{color}"/>')
            written = _written(value, note)
            parts.append(f'<text x="{_LABEL + width + 5:.1f}" y="{y + 11:.0f}">{html.escape(written)}</text>')
            y += _BAR
        y += _GAP
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y:.0f}" role="img">' + "".join(parts) + "</svg>"


def draw_png(charts: Sequence[Chart], headline: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heights = [max(1, len(chart.groups)) * (0.22 * len(chart.series) + 0.15) + 0.8 for chart in charts] or [1]
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(10, sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    figure.suptitle(headline)
    for axis, chart in zip(axes[:, 0], charts, strict=False):
        thickness = 0.8 / len(chart.series)
        for at, (name, color) in enumerate(zip(chart.series, _colors(chart), strict=True)):
            places = [index + at * thickness for index in range(len(chart.groups))]
            values = [group.values[at] for group in chart.groups]
            axis.barh(places, [value or 0 for value in values], thickness * 0.9, label=name, color=color)
            for place, value, group in zip(places, values, chart.groups, strict=True):
                axis.text(value or 0, place, " " + _written(value, group.notes[at]), va="center", fontsize=7)
        axis.set_yticks([index + 0.4 - thickness / 2 for index in range(len(chart.groups))])
        axis.set_yticklabels([group.label for group in chart.groups], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.15 * chart.largest)
        axis.set(title=chart.title, xlabel=chart.unit)
        axis.legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _written(value: float | None, note: str) -> str:
    if value is None:
        return note
    text = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return f"{text} ({note})" if note else text


def _colors(chart: Chart) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(len(chart.series))]


def _scaled(row: Row | None, of: str, scale: float) -> float | None:
    value = None if row is None else getattr(row, of)
    return None if value is None else value / scale


def _note(row: Row | None) -> str:
    return "" if row is None or row.status == "ok" else row.status

"""Several result files side by side: which rows are the same case, and how they are drawn."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.device.plot import Chart, Group
from benchmarks.device.results import MemoryResult, Row, read_result
from benchmarks.device.tables import title
from lamina.errors import ConfigError


def read_all(paths: Sequence[Path]) -> tuple[list[str], list[MemoryResult]]:
    """(a short name for each file, the results). Raises ConfigError for fewer than two files."""
    if len(paths) < 2:
        raise ConfigError("give at least two result files to compare")
    results = [read_result(path) for path in paths]
    stems = [path.stem for path in paths]
    return [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)], results


def common_rows(names: Sequence[str], results: Sequence[MemoryResult]) -> list[list[Row | None]]:
    """For each case that at least two machines have: its row on each machine, None where it was not measured.

    Raises ConfigError if no case is in two files.
    """
    tables = [{row.key: row for row in result.rows} for result in results]
    keys = dict.fromkeys(key for table in tables for key in table)
    lines = [[table.get(key) for table in tables] for key in keys]
    shared = [line for line in lines if sum(row is not None for row in line) > 1]
    if not shared:
        held = "; ".join(
            f"{name}: {', '.join(sorted({f'{row.workload}/{row.side}/{row.case}' for row in result.rows}))[:200] or 'no rows'}"
            for name, result in zip(names, results, strict=True)
        )
        raise ConfigError(f"the files have no case in common, that is workload, engine, case, optimiser and batches: {held}")
    return shared


def comparison_charts(names: Sequence[str], lines: Sequence[Sequence[Row | None]]) -> list[Chart]:
    """Peak, CPU time and energy, with a bar for each machine."""

    def groups(of: str, unit: float) -> list[Group]:
        return [
            Group(
                title(next(row for row in line if row is not None)),
                tuple(_bar(row, of, unit) for row in line),
                tuple("" if row is None or row.status == "ok" else row.status for row in line),
            )
            for line in lines
        ]

    charts = [
        Chart("peak resident set of the whole process", "MiB", tuple(names), tuple(groups("peak_rss_bytes", 2**20))),
        Chart("CPU time of a step", "ms", tuple(names), tuple(groups("cpu_seconds_per_step", 1e-3))),
        Chart("energy of a step", "J", tuple(names), tuple(groups("joules_per_step", 1.0))),
    ]
    return [chart for chart in charts if chart.has_values]


def _bar(row: Row | None, of: str, unit: float) -> float | None:
    value = None if row is None else getattr(row, of)
    return None if value is None else value / unit

"""Results as tables for a terminal: one machine, or several side by side."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from benchmarks.device.results import MemoryResult, Row, ratio

MIB = 2**20


def result_table(result: MemoryResult, workload: str) -> Table:
    """The rows of one workload: memory, time and energy, and how far below end-to-end training each is."""
    rows = [row for row in result.rows if row.workload == workload]
    columns = ["engine", "case", "optim.", "batch", "peak\nMiB", "PSS\nMiB", "plan\nMiB", "CPU\nms", "full\n/this"]
    columns += ["eager\n/this"]
    has_energy = any(row.joules_per_step is not None for row in rows)
    has_gpu = any(row.cuda_peak_bytes for row in rows)
    has_load = any(row.gpu_load_mean is not None for row in rows)
    columns += ["J\n/step"] * has_energy + ["GPU\nMiB"] * has_gpu + ["GPU\nload"] * has_load
    table = Table(
        title=f"{workload} on {result.device}",
        caption=f"one fresh process per case, 1 thread; full and eager: peak of end-to-end training; {result.sensors}",
        caption_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in columns:
        is_name = column in ("engine", "case", "optim.", "batch")
        table.add_column(column, justify="left" if is_name else "right", min_width=None if is_name else 5, no_wrap=True)
    for row in rows:
        cells = [row.side, row.case, row.optimizer, batch_text(row), *_numbers(row, rows)]
        cells += [number(row.joules_per_step, 3)] * has_energy + [mebibytes(row.cuda_peak_bytes)] * has_gpu
        cells += [number(row.gpu_load_mean, 2)] * has_load
        table.add_row(*cells, style=None if row.status == "ok" else "dim")
    return table


def faults(rows: Sequence[Row]) -> list[str]:
    """A line for each case that gave no numbers."""
    return [f"{title(row)}: {row.status}: {row.detail}" for row in rows if row.status != "ok"]


def comparison_table(names: Sequence[str], results: Sequence[MemoryResult], rows: Sequence[Sequence[Row | None]]) -> Table:
    """A line for each case, and for each machine its peak, CPU time and energy, with the ratio to the first machine."""
    table = Table(title="side by side", caption="in brackets: the ratio to the first column", box=box.SIMPLE, pad_edge=False)
    table.add_column("case")
    table.add_column("")
    for name, result in zip(names, results, strict=True):
        table.add_column(f"{name}\n{result.device}", justify="right")
    for line in rows:
        first = next(row for row in line if row is not None)
        quantities = [
            ("peak MiB", [row and row.peak_rss_bytes for row in line], MIB, 0),
            ("CPU ms/step", [row and row.cpu_seconds_per_step for row in line], 1e-3, 1),
            ("J/step", [row and row.joules_per_step for row in line], 1.0, 3),
        ]
        known = [quantity for quantity in quantities if any(quantity[1])]
        for index, (heading, values, unit, digits) in enumerate(known):
            cells = [_against(value, values[0], unit, digits) for value in values]
            cells = [
                row.status if row is not None and row.status != "ok" and cell == "-" else cell
                for row, cell in zip(line, cells, strict=True)
            ]
            table.add_row(title(first) if index == 0 else "", heading, *cells, end_section=index == len(known) - 1)
    return table


def title(row: Row) -> str:
    """A row's name: `vit12, onnxruntime, cut, sgd, batch 16`."""
    block = "" if row.block is None else f", block {row.block}"
    return f"{row.workload}, {row.side}, {row.case}, {row.optimizer}, batch {batch_text(row)}{block}"


def batch_text(row: Row) -> str:
    """The effective batch, and the micro-batches that it is made of: `64 = 8x8`."""
    return str(row.batch) if row.micro_batch is None else f"{row.batch} = {row.batch // row.micro_batch}x{row.micro_batch}"


def mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / MIB:.0f}"


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _numbers(row: Row, rows: Sequence[Row]) -> list[str]:
    cpu = None if row.cpu_seconds_per_step is None else 1e3 * row.cpu_seconds_per_step
    own, eager = (full_peak(rows, row, side) for side in (row.side, "eager"))
    measured = [mebibytes(row.peak_rss_bytes), mebibytes(row.peak_pss_bytes), mebibytes(row.planned_bytes), number(cpu, 1)]
    below = [number(ratio(peak, row.peak_rss_bytes) if row.status == "ok" else None, 2) for peak in (own, eager)]
    return [*measured, *below]


def full_peak(rows: Sequence[Row], row: Row, side: str) -> int | None:
    """Peak of end-to-end training on a side, with the same optimiser and effective batch."""
    for other in rows:
        alike = (other.workload, other.optimizer, other.batch) == (row.workload, row.optimizer, row.batch)
        if alike and other.side == side and other.case == "full" and other.status == "ok":
            return other.peak_rss_bytes
    return None


def _against(value: float | None, first: float | None, unit: float, digits: int) -> str:
    if not value:
        return "-"
    share = ratio(value, first)
    return f"{value / unit:.{digits}f}" + (f" ({share:.2f})" if share is not None else "")

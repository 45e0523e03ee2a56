"""What does each method reach and cost, against end-to-end federated training on the same data, model and rounds?

Question   Final test accuracy (recall at 5 for image-text pairs), planned memory, FLOPs and bytes of a device, over seeds.
Method     Every cell is a whole federated run, simulated in one process with the real exporter, client and aggregation on
           ONNX Runtime, or PyTorch on a GPU where there is one (`benchmarks.simulate.simulation`); nothing but waiting is left
           out. Beside it a bound from above, the end-to-end plan on one client with all the data, and one from below, a linear
           model on raw values.
Not shown  Published data sets and sizes; rates were chosen on AV-Digits for the three strategies (`benchmarks.demo.plan`).

    python -m benchmarks.methods [--only "seglearn layerwise,emoji"] [--seeds 0,1,2] [--minutes 60] [--workers 2] [--fresh]
    python -m benchmarks.methods --list      what is done and what is left
    python -m benchmarks.methods --summary   the table and the plot again, from the results that are there

A cell that stands in the results file with the plan that it has now is not run again, unless --fresh is given; so a run that
was stopped, or had --minutes, goes on where it was. The file is written after every cell.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import results_file
from benchmarks.methods.cells import Cell, all_cells, chosen
from benchmarks.methods.gradients import gradient_table, summarise_gradients
from benchmarks.methods.plot import draw
from benchmarks.methods.run import plan_hash, row_or_error
from benchmarks.methods.summary import NOTES, bars, markdown_of, recalls_of, summarise, table_of
from edge_client.process.memory import PARENT, die_with_parent
from lamina.errors import ConfigError

RESULT, COMMAND = "methods", "make bench-methods"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cells whose name has all words of a choice; choices with commas between")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after so many minutes")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time, a process each")
    parser.add_argument("--fresh", action="store_true", help="run the chosen cells anew")
    parser.add_argument("--list", action="store_true", dest="is_list")
    parser.add_argument("--summary", action="store_true", dest="is_summary")
    options = parser.parse_args(arguments)
    cells = chosen(all_cells([int(seed) for seed in options.seeds.split(",")]), options.only)
    if not cells:
        raise ConfigError(f"no cell's name has {options.only!r}; --list shows all names")
    console, rows = Console(), known_rows()
    left = [cell for cell in cells if options.fresh or not is_done(cell, rows)]
    if options.is_list:
        for cell in cells:
            console.print(f"{'-' if cell in left else 'done':5}{cell.key}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"{len(cells) - len(left)} of {len(cells)} cells are done")
        return
    if not options.is_summary:
        started, done = time.monotonic(), 0
        for cell, row in results(left, options.workers, 60 * options.minutes):
            done += 1
            if isinstance(row, str):
                console.print(f"{cell.key}: {row}", style="red", highlight=False, markup=False)
                continue
            # What another run of this command wrote in the meantime stays.
            rows = [*(other for other in known_rows() if other["key"] != cell.key), row]
            write_rows(rows)
            minutes = (time.monotonic() - started) / 60
            console.print(
                f"{done} of {len(left)}, {minutes:.0f} min: {cell.key}: {row['score']:.4f} in {row['seconds']:.0f} s",
                highlight=False,
                markup=False,
            )
    rows = in_order(known_rows())
    console.print(table_of(summarise(rows)), gradient_table(summarise_gradients(rows)))
    for note in NOTES:
        console.print(note, highlight=False)
    path = write_rows(rows)
    draw(rows, path.with_suffix(".png"))
    console.print(f"written to {path} and {path.with_suffix('.png')}")


def results(cells: Sequence[Cell], workers: int, seconds: float) -> Iterator[tuple[Cell, dict[str, Any] | str]]:
    """Each cell with its row, or with the error that ended it, as they are finished; none is started after `seconds`."""
    end = time.monotonic() + seconds
    if workers == 1:
        for cell in cells:
            if time.monotonic() >= end:
                return
            yield cell, row_or_error(cell)
        return
    # One thread for arithmetic in each; a process of its own imports everything anew, and so takes this to heart.
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    waiting = list(reversed(cells))
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        running: dict[Future[dict[str, Any] | str], Cell] = {}
        while running or (waiting and time.monotonic() < end):
            while waiting and len(running) < workers and time.monotonic() < end:
                cell = waiting.pop()
                running[pool.submit(row_or_error, cell)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def _end_with(command: int) -> None:
    """Lets a worker end with the command, however that ends, also while the worker was starting."""
    os.environ[PARENT] = str(command)
    die_with_parent()
    del os.environ[PARENT]  # it is meant for this process, and not for those that it starts


def known_rows() -> list[dict[str, Any]]:
    path = results_file.RESULTS / f"{RESULT}.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return found


def is_done(cell: Cell, rows: Sequence[dict[str, Any]]) -> bool:
    return any((row["key"], row["plan"]) == (cell.key, plan_hash(cell)) for row in rows)


def in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as the table of cells has them, seeds of a cell side by side; rows of cells that are gone come last."""
    seeds = sorted({row["seed"] for row in rows})
    names = [cell.key.rpartition("/")[0] for cell in all_cells(seeds or [0])]
    place = {name: number for number, name in reversed(list(enumerate(names)))}
    return sorted(rows, key=lambda row: (place.get(row["key"].rpartition("/")[0], len(names)), row["key"]))


def write_rows(rows: Sequence[dict[str, Any]]) -> Path:
    ordered = in_order(rows)
    summary = summarise(ordered)
    facts = {"notes": list(NOTES), "bars": bars(summary), "summary": summary, "gradients": summarise_gradients(ordered)}
    path = results_file.write_results(RESULT, COMMAND, ordered, **facts)
    page = (f"# `{COMMAND}`", NOTES[0], markdown_of(summary), recalls_of(summary))
    path.with_suffix(".md").write_text("\n\n".join(page))
    return path


if __name__ == "__main__":
    main()

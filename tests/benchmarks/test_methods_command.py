"""The command of the methods' benchmark: what it runs, keeps and tells. No cell is really run here."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import results_file
from benchmarks.methods import __main__ as command
from benchmarks.methods import run as runner
from benchmarks.methods.cells import LINEAR, POOLED, Cell, Setting
from benchmarks.methods.plans import ALL, BASELINE, strategy_plan
from benchmarks.methods.plot import draw
from benchmarks.methods.run import plan_hash
from benchmarks.methods.summary import COSTS, bars, markdown_of, recalls_of, stage_shock, summarise, table_of
from lamina.errors import ConfigError, DataError


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Three cells of each seed that are not really run; gives the names of those that were asked for."""
    asked: list[str] = []

    def fake(cell: Cell) -> dict[str, object]:
        asked.append(cell.key)
        if cell.data == "emoji":
            raise DataError("emojibase-data could not be fetched")
        return row_of(cell)

    def cells(seeds: list[int]) -> list[Cell]:
        some = [("seglearn", "end_to_end"), ("seglearn", "layerwise"), ("emoji", "layerwise")]
        return [Cell(data, method, Setting("natural"), seed) for seed in seeds for data, method in some]

    monkeypatch.setattr(runner, "run_cell", fake)
    monkeypatch.setattr(command, "all_cells", cells)
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    return asked


def row_of(cell: Cell, score: float | None = None, course: tuple[int, ...] = (0, 0, 1)) -> dict[str, object]:
    score = (0.5 if cell.method == "end_to_end" else 0.6) + cell.seed / 100 if score is None else score
    size = 200.0 if cell.method == "end_to_end" else 50.0
    return {
        **cell.as_row(),
        "plan": plan_hash(cell),
        "score": score,
        "score_is": "test accuracy",
        "seconds": 1.0,
        **dict.fromkeys(COSTS, size),
        "stage_by_round": list(course),
        "accuracy_by_round": [0.3, None, score],
    }


def kept(tmp_path: Path) -> list[str]:
    return [row["key"] for row in json.loads((tmp_path / "methods.json").read_text())["rows"]]


def test_done_cells_are_kept_and_only_what_is_left_is_run(few: list[str], tmp_path: Path) -> None:
    command.main(["--seeds", "0", "--only", "seglearn layerwise"])
    assert len(few) == len(kept(tmp_path)) == 1
    command.main(["--seeds", "0,1"])
    assert len(few) == 6 and len(set(few)) == 6
    assert len(kept(tmp_path)) == 4  # those of emoji ended in an error, which is told, and are left for the next time
    command.main(["--seeds", "0,1"])
    assert len(few) == 8 and all(key.startswith("emoji") for key in few[6:])
    command.main(["--seeds", "0", "--only", "seglearn", "--fresh"])
    assert len(few) == 10 and len(kept(tmp_path)) == 4
    content = json.loads((tmp_path / "methods.json").read_text())
    assert content["command"] == "make bench-methods" and len(content["summary"]) == 2
    assert (tmp_path / "methods.png").stat().st_size > 1000


def test_a_row_of_another_plan_is_run_again(few: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command.main(["--seeds", "0", "--only", "seglearn layerwise"])
    monkeypatch.setitem(ALL, "layerwise", lambda *given: strategy_plan(*given, "layerwise", 2))
    command.main(["--seeds", "0", "--only", "seglearn layerwise"])
    assert len(few) == 2 and len(kept(tmp_path)) == 1


def test_a_worker_of_another_process_gives_the_row_or_the_error() -> None:
    """A worker finds its function by name, and not in the module that was started as a program."""
    cell = Cell("seglearn", "unknown", POOLED, 0)
    ((same, answer),) = command.results([cell], workers=2, seconds=60)
    assert same == cell and isinstance(answer, str) and "known methods are end_to_end" in answer
    assert command.row_or_error.__module__ == "benchmarks.methods.run"


_WITH_WORKERS = """
import multiprocessing, time
from benchmarks.methods import __main__ as command
from benchmarks.methods.cells import POOLED, Cell

if __name__ == "__main__":
    answers = command.results([Cell("seglearn", "unknown", POOLED, seed) for seed in range(3)], workers=2, seconds=60)
    next(answers)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_workers_end_with_the_command_however_that_ends(tmp_path: Path) -> None:
    script = tmp_path / "with_workers.py"
    script.write_text(_WITH_WORKERS)
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert workers and all(is_running(pid) for pid in workers)
        process.kill()
    end = time.monotonic() + 10
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """A dead process may stay in the table of processes until its new parent looks at it."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "\nState:\tZ" not in status.read_text()


def test_no_cell_is_started_when_the_time_is_up(few: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--seeds", "0", "--minutes", "0"])
    assert few == []
    command.main(["--seeds", "0", "--list"])
    assert "0 of 3 cells are done" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--list shows all names"):
        command.main(["--only", "nothing like this"])


def test_the_summary_pairs_seeds_and_compares_costs() -> None:
    cells = [Cell("seglearn", method, Setting("natural"), seed) for method in ("end_to_end", "layerwise") for seed in (0, 1)]
    scores = dict(zip((cell.key for cell in cells), (0.80, 0.90, 0.82, 0.91), strict=True))
    linear = {**Cell("seglearn", LINEAR, POOLED, 0).as_row(), "score": 0.5, "score_is": "test accuracy", "plan": LINEAR}
    baseline, layerwise, bound = summarise([*(row_of(cell, scores[cell.key]) for cell in cells), linear])
    assert baseline["points_to_end_to_end"] == 0.0 and baseline["planned_bytes_times_less"] == 1.0
    assert layerwise["points_to_end_to_end"] == pytest.approx(1.5)
    assert layerwise["points_range"] == pytest.approx([1.0, 2.0])
    assert layerwise["score_sd"] == pytest.approx(0.0636, abs=1e-4)
    assert layerwise["bytes_moved_times_less"] == 4.0
    assert bound["points_to_end_to_end"] is None and bound["bytes_moved_times_less"] is None and bound["score_sd"] is None
    assert table_of([baseline, layerwise, bound]).row_count == 3
    lines = markdown_of([baseline, layerwise, bound]).splitlines()
    assert len(lines) == 5 and "| layerwise | 2 | 0.8650 |" in lines[3] and {line.count("|") for line in lines} == {16}


def test_points_to_the_best_rate_are_to_the_one_with_the_best_mean_that_all_seeds_have() -> None:
    def rows(method: str, scores: Sequence[float]) -> list[dict[str, object]]:
        return [row_of(Cell("seglearn", method, Setting("natural"), seed), score) for seed, score in enumerate(scores)]

    common, ours = rows(BASELINE, (0.80, 0.70)), rows("layerwise", (0.85, 0.80))
    half, double = rows("e2e_half_rate", (0.70, 0.90)), rows("e2e_double_rate", (0.95,))  # of which a seed is missing
    alone = summarise([*common, *ours])
    assert [entry["best_rate"] for entry in alone] == [None, None] and alone[1]["points_to_best_rate"] is None
    of = {entry["method"]: entry for entry in summarise([*common, *ours, *half, *double])}
    assert of["layerwise"]["points_to_end_to_end"] == pytest.approx(7.5)
    assert of["layerwise"]["best_rate"] == "e2e_half_rate"
    assert of["layerwise"]["points_to_best_rate"] == pytest.approx(2.5)
    assert of["layerwise"]["points_to_best_rate_range"] == pytest.approx([-10, 15])
    assert of[BASELINE]["points_to_best_rate"] == pytest.approx(-5)
    assert {entry["points_to_best_rate"] for entry in summarise([*ours, *half])} == {None}  # the common rate is missing


def test_recalls_are_means_of_both_ways_over_seeds() -> None:
    def row(seed: int, there: float, back: float) -> dict[str, object]:
        found = {f"image_to_text_r{cut}": there * cut for cut in (1, 5, 10)}
        found |= {f"text_to_image_r{cut}": back * cut for cut in (1, 5, 10)}
        return {**row_of(Cell("emoji", "layerwise", Setting("natural"), seed)), **found}

    (entry,) = summarise([row(0, 0.01, 0.03), row(1, 0.03, 0.05)])
    assert entry["recall"]["5"] == {"mean": pytest.approx(0.15), "sd": pytest.approx(0.0707, abs=1e-4)}
    labelled = row_of(Cell("seglearn", "layerwise", Setting("natural"), 0))
    lines = recalls_of(summarise([row(0, 0.01, 0.03), row(1, 0.03, 0.05), labelled])).splitlines()
    assert len(lines) == 3 and "| 2 | 0.0300 (0.0141) | 0.1500 (0.0707) | 0.3000 (0.1414) |" in lines[2]


def test_a_shock_is_from_the_last_measured_round_to_the_new_layers_untrained() -> None:
    row = {"stage_by_round": [0, 0, 2, 2], "accuracy_by_round": [0.4, 0.5, None, 0.6]}
    assert stage_shock(row) is None
    starts = [{"stage": 2, "accuracy": 0.3}, {"stage": 3, "accuracy": 0.7}]
    assert stage_shock(row | {"stage_starts": starts}) == pytest.approx((20 - 10) / 2)


def test_bars_are_means_over_data_sets_and_name_the_best_layerwise_method() -> None:
    def entry(
        data: str,
        method: str,
        points: float | None,
        setting: str = "natural",
        times_less: float = 4.0,
        bytes_less: float = 12.0,
        to_best: float | None = None,
    ) -> dict[str, object]:
        costs = {f"{cost}_times_less": times_less for cost in COSTS} | {"bytes_moved_times_less": bytes_less}
        best = {"best_rate": None if to_best is None else "e2e_half_rate", "points_to_best_rate": to_best}
        return {"data": data, "setting": setting, "method": method, "points_to_end_to_end": points} | best | costs

    entries = [
        entry("seglearn", "layerwise", -1.0, to_best=-2.5),
        entry("seglearn", "layerwise_2", 2.0),
        entry("seglearn", "linear", None),
        entry("emoji", "layerwise", 0.5),
        entry("emoji", "progressive", 3.0),
        entry("emoji", "layerwise", 90.0, setting="beta=5, 4 clients"),
        entry("seglearn_12", "lw_lean", 0.25, times_less=10.5),
        entry("seglearn_12", "lamina", 0.75, times_less=10.5, bytes_less=9.0),
        entry("seglearn_16", "lamina", -1.0, times_less=12.0),
        entry("seglearn_16", "lamina", 0.5, setting="natural, 54 rounds", times_less=12.0),
        entry("seglearn_16", "layerwise", 9.0, setting="natural, 90 rounds", times_less=12.0),
    ]
    found = bars(entries)
    assert found["layerwise"]["mean_points"] == pytest.approx(-0.25)
    assert found["layerwise"]["mean_points_to_best_rate"] == pytest.approx(-1.0)  # on emoji end to end had one rate
    chosen = {kind: {data: (each["method"], each["points"]) for data, each in found[kind]["by_data"].items()} for kind in found}
    assert chosen["progressive"] == {"emoji": ("progressive", 3.0)}
    assert chosen["best_layerwise"]["seglearn"] == ("layerwise_2", 2.0)
    assert chosen["layerwise_at_a_tenth"] == {"seglearn_12": ("lw_lean", 0.25), "seglearn_16": ("lamina", 0.5)}
    assert found["layerwise_at_a_tenth"]["by_data"]["seglearn_16"]["setting"] == "natural, 54 rounds"
    assert bars([])["layerwise"]["mean_points"] is None


def test_a_plot_is_drawn_also_of_runs_of_unequal_length_and_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cell, other = (Cell("seglearn", "layerwise", Setting("natural"), seed) for seed in (0, 1))
    short = row_of(other) | {"accuracy_by_round": [0.4, 0.5], "stage_by_round": [0, 0]}
    for number, rows in enumerate(([row_of(cell), short], [])):
        path = tmp_path / f"{number}.png"
        draw(rows, path)
        assert path.stat().st_size > 500

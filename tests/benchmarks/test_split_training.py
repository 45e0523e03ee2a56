"""`benchmarks.split_training`: its rows from real processes and from the bound, on a tiny plan and made-up data."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import results_file, split_training
from benchmarks.split_training import AS_RELEASED, CASES, Arrays, Row, deal, plan_of, run, summary, table_of
from lamina.split.plan import FUSION, SplitPlan
from tests.split.house import make_plan, write_data

# What no program depends on differs from the shared tiny plan, so its programs are in the cache.
PLAN = make_plan(training={"batch_size": 8, "learning_rate": 0.02, "local_epochs": 2})
NAMES = (AS_RELEASED, "bound: adapters")
SHORT = {"rounds": 4, "switch": {"window": 2, "threshold": split_training.ALWAYS}}


def _load(folder: Path) -> tuple[Arrays, Arrays]:
    with np.load(write_data(folder / "made.npz", seed=3, train=64, test=48)) as made:
        arrays = {name: made[name] for name in made.files}
    train, test = (
        {name.removeprefix(f"{split}_"): value for name, value in arrays.items() if name.startswith(split)}
        for split in ("train", "test")
    )
    return train, test


@pytest.fixture(scope="module")
def rows(program_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """A run of real processes (transfer as released is the tiny plan's own) and a bound, written to a file of the test."""
    folder = tmp_path_factory.mktemp("rows")
    cases = [
        split_training.Case(case.what, SHORT | dict(case.changes), case.all_layers, case.seeds)
        for case in CASES
        if case.what in NAMES
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMINA_CACHE", str(program_cache))
        patch.setattr(results_file, "RESULTS", folder)
        run(cases, [0], PLAN, lambda seed: _load(folder), Console(quiet=True))

        def again(*_: object) -> Row:
            raise AssertionError("a row that stands in the file is measured again")

        patch.setattr(split_training, "measure", again)
        found = run(cases, [0], PLAN, lambda seed: _load(folder), Console(quiet=True))
    assert json.loads((folder / "split-training.json").read_text())["rows"] == found
    return found


def test_a_run_of_real_processes_tells_accuracy_switch_and_bytes(rows: list[Row]) -> None:
    row = rows[0]
    assert row["what"] == AS_RELEASED and row["rounds"] == 4 and row["switch_round"] == 3
    assert [each["round"] for each in row["accuracy_by_round"]] == [1, 3]
    assert row["accuracy"][FUSION] > 0.5  # four classes: chance is 0.25
    # 32 examples of each of two users in batches of 8, two epochs.
    assert row["step_bytes"]["steps"] == 3 * 2 * 2 * 4 and row["step_bytes_after_switch"]["steps"] == 2 * 2 * 4
    activations = 8 * 2 * 4 * 16 * 4
    assert activations <= row["step_bytes"]["features_up"] < activations + 1000
    assert row["bytes_up_per_round"] > 8 * row["step_bytes"]["features_up"]
    assert row["bytes_up_in_all"] > 3 * row["bytes_up_per_round"]
    assert row["cpu_seconds"] > 0 and row["wall_seconds"] > 0 and row["peak_bytes"] > 1 << 20


def test_the_bound_learns_from_the_same_examples_in_one_place(rows: list[Row]) -> None:
    row = rows[1]
    assert row["what"] == "bound: adapters" and row["switch_round"] is None and row["rounds"] == 4
    assert set(row["accuracy"]) == {"image", "audio", FUSION} and row["accuracy"][FUSION] > 0.5


def test_the_summary_is_the_mean_over_seeds(rows: list[Row]) -> None:
    other = rows[0] | {"seed": 1, "accuracy": {name: value - 0.1 for name, value in rows[0]["accuracy"].items()}}
    mean = summary([rows[0], other, rows[1]])[0]
    assert mean["seeds"] == [0, 1]
    assert mean["accuracy"][FUSION] == pytest.approx(rows[0]["accuracy"][FUSION] - 0.05)
    assert mean["accuracy_range"][FUSION] == [other["accuracy"][FUSION], rows[0]["accuracy"][FUSION]]
    assert table_of([rows[0], other, rows[1]]).row_count == 2


def test_every_case_is_a_plan_and_changes_nothing_else() -> None:
    base = SplitPlan.from_toml(split_training.PLAN)
    names = [case.what for case in CASES]
    assert len(set(names)) == len(names) == 13
    for case in CASES:
        plan, own = plan_of(case, base, 1).model_dump(), {"rounds", "switch", "users", "seed", *case.changes}
        assert {key for key, value in base.model_dump().items() if plan[key] != value} <= own, case.what
        assert plan["users"]["size"] == len(case.has)
        assert plan["users"]["some_modalities"] == (case.what == "one modality, taking part")


def test_users_share_no_example() -> None:
    first, second = deal({"label": np.zeros(1200)}, seed=0)
    assert len(first) == len(second) == split_training.EXAMPLES
    assert not set(first) & set(second)
    np.testing.assert_array_equal(deal({"label": np.zeros(1500)}, seed=0, users=1)[0], deal({"label": np.zeros(1500)}, 0, 3)[0])

"""`make bench-fidelity`: a row tells the truth about every program, and an interrupted run goes on where it was."""

import json

import pytest
from rich.console import Console
from torch import nn

from benchmarks import fidelity, results_file
from export.lowering import parity
from export.plans.resolve import resolve
from lamina.plans.model import Values

QUIET = Console(quiet=True)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.input = Values(shape=(3,))
        self.stem, self.layers, self.pool = nn.Linear(3, 4), nn.ModuleList([nn.Linear(4, 4)]), nn.Identity()


def tiny():
    """a module of one block"""
    return Tiny()


def pair():
    return {"one": Tiny(), "other": Tiny()}


@pytest.fixture(autouse=True)
def _one_tiny_model_and_a_results_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(fidelity, "MODELS", {"tiny": tiny, "other": tiny})
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)


@pytest.fixture
def measured(monkeypatch):
    """Counts measurements instead of making them; those in `failing` give a row that does not hold."""

    class Measured(list):
        failing: tuple[str, ...] = ()

        def __call__(self, model, engine):
            self.append((model, engine))
            result = {"error": "ParityError: off"} if model in self.failing else {"largest_error": 1e-6}
            return {"model": model, "is": "", "engine": engine, "programs": {"train": 1}, "seconds": 1.0} | result

    calls = Measured()
    monkeypatch.setattr(fidelity, "measure", calls)
    return calls


def written(tmp_path):
    content = json.loads((tmp_path / "fidelity.json").read_text())
    return [(row["model"], row["engine"]) for row in content["rows"]]


def shift_eager(monkeypatch, by):
    exact = parity.eager
    monkeypatch.setattr(parity, "eager", lambda *arguments: [value + by for value in exact(*arguments)])


def test_a_row_counts_the_programs_of_all_stages_and_says_their_largest_error(monkeypatch):
    shift_eager(monkeypatch, 5e-6)
    row = fidelity.measure("tiny", "torch")
    assert row["programs"] == {
        "train": 1
    }  # one layer, nothing is frozen; the torch engine evaluates with the file it trains with
    assert 4e-6 < row["largest_error"] == max(row["largest_error_by_role"].values()) < 6e-6
    assert row["program_bytes"] > 1000
    assert row["is"] == "a module of one block"
    assert fidelity.holds(row)


def test_frozen_segments_and_the_programs_of_contrastive_micro_batches_are_measured_too():
    settings = {"training": {"batch_size": 4, "micro_batch": 2}, "freeze_stems": True}
    found = fidelity.measure_programs(resolve(f"{__name__}:pair", settings), "torch")
    assert set(found["programs"]) == {"backward", "embed", "loss", "frozen"} == set(found["largest_error_by_role"])


def test_a_program_that_is_off_is_a_row_with_the_reason_that_does_not_hold(monkeypatch):
    shift_eager(monkeypatch, 1e-3)
    row = fidelity.measure("tiny", "torch")
    assert "ParityError: the train program of stage 0 for torch: output 0 is off by" in row["error"]
    assert not fidelity.holds(row)


def test_programs_that_nothing_could_run_do_not_count_as_right(monkeypatch):
    monkeypatch.setattr(parity, "is_installed", lambda engine: False)
    row = fidelity.measure("tiny", "torch")
    assert row["error"] == "1 of 1 programs were not run: the runtime of torch is not installed"
    assert not fidelity.holds(row)


def test_a_second_run_keeps_rows_and_measures_only_what_is_missing(measured, tmp_path):
    fidelity.run(["tiny"], ["torch"], False, QUIET)
    rows = fidelity.run(["other", "tiny"], ["torch"], False, QUIET)
    assert measured == [("tiny", "torch"), ("other", "torch")]
    assert [row["model"] for row in rows] == ["other", "tiny"]
    assert written(tmp_path) == [("tiny", "torch"), ("other", "torch")]  # in the order of the models


def test_a_row_that_failed_is_measured_again(measured):
    measured.failing = ("tiny",)
    fidelity.run(["tiny"], ["torch"], False, QUIET)
    measured.failing = ()
    (row,) = fidelity.run(["tiny"], ["torch"], False, QUIET)
    assert len(measured) == 2
    assert fidelity.holds(row)


@pytest.mark.parametrize("what", ["versions", "libraries", "formats"])
def test_rows_of_another_version_are_measured_again(measured, monkeypatch, tmp_path, what):
    fidelity.run(["tiny", "other"], ["torch"], False, QUIET)
    monkeypatch.setattr(fidelity, what, lambda: {"torch": "another"})
    fidelity.run(["tiny"], ["torch"], False, QUIET)
    assert len(measured) == 3
    assert written(tmp_path) == [("tiny", "torch")]


def test_fresh_measures_all_again_and_keeps_the_rows_of_other_models(measured, tmp_path):
    fidelity.run(["tiny", "other"], ["torch"], False, QUIET)
    fidelity.run(["tiny"], ["torch"], True, QUIET)
    assert measured == [("tiny", "torch"), ("other", "torch"), ("tiny", "torch")]
    assert written(tmp_path) == [("tiny", "torch"), ("other", "torch")]


@pytest.mark.parametrize(("failing", "status"), [((), 0), (("other",), 1)])
def test_the_command_fails_if_any_row_does(measured, monkeypatch, capsys, failing, status):
    measured.failing = failing
    monkeypatch.setattr("sys.argv", ["fidelity", "--engine", "torch"])
    with pytest.raises(SystemExit) as ended:
        fidelity.main()
    assert ended.value.code == status
    assert f"largest error of all: 1.0e-06 ({2 - len(failing)} of 2 rows within 1e-05)" in capsys.readouterr().out

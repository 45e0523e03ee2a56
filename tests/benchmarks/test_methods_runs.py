"""`benchmarks.methods`: cells that are run, what they score and cost, and what is looked at between their rounds."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.methods import pretraining
from benchmarks.methods import run as runner
from benchmarks.methods.cells import (
    LINEAR,
    POOLED,
    UNTRAINED,
    Cell,
    Setting,
)
from benchmarks.methods.data_sets import DATA_SETS, DataSet, Loaded
from benchmarks.methods.gradients import GradientProbe, gradient_table, summarise_gradients
from benchmarks.methods.plans import strategy_plan
from benchmarks.methods.run import run_cell
from benchmarks.methods.stage_start import StageStartProbe
from benchmarks.methods.trained import load_weights
from export.models.models import build_model, zero_late_layers
from lamina.errors import DataError
from lamina.plans.model import ModelDescription
from tests.benchmarks.tiny_data import PAIR, TINY, load_pairs, load_tiny


@pytest.fixture
def tiny_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATA_SETS, "tiny", DataSet(TINY, load_tiny))
    monkeypatch.setitem(DATA_SETS, "pair", DataSet(PAIR, load_pairs))
    monkeypatch.setitem(DATA_SETS, "fashion_tiny", DataSet(TINY, load_tiny))


def test_a_cell_gives_a_row_with_its_score_its_costs_and_its_course(tiny_data: None) -> None:
    row = run_cell(Cell("tiny", "layerwise", Setting("beta=5", 3, 0.67), 0, rounds=4))
    json.dumps(row)
    assert row["score_is"] == "test accuracy" and row["score"] == pytest.approx(row["accuracy_by_round"][-1], abs=1e-5)
    assert row["score"] > 0.36  # three classes: chance is 0.33
    assert row["stage_by_round"] == [0, 0, 1, 1] and len(row["train_loss_by_round"]) == 4 and row["devices"] == 3
    assert row["planned_bytes"] > 0 and row["macs_per_sample"] > 0
    assert row["bytes_moved"] == row["bytes_down"] + row["bytes_up"] > 0
    # With the layer of stage 1 attached and not yet trained; test rows are not trained on, and of three classes.
    assert [start["stage"] for start in row["stage_starts"]] == [1] and 0 < row["stage_starts"][0]["accuracy"] <= 1
    assert [[norm is not None for norm in norms] for norms in row["gradient_by_round"]] == [[True, False]] * 2 + [
        [False, True]
    ] * 2


def test_gradients_are_those_of_the_layers_that_a_stage_trains() -> None:
    loaded = load_tiny(0)
    plan = strategy_plan(TINY, 4, 1, 3, "layerwise")
    model = build_model(TINY, 3)
    weights = {
        name: {key: p.detach().numpy() for key, p in module.named_parameters()} for name, module in model.segments().items()
    }
    probe = GradientProbe(plan, loaded.train)
    for stage in (0, 1):
        probe(SimpleNamespace(stage=stage), lambda: weights)

    def wanted(description: ModelDescription, layer: int) -> float:
        eager = build_model(description, 5)
        load_weights(eager, description, weights)
        (logits,) = eager(torch.from_numpy(loaded.train["audio"]))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(loaded.train["label"])).backward()
        block = eager.segments()[f"audio.layers.{layer}"]
        return float(torch.cat([p.grad.flatten() for p in block.parameters()]).norm())

    one = TINY.model_copy(update={"encoders": (TINY.encoder("audio").first(1),)})
    assert probe.by_round == [[pytest.approx(wanted(one, 0), rel=1e-3), None], [None, pytest.approx(wanted(TINY, 1), rel=1e-3)]]


def test_a_stages_start_is_the_model_with_its_new_layer_as_it_was_made() -> None:
    loaded = load_tiny(0)
    for zero_init in (False, True):
        plan = strategy_plan(TINY, 4, 1, 3, "layerwise", more={"zero_init": zero_init})
        model = build_model(TINY, 3)
        zero_late_layers(model.segments(), plan)
        with torch.no_grad():  # a layer that adds much, unless what it adds is zero
            for parameter in model.segments()["audio.layers.1"].parameters():
                parameter.mul_(30)
        weights = {
            name: {key: p.detach().numpy() for key, p in module.named_parameters()} for name, module in model.segments().items()
        }
        probe = StageStartProbe(plan, loaded.test)
        for number in (0, 1):
            probe(SimpleNamespace(stage=0, round=number), lambda weights=weights: weights)
        probe(SimpleNamespace(stage=1, round=1), lambda weights=weights: weights)  # the last stage: nothing begins

        def accuracy(description: ModelDescription, weights: dict[str, dict[str, np.ndarray]] = weights) -> float:
            eager = build_model(description, 5).eval()
            load_weights(eager, description, weights)
            (logits,) = eager(torch.from_numpy(loaded.test["audio"]))
            return float((logits.argmax(-1).numpy() == loaded.test["label"]).mean())

        one = TINY.model_copy(update={"encoders": (TINY.encoder("audio").first(1),)})
        assert probe.by_stage == [{"stage": 1, "accuracy": pytest.approx(accuracy(TINY), abs=1e-4)}]
        assert (accuracy(TINY) == accuracy(one)) == zero_init  # a layer that begins as the identity changes nothing


def test_gradients_are_told_by_layer_and_the_first_beside_the_last() -> None:
    rows = [
        {"data": "d", "setting": "s", "method": "progressive", "seed": seed, "gradient_by_round": [[4.0, None], [scale, 1.0]]}
        for seed, scale in ((0, 2.0), (1, 6.0))
    ]
    (entry,) = summarise_gradients([*rows, {"data": "d", "setting": "s", "method": "linear", "seed": 0}])
    assert entry["norm_by_layer"] == [4.0, 1.0] and entry["first_to_last"] == 4.0 and entry["seeds"] == [0, 1]
    assert gradient_table([entry]).row_count == 1


def test_of_a_contrastive_model_the_score_is_recall_and_training_raises_it(tiny_data: None) -> None:
    row = run_cell(Cell("pair", "end_to_end", Setting("natural"), 0, rounds=12))
    assert row["score_is"] == "recall at 5"
    assert row["score"] == pytest.approx((row["image_to_text_r5"] + row["text_to_image_r5"]) / 2)
    assert row["score"] > 0.6  # chance is 5 of 12


def test_pairs_whose_right_answers_nobody_knows_are_judged_by_a_probe(tiny_data: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(seed: int) -> Loaded:
        loaded = load_tiny(seed)
        parts = (
            {"image": part["audio"], "text": part["audio"], "label": part["label"]} for part in (loaded.train, loaded.test)
        )
        train, test = parts
        return Loaded(train, test, owner=loaded.owner, held_out=test if seed else None)

    monkeypatch.setitem(DATA_SETS, "pair", DataSet(PAIR, load))
    row = run_cell(Cell("pair", "end_to_end", Setting("natural"), 0, rounds=2))
    assert row["score_is"] == "linear probe accuracy" and row["score"] > 0.5  # three classes far apart: chance is 0.33
    assert "held_out_score" not in row
    row = run_cell(Cell("pair", "end_to_end", Setting("natural"), 1, rounds=2))
    assert row["held_out_score"] == row["score"]


def test_a_run_with_public_rows_starts_from_encoders_that_were_trained_on_them(
    tiny_data: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell("tiny", "layerwise", Setting("natural"), 0, rounds=2)
    from_random = run_cell(cell)["train_loss_by_round"][0]
    monkeypatch.setitem(DATA_SETS, "tiny", DataSet(TINY, lambda seed: replace(load_tiny(seed), public=load_tiny(7).train)))
    monkeypatch.setattr(pretraining, "EPOCHS", 8)
    assert run_cell(cell)["train_loss_by_round"][0] < from_random

    trained, fresh = pretraining.pretrained_model(TINY, load_tiny(7).train, 3).segments(), build_model(TINY, 3).segments()
    moved = {
        name: any(bool((a != b).any()) for a, b in zip(part.parameters(), fresh[name].parameters(), strict=True))
        for name, part in trained.items()
    }
    assert moved == {name: name.startswith(("audio.stem", "audio.layers")) for name in fresh}


def test_the_probe_of_an_untrained_model_sees_the_labels_and_the_run_does_not(tiny_data: None) -> None:
    row = run_cell(Cell("fashion_tiny", UNTRAINED, POOLED, 0))
    assert row["score_is"] == "linear probe accuracy" and row["score"] > 0.5  # three classes far apart: chance is 0.33


def test_a_cell_that_cannot_have_its_data_tells_so(tiny_data: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seed: int) -> Loaded:
        raise DataError("the data package seglearn could not be fetched")

    monkeypatch.setitem(DATA_SETS, "tiny", DataSet(TINY, fail))
    with pytest.raises(DataError, match="seglearn"):
        runner.run_cell(Cell("tiny", LINEAR, POOLED, 0))

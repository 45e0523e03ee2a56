"""`benchmarks.methods`: its data, bounds, plans and cells. No cell is run here."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.demo.plan import skewed_rounds
from benchmarks.methods.bounds import linear_accuracy, linear_recalls
from benchmarks.methods.cells import (
    CENTRALISED,
    LINEAR,
    LONG_ROUNDS,
    MANY,
    POOLED,
    ROUNDS,
    UNTRAINED,
    USUAL,
    Cell,
    Setting,
    all_cells,
    chosen,
    usual_setting,
)
from benchmarks.methods.data_sets import DATA_SETS, Loaded, amplitudes, client_rows, deal, deal_server
from benchmarks.methods.plans import (
    ALL,
    BASELINE,
    METHODS,
    OPTIONS,
    PAIRS,
    PARTIAL,
    PRETRAINED,
    REAL,
    RECIPE,
    SELF_SUPERVISED,
    baseline_of,
    strategy_plan,
)
from benchmarks.methods.retrieval import both_ways, recall
from benchmarks.methods.run import deal_cell, plan_hash, plan_of
from lamina.errors import ConfigError
from lamina.plans.model import ModuleEncoder
from tests.benchmarks.tiny_data import load_pairs, load_tiny

# Data and bounds


@pytest.mark.parametrize(("split", "sizes"), [("natural", [30, 30]), ("even", [20, 20, 20]), ("pooled", [60])])
def test_a_split_deals_every_row_to_one_client(split: str, sizes: list[int]) -> None:
    parts = client_rows(load_tiny(0), split, 3, seed=1)
    assert [len(part) for part in parts] == sizes
    assert sorted(np.concatenate(parts).tolist()) == list(range(60))


@pytest.mark.parametrize("split", ["beta=", "uneven", "beta"])
def test_an_unknown_split_is_refused(split: str) -> None:
    with pytest.raises(ConfigError, match="known: beta=B"):
        client_rows(load_tiny(0), split, 3, seed=1)


def test_a_split_that_the_data_do_not_allow_is_refused() -> None:
    with pytest.raises(ConfigError, match="no labels"):
        client_rows(load_pairs(0), "beta=1", 2, 0)
    loaded = load_tiny(0)
    with pytest.raises(ConfigError, match="needs data with owners"):
        client_rows(Loaded(loaded.train, loaded.test), "natural", 2, 0)


def test_dealt_files_hold_the_clients_rows_and_all_test_rows_once(tmp_path: Path) -> None:
    loaded = load_tiny(0)
    files = deal(loaded, "natural", 0, 0, tmp_path)
    arrays = [dict(np.load(file)) for file in files]
    np.testing.assert_array_equal(arrays[1]["train_audio"], loaded.train["audio"][1::2])
    held_out = np.concatenate([each["test_audio"] for each in arrays])
    np.testing.assert_array_equal(np.sort(held_out.ravel()), np.sort(loaded.test["audio"].ravel()))


def test_limited_clients_are_asked_nothing_and_have_one_modality_in_turn_or_all(tmp_path: Path) -> None:
    loaded = load_pairs(0)
    for are_whole in (True, False):
        files = deal(loaded, "even", 4, 0, tmp_path / str(are_whole), limited=0.5, are_whole=are_whole)
        arrays = [dict(np.load(file)) for file in files]
        assert [len(each["test_image" if "test_image" in each else "test_text"]) for each in arrays] == [12, 12, 0, 0]
        has = [sorted(name for name in each if name.startswith("train")) for each in arrays]
        both = ["train_image", "train_text"]
        assert has == ([both] * 4 if are_whole else [both, both, both[:1], both[1:]])
        assert sum(len(each[name]) for each, names in zip(arrays, has, strict=True) for name in names[:1]) == 40


@pytest.mark.parametrize(
    ("method", "setting", "taking_part"),
    [
        ("end_to_end", Setting("even", 4, small=0.5), 2),
        ("layerwise", Setting("even", 4, small=0.5), 4),
        ("layerwise", Setting("even", 4, lacking=0.5), 2),
        ("lw_partial", Setting("even", 4, lacking=0.5), 4),
        ("e2e_partial", Setting("even", 4, lacking=0.5), 4),
        ("end_to_end", Setting("even", 4), 4),
    ],
)
def test_clients_that_a_plan_asks_too_much_of_are_left_out(
    method: str, setting: Setting, taking_part: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    part = {name: rng.normal(size=(16, 3, 4)).astype(np.float32) for name in ("accelerometer", "gyroscope")}
    part["label"] = np.arange(16) % 2
    cell = Cell("seglearn", method, setting, 0)
    plan = plan_of(cell)
    assert plan is not None
    assert len(deal_cell(cell, plan, Loaded(part, part), tmp_path)) == taking_part


def test_the_servers_rows_are_a_file_without_labels(tmp_path: Path) -> None:
    loaded = load_tiny(0)
    with pytest.raises(ConfigError, match="rows that no client has"):
        deal_server(loaded, tmp_path)
    server = {"audio": loaded.test["audio"]}
    path = deal_server(Loaded(loaded.train, loaded.test, server=server), tmp_path)
    assert list(np.load(path)) == ["train_audio"]


def test_amplitudes_find_the_frequency_of_a_wave_whatever_its_phase() -> None:
    time = np.arange(100) / 100
    waves = np.stack([np.sin(2 * np.pi * (7 * time + phase)) for phase in (0.0, 0.3)])[:, None]
    found = amplitudes(waves)
    assert found.shape == (2, 1, 50) and found.dtype == np.float32
    assert found.argmax(axis=-1).tolist() == [[6], [6]]  # frequency 0 is left out
    np.testing.assert_allclose(found[0, 0, 6], found[1, 0, 6], rtol=1e-3)


def test_the_linear_bound_separates_classes_with_far_means_and_not_noise() -> None:
    accuracy, _ = linear_accuracy(load_tiny(0, 300), 0)
    assert accuracy > 0.9
    rng = np.random.default_rng(0)
    noise = [{"x": rng.normal(size=(n, 10)).astype(np.float32), "label": rng.integers(0, 4, n)} for n in (400, 400)]
    assert 0.1 < linear_accuracy(Loaded(*noise), 0)[0] < 0.4  # four classes: chance is 0.25


def test_the_linear_bound_of_pairs_finds_the_captions_of_new_images_and_nothing_in_noise() -> None:
    """An image is a sum of patterns, one for each word of its caption; captions of the test are new combinations."""
    rng = np.random.default_rng(0)
    patterns = rng.normal(size=(21, 40))
    captions = np.array([rng.choice(np.arange(1, 21), 3, replace=False) for _ in range(360)])
    text = np.pad(captions, ((0, 0), (0, 2)))  # 0 is padding
    image = (patterns[captions].sum(axis=1) + 0.1 * rng.normal(size=(360, 40))).astype(np.float32)

    def recalls(image: np.ndarray) -> dict[str, float]:
        parts = [{"image": image[rows], "text": text[rows]} for rows in (slice(300), slice(300, None))]
        return linear_recalls(Loaded(*parts, test_groups=np.unique(text[300:], axis=0, return_inverse=True)[1]), 0)[0]

    found, chance = recalls(image), recalls(rng.normal(size=image.shape).astype(np.float32))
    assert found["image_to_text_r1"] > 0.9 and found["text_to_image_r1"] > 0.9
    assert chance["image_to_text_r5"] < 0.25 and chance["text_to_image_r5"] < 0.25  # of 60: 0.08
    with pytest.raises(ConfigError, match="same answer"):
        linear_recalls(load_tiny(0), 0)


# Retrieval


def test_recall_counts_queries_with_a_right_answer_among_the_nearest() -> None:
    gallery = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    queries = np.array([[2.0, 0.1], [0.1, 3.0]])
    group = np.array([0, 1, 2])
    assert recall(queries, gallery, np.array([0, 1]), group, (1, 2)) == {1: 1.0, 2: 1.0}
    assert recall(queries, gallery, np.array([1, 1]), group, (1, 2, 3)) == {1: 0.5, 2: 0.5, 3: 1.0}


def test_equal_answers_are_no_answer() -> None:
    same = np.ones((4, 3))
    group = np.arange(4)
    assert recall(same, same, group, group, (1, 3, 4)) == {1: 0.0, 3: 0.0, 4: 1.0}


@given(st.integers(0, 2**31), st.integers(2, 12))
def test_recall_grows_with_k_and_is_whole_for_the_whole_gallery(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 3, count)
    found = recall(rng.normal(size=(count, 4)), rng.normal(size=(count, 4)), group, group, (1, 2, count))
    assert 0 <= found[1] <= found[2] <= found[count] == 1.0


def test_pairs_that_are_equal_are_found_both_ways_and_a_stranger_is_refused() -> None:
    rng = np.random.default_rng(0)
    group = np.arange(20) // 2  # two pictures of each of ten concepts
    texts = rng.normal(size=(10, 8)).repeat(2, axis=0)
    found = both_ways(texts + 1e-3 * rng.normal(size=texts.shape), texts, group)
    assert set(found.values()) == {1.0} and len(found) == 6
    with pytest.raises(ValueError, match="not in the gallery"):
        recall(texts, texts, group, group + 1)


# Plans and cells


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", DATA_SETS)
def test_every_method_makes_a_plan_of_the_same_rounds_for_every_data_set(method: str, data: str) -> None:
    plan = METHODS[method](DATA_SETS[data].model, 18, 4, 7)
    assert sum(stage.rounds for stage in plan.stages) == 18 and plan.seed == 7
    assert (plan.training.batch_size, plan.training.local_epochs) == (16, 2)
    last = plan.stages[-1]
    assert {name for name in (*last.active, *last.frozen) if ".layers." in name} == {
        f"{each.modality}.layers.{index}" for each in plan.model.encoders for index in range(each.layers)
    }
    layers = {"12": 12, "16": 16, "shallow": 1}.get(data.rpartition("_")[2], 6)
    assert {encoder.layers for encoder in plan.model.encoders} == {layers}
    # Too few rounds for each of 16 stages with 4 in 9 of them for the first: it gives some up.
    assert all(stage.rounds for stage in plan.stages)


@pytest.mark.parametrize("method", OPTIONS)
def test_every_option_changes_a_plain_plan_of_labelled_data(method: str) -> None:
    plan = OPTIONS[method](DATA_SETS["seglearn"].model, 18, 4, 7)
    plain_of = {"prog": "progressive", "e2e": "end_to_end"}
    plain = METHODS[plain_of.get(method.partition("_")[0], "layerwise")](DATA_SETS["seglearn"].model, 18, 4, 7)
    assert plan.strategy == plain.strategy and sum(stage.rounds for stage in plan.stages) == 18
    assert plan != plain


@pytest.mark.parametrize("method", [BASELINE, "layerwise", *PRETRAINED])
def test_an_encoder_with_weights_of_its_own_keeps_its_words_and_learns_as_slowly_as_asked(method: str) -> None:
    plan = plan_of(Cell("minilm", method, USUAL, 0))
    assert plan is not None
    slow, gated = "slow" in method, "gated" in method
    for stage in plan.stages:
        assert stage.learning_rate == (3e-4 if method == BASELINE else 1e-3) and "text.stem" in stage.frozen
        assert stage.rate_scale(f"text.layers.{stage.index}") == (0.01 if slow else 1.0)
        assert stage.rate_scale("text.projection") == stage.rate_scale("head") == 1.0
    (encoder,) = plan.model.encoders
    assert isinstance(encoder, ModuleEncoder)
    assert encoder.options == {"tokens": 24, "pool": "mean"} | ({"gated": True} if gated else {})


@pytest.mark.parametrize("method", [*PAIRS, RECIPE, "lw_lean", "lw_partial", "e2e_partial"])
def test_what_is_compared_on_pairs_makes_a_plan_of_them(method: str) -> None:
    plan = (PAIRS | OPTIONS | PARTIAL)[method](DATA_SETS["emoji_12"].model, 20, 4, 7)
    assert sum(stage.rounds for stage in plan.stages) == 20 and plan.model.objective.kind == "contrastive"


@pytest.mark.parametrize("method", SELF_SUPERVISED)
def test_every_self_supervised_method_makes_a_plan_of_one_modality_without_labels(method: str) -> None:
    plan = SELF_SUPERVISED[method](DATA_SETS["fashion"].model, 18, 4, 7)
    assert sum(stage.rounds for stage in plan.stages) == 18 and plan.model.labels is None
    assert plan.training.features.views % 2 == 0


def test_a_method_is_compared_with_end_to_end_training_of_its_own_objective() -> None:
    for methods, data in ((METHODS | OPTIONS | PARTIAL | REAL, "seglearn"), (SELF_SUPERVISED, "fashion")):
        plans = {name: make(DATA_SETS[data].model, 18, 4, 7) for name, make in methods.items()}
        for name, plan in plans.items():
            baseline = plans[baseline_of(name)]
            assert baseline.strategy == "end_to_end"
            objectives = [each.model.objective for each in (plan, baseline)]
            assert len({getattr(objective, "method", objective.kind) for objective in objectives}) == 1


def test_cells_differ_in_name_and_the_first_seed_of_all_comes_first() -> None:
    cells = all_cells([0, 1])
    assert len({cell.key for cell in cells}) == len(cells)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert {cell.method for cell in cells} == {*ALL, CENTRALISED, LINEAR, UNTRAINED}
    assert {cell.data for cell in cells} == set(DATA_SETS)
    assert {cell.setting.participation for cell in cells} == {0.25, 0.5, 1.0}


def test_a_long_run_is_compared_with_long_runs_alone() -> None:
    usual, long = (Cell("fashion", "fedssl", MANY, 0, rounds).as_row() for rounds in (ROUNDS, LONG_ROUNDS))
    assert usual["setting"] == str(MANY) and long["setting"] == f"{MANY}, 90 rounds"


def test_cells_are_chosen_by_all_words_of_any_choice() -> None:
    cells = all_cells([0])
    assert chosen(cells, "") == cells
    found = chosen(cells, "seglearn/layerwise/ 18 natural/, emoji/ end_to_end")
    assert [(cell.data, cell.method) for cell in found] == [("seglearn", "layerwise"), ("emoji", "end_to_end")]


def test_the_hash_of_a_cell_follows_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("seglearn", "layerwise", usual_setting("seglearn"), 0)
    before = plan_hash(cell)
    assert before == plan_hash(cell) != plan_hash(Cell("seglearn", "layerwise_2", usual_setting("seglearn"), 0))
    monkeypatch.setitem(ALL, "layerwise", lambda *given: strategy_plan(*given, "layerwise", local_epochs=3))
    assert plan_hash(cell) != before
    assert plan_hash(Cell("seglearn", LINEAR, POOLED, 0)) == LINEAR


def test_the_centralised_bound_is_the_baselines_plan() -> None:
    central, baseline = (plan_of(Cell("seglearn", name, POOLED, 3)) for name in (CENTRALISED, "end_to_end"))
    assert central == baseline
    assert plan_of(Cell("fashion", CENTRALISED, POOLED, 3)) == plan_of(Cell("fashion", "fedssl", POOLED, 3))
    with pytest.raises(ConfigError, match="known methods are end_to_end"):
        plan_of(Cell("seglearn", "unknown", POOLED, 0))


@given(st.integers(1, 200), st.integers(1, 20), st.fractions(0, 1))
def test_skewed_rounds_are_all_rounds_and_each_stage_has_one_where_there_are_enough(
    total: int, stages: int, first: Fraction
) -> None:
    rounds = skewed_rounds(total, stages, first)
    assert len(rounds) == stages and sum(rounds) == total and min(rounds) >= 0
    assert total < stages or min(rounds) >= (0 if first == 0 else 1)
    others = rounds[1:]
    assert not others or max(others) - min(others) <= 1

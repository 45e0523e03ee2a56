"""Every aggregation rule against a plain float64 one over several rounds, and what holds for all of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.encoding.tensors import decode_any, encode, hash_bytes
from lamina.errors import ConfigError
from lamina.federation.aggregation import Contribution, aggregate
from lamina.federation.rules import RULES, Mean, Rule
from lamina.federation.rules.adagrad import Adagrad
from lamina.federation.rules.adam import Adam
from lamina.federation.rules.clipped_mean import ClippedMean
from lamina.federation.rules.median import Median
from lamina.federation.rules.momentum import Momentum
from lamina.federation.rules.trimmed_mean import TrimmedMean
from lamina.federation.rules.yogi import Yogi
from lamina.plans.plan import Plan
from lamina.plans.recipe import read_recipe
from lamina.plans.segments import TensorSpec

SPECS = [TensorSpec(name="a/w", shape=(3, 2)), TensorSpec(name="a/b", shape=()), TensorSpec(name="b/w", shape=(70_000,))]
SMALL = SPECS[:2]
Values = dict[str, np.ndarray]
Reference = Callable[[list[tuple[Values, int]], dict[str, Any], float], Values]
"""Updates with their examples, what was kept (changed in place), rate -> what is added to the weights."""


def weighted(updates: list[tuple[Values, int]], name: str) -> np.ndarray:
    return np.average([values[name].astype(np.float64) for values, _ in updates], axis=0, weights=[n for _, n in updates])


def of_mean(updates, kept, rate):
    return {name: rate * weighted(updates, name) for name in updates[0][0]}


def of_momentum(updates, kept, rate):
    for name in updates[0][0]:
        kept[name] = 0.9 * kept.get(name, 0.0) + weighted(updates, name)
    return {name: rate * kept[name] for name in updates[0][0]}


def adaptive(second: Callable[[Any, Any], Any], beta1: float = 0.9) -> Reference:
    def of_adaptive(updates, kept, rate):
        added = {}
        for name in updates[0][0]:
            m, v = kept.get(name, (0.0, 1e-6))
            mean = weighted(updates, name)
            kept[name] = m, v = beta1 * m + (1 - beta1) * mean, second(v, mean**2)
            added[name] = rate * m / (np.sqrt(v) + 1e-3)
        return added

    return of_adaptive


def of_trimmed(updates, kept, rate):
    left_out = int(0.3 * len(updates))
    added = {}
    for name in updates[0][0]:
        values = np.sort(np.array([update[name] for update, _ in updates], np.float64), axis=0)
        added[name] = rate * values[left_out : len(values) - left_out].mean(axis=0)
    return added


def of_median(updates, kept, rate):
    return {
        name: rate * np.median([update[name].astype(np.float64) for update, _ in updates], axis=0) for name in updates[0][0]
    }


def of_clipped(updates, kept, rate):
    clipped = []
    for values, examples in updates:
        norm = np.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in values.values()))
        clipped.append(({name: value * min(1.0, 0.5 / norm) if norm else value for name, value in values.items()}, examples))
    return of_mean(clipped, kept, rate)


CASES: dict[str, tuple[Rule, float, Reference]] = {
    "mean": (Mean(), 0.7, of_mean),
    "momentum": (Momentum(), 0.7, of_momentum),
    "adam": (Adam(), 0.01, adaptive(lambda v, square: 0.99 * v + 0.01 * square)),
    "yogi": (Yogi(), 0.01, adaptive(lambda v, square: v - 0.01 * square * np.sign(v - square))),
    "adagrad": (Adagrad(), 0.01, adaptive(lambda v, square: v + square, beta1=0.0)),
    "trimmed_mean": (TrimmedMean(trim=0.3), 0.7, of_trimmed),
    "median": (Median(), 0.7, of_median),
    "clipped_mean": (ClippedMean(clip=0.5), 0.7, of_clipped),
}


def contribution(folder: Path, values: Values, examples: int) -> Contribution:
    data = encode(values)
    path = folder / hash_bytes(data)
    path.write_bytes(data)
    norm = np.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in values.values()))
    return Contribution(path.name, examples, path, norm=float(norm))


def draw(seed: int, scale: float, specs: list[TensorSpec] = SMALL) -> Values:
    random = np.random.default_rng(seed)
    return {spec.name: np.asarray(random.standard_normal(spec.shape) * scale, np.float32) for spec in specs}


def bytes_of(values: Values) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in values.items()}


def zeros(specs: list[TensorSpec] = SMALL) -> Values:
    return {spec.name: np.zeros(spec.shape, np.float32) for spec in specs}


def test_every_rule_of_the_folder_has_a_case() -> None:
    assert set(CASES) == set(RULES)


update = st.tuples(st.integers(0, 5), st.sampled_from([1e-6, 1e-2, 1.0, 1e3]), st.integers(1, 10**6))
rounds = st.lists(st.lists(update, min_size=1, max_size=7), min_size=1, max_size=4)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=25, deadline=None)
@given(drawn=rounds, data=st.data())
def test_a_rule_is_its_formula_in_float64_whatever_the_order_and_however_often_its_state_is_read(
    tmp_path_factory, name, drawn, data
) -> None:
    folder = tmp_path_factory.mktemp("updates")
    rule, rate, reference = CASES[name]
    weights, again, exact = zeros(), zeros(), {key: value.astype(np.float64) for key, value in zeros().items()}
    state, stored, kept = {}, folder / "state", {}
    stored.write_bytes(encode({}))
    for number in drawn:
        updates = [(draw(seed, scale), examples) for seed, scale, examples in number]
        contributions = [contribution(folder, *values) for values in updates]
        for key, added in reference(updates, kept, rate).items():
            exact[key] = exact[key] + added
        weights, state = aggregate(weights, contributions, SMALL, rule, rate, state)
        again, read = aggregate(again, data.draw(st.permutations(contributions)), SMALL, rule, rate, decode_any(str(stored)))
        stored.write_bytes(encode(read))
    for key, value in weights.items():
        largest = max(1.0, float(np.abs(exact[key]).max()))
        np.testing.assert_allclose(value, exact[key], rtol=2e-5, atol=2e-5 * largest)
        assert value.dtype == np.float32 and value.tobytes() == again[key].tobytes()
    assert {key: value.tobytes() for key, value in state.items()} == {
        key: v.tobytes() for key, v in decode_any(str(stored)).items()
    }


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_that_no_update_has_keeps_weights_and_state(tmp_path: Path, name: str) -> None:
    rule, rate, _ = CASES[name]
    first = [contribution(tmp_path, draw(seed, 1.0), 3) for seed in range(3)]
    weights, state = aggregate(zeros(), first, SMALL, rule, rate)
    partial = draw(7, 1.0, SMALL[:1])
    data = encode(partial)
    (tmp_path / "partial").write_bytes(data)
    only = Contribution(hash_bytes(data), 2, tmp_path / "partial", SMALL[:1], norm=1.0)
    after, state_after = aggregate(weights, [only], SMALL, rule, rate, state)
    assert after["a/b"].tobytes() == weights["a/b"].tobytes() and after["a/w"].tobytes() != weights["a/w"].tobytes()
    assert {key: v.tobytes() for key, v in state.items() if "a/b" in key} == {
        key: v.tobytes() for key, v in state_after.items() if "a/b" in key
    }


@pytest.mark.parametrize("name", CASES)
def test_state_of_tensors_that_are_trained_no_more_is_left_and_new_ones_begin_afresh(tmp_path: Path, name: str) -> None:
    rule, rate, _ = CASES[name]
    _, state = aggregate(zeros(SMALL[:1]), [contribution(tmp_path, draw(1, 1.0, SMALL[:1]), 1)], SMALL[:1], rule, rate)
    values = draw(2, 1.0, SMALL[1:])
    with_old, state_after = aggregate(zeros(SMALL[1:]), [contribution(tmp_path, values, 1)], SMALL[1:], rule, rate, state)
    alone, _ = aggregate(zeros(SMALL[1:]), [contribution(tmp_path, values, 1)], SMALL[1:], rule, rate)
    assert with_old["a/b"].tobytes() == alone["a/b"].tobytes()
    assert all(key.endswith("a/b") for key in state_after) and len(state_after) == len(rule.slots)


@pytest.mark.parametrize("name", ["trimmed_mean", "median"])
def test_a_minority_cannot_move_a_robust_rule_beyond_what_the_others_hold(tmp_path: Path, name: str) -> None:
    rule = CASES[name][0]
    honest = [draw(seed, 1.0, SPECS) for seed in range(5)]
    hostile = [{key: np.full_like(value, 1e6) for key, value in draw(0, 1.0, SPECS).items()} for _ in range(2)]
    contributions = [contribution(tmp_path, values, 10) for values in honest + hostile]
    contributions = [*contributions[:-1], Contribution("f" * 64, 10**9, contributions[-1].path)]
    weights, _ = aggregate(zeros(SPECS), contributions, SPECS, rule)
    for key, value in weights.items():
        stacked = np.stack([values[key] for values in honest])
        assert (value <= stacked.max(axis=0) + 1e-6).all() and (value >= stacked.min(axis=0) - 1e-6).all()


@pytest.mark.parametrize("rule", [Adam(), Yogi(), Momentum(beta=0.5), TrimmedMean(trim=0.2), Median(), ClippedMean(clip=2)])
def test_a_plan_says_its_rule_and_one_of_the_mean_says_nothing(rule: Rule) -> None:
    from tests.lamina.test_plan import LEGAL

    plan: Plan = next(iter(LEGAL.values()))()
    assert b"aggregation" not in plan.to_json()
    with_rule = plan.model_validate_json(plan.model_copy(update={"aggregation": rule, "server_learning_rate": 0.1}).to_json())
    assert with_rule.aggregation == rule and b'"rule": "' + rule.rule.encode() in with_rule.to_json()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('aggregation = {rule = "adam"}', "give one below 1"),
        ('aggregation = {rule = "best"}', "clipped_mean"),
        ('aggregation = {rule = "trimmed_mean", trim = 0.5}', "trim"),
        ('aggregation = {rule = "median", beta = 1}', "unknown key"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_with_the_way_out(tmp_path: Path, text: str, told: str) -> None:
    from export.plans.resolve import resolve

    path = tmp_path / "plan.toml"
    encoder = 'input = {kind = "sensor_windows", samples = 8, channels = 2, patch = 4}\nlayers = 1\nwidth = 8\nheads = 2\n'
    path.write_text(f'name = "own"\nclasses = 2\n{text}\n[encoders.motion]\n{encoder}')
    with pytest.raises(ConfigError, match=told):
        read_recipe(path)
        resolve(str(path))

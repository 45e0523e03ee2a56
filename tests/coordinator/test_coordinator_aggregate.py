"""The weighted mean against a plain float64 one, and that nothing but its inputs decides its bytes."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from coordinator_harness import InProcess, make_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.encoding.tensors import ENCODINGS, Encoding, encode
from lamina.federation.aggregation import Contribution, aggregate
from lamina.federation.content import check_content
from lamina.federation.losses import MAX_EXAMPLES
from lamina.federation.rules import Mean, Rule
from lamina.federation.rules.adam import Adam
from lamina.federation.rules.momentum import Momentum
from lamina.federation.rules.trimmed_mean import TrimmedMean
from lamina.plans.plan import Cohort
from lamina.plans.segments import TensorSpec
from lamina.wire import TrainReport

SPECS = [TensorSpec(name="a/w", shape=(3, 2)), TensorSpec(name="a/b", shape=()), TensorSpec(name="b/w", shape=(4,))]
START = {spec.name: np.full(spec.shape, 0.25, np.float32) for spec in SPECS}


def mean_of(start, contributions, specs, rate=1.0):
    """The new weights of the plain weighted mean."""
    return aggregate(start, contributions, specs, rate=rate)[0]


def write(folder: Path, index: int, seed: int, scale: float, encoding: Encoding, num_examples: int) -> Contribution:
    """An update on disk, as the coordinator knows it."""
    random = np.random.default_rng(seed)
    path = folder / f"{index}"
    values = {spec.name: np.asarray(random.standard_normal(spec.shape) * scale, np.float32) for spec in SPECS}
    path.write_bytes(encode(values, encoding))
    return Contribution(check_content(str(path), SPECS).sha256, num_examples, path)


updates = st.lists(
    st.tuples(
        st.integers(0, 5),  # few seeds, so that equal updates occur
        st.sampled_from([1e-6, 1.0, 1e3]),
        st.sampled_from(["fp32", "fp16", "int8"]),
        st.integers(1, 10**6),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60)
@given(drawn=updates, data=st.data())
def test_the_mean_is_that_of_float64_and_its_bytes_do_not_depend_on_the_order(tmp_path_factory, drawn, data) -> None:
    folder = tmp_path_factory.mktemp("updates")
    contributions = [write(folder, index, *update) for index, update in enumerate(drawn)]
    shuffled = data.draw(st.permutations(contributions))

    mean = mean_of(START, contributions, SPECS)
    again = mean_of(START, shuffled, SPECS)

    assert {name: value.tobytes() for name, value in mean.items()} == {n: v.tobytes() for n, v in again.items()}
    total = sum(update[3] for update in drawn)
    for spec in SPECS:
        exact = START[spec.name].astype(np.float64)
        for seed, scale, encoding, num_examples in drawn:
            exact = exact + _stored(seed, scale, encoding)[spec.name] * (num_examples / total)
        assert mean[spec.name].dtype == np.float32 and mean[spec.name].shape == spec.shape
        np.testing.assert_allclose(mean[spec.name], exact, rtol=1e-6, atol=1e-6 * max(update[1] for update in drawn))


def _stored(seed: int, scale: float, encoding: str) -> dict[str, np.ndarray]:
    """The values of an update as they are after encoding, in float64."""
    random = np.random.default_rng(seed)
    stored = {}
    for spec in SPECS:
        value = np.asarray(random.standard_normal(spec.shape) * scale, np.float32)
        if encoding == "fp16":
            value = value.astype(np.float16)
        elif encoding == "int8" and value.ndim == 2:
            step = np.abs(value).max(axis=-1, keepdims=True) / np.float32(127)
            value = np.rint(value / step) * step
        stored[spec.name] = value.astype(np.float64)
    return stored


def test_one_update_alone_gives_the_device_s_own_weights(tmp_path: Path) -> None:
    only = write(tmp_path, 0, seed=1, scale=1.0, encoding="fp32", num_examples=3)
    mean = mean_of(START, [only], SPECS)
    for name, value in _stored(1, 1.0, "fp32").items():
        np.testing.assert_array_equal(mean[name], (0.25 + value).astype(np.float32))


def test_the_content_is_the_same_in_every_encoding_that_holds_it(tmp_path: Path) -> None:
    values = {spec.name: np.full(spec.shape, 127 / 256, np.float32) for spec in SPECS}  # exact in each of them
    hashes = set()
    for encoding in ENCODINGS:
        path = tmp_path / encoding
        path.write_bytes(encode(values, encoding))
        hashes.add(check_content(str(path), SPECS).sha256)
    assert len(hashes) == 1


def test_the_content_tells_different_values_apart(tmp_path: Path) -> None:
    assert write(tmp_path, 0, 1, 1.0, "fp32", 1).content_sha256 != write(tmp_path, 1, 2, 1.0, "fp32", 1).content_sha256


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_legal_updates_never_overflow(tmp_path: Path, scale: float) -> None:
    contributions = [write(tmp_path, index, index, scale, "fp32", MAX_EXAMPLES) for index in range(3)]
    assert all(np.isfinite(value).all() for value in mean_of(START, contributions, SPECS).values())


def test_memory_does_not_grow_with_the_number_of_updates(tmp_path: Path) -> None:
    specs = [TensorSpec(name=f"a/{index}", shape=(50_000,)) for index in range(4)]
    start = {spec.name: np.zeros(spec.shape, np.float32) for spec in specs}
    peaks = []
    for count in (2, 20):
        contributions = []
        for index in range(count):
            path = tmp_path / f"{count}-{index}"
            path.write_bytes(encode({spec.name: np.full(spec.shape, index, np.float32) for spec in specs}))
            contributions.append(Contribution(f"{index:064}", 1, path))
        tracemalloc.start()
        mean_of(start, contributions, specs)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0]
    assert peaks[0] < 5 * sum(4 * spec.count for spec in specs)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_order_of_arrival_and_restarts_do_not_change_the_bytes_of_a_run(make_coordinator, order) -> None:
    """The names of the devices differ too: only what they learned and on how many examples decides."""
    outcomes = []
    for name, sequence, is_disturbed in (("calm", (0, 1, 2), False), ("other", order, True)):
        coordinator: InProcess = make_coordinator(name)
        coordinator.publish(make_bundle(cohort=Cohort(size=3)))
        devices = [coordinator.join(f"{name}-{index}") for index in range(3)]
        for device in devices:
            device.check_in()
        for index in sequence:
            devices[index].name = f"d{index}"  # what the device learns follows from this name
            report = TrainReport(
                num_examples=index + 1, loss=float(order[index]), train_seconds=0, peak_bytes=0, bytes_down=0, bytes_up=0
            )
            assert devices[index].send(devices[index].work(), report=report).status_code == 200
            if is_disturbed:
                coordinator.restart()
        outcomes.append(coordinator.weights())
    assert outcomes[0] == outcomes[1]


@settings(max_examples=60)
@given(drawn=updates, rate=st.sampled_from([1.0, 0.5, 3.0]), data=st.data())
def test_a_tensor_s_mean_is_over_the_updates_that_have_it(tmp_path_factory, drawn, rate, data) -> None:
    """Each update has some of the tensors; what none has is the very start, also where that is minus zero."""
    folder = tmp_path_factory.mktemp("partial")
    start = {**START, "a/b": np.asarray(-0.0, np.float32)}
    subsets = data.draw(st.lists(st.sets(st.sampled_from(SPECS)), min_size=len(drawn), max_size=len(drawn)))
    contributions, held = [], []
    for index, ((seed, scale, encoding, num_examples), subset) in enumerate(zip(drawn, subsets, strict=True)):
        specs = [spec for spec in SPECS if spec in subset]
        if not specs:
            continue
        values = {name: value for name, value in _values(seed, scale).items() if name in {spec.name for spec in specs}}
        (folder / f"{index}").write_bytes(encode(values, encoding))
        content = check_content(str(folder / f"{index}"), specs).sha256
        contributions.append(Contribution(content, num_examples, folder / f"{index}", specs))
        held.append((dict(_stored(seed, scale, encoding)), {spec.name for spec in specs}, num_examples))

    mean = mean_of(start, contributions, SPECS, rate)
    again = mean_of(start, data.draw(st.permutations(contributions)), SPECS, rate)

    assert {name: value.tobytes() for name, value in mean.items()} == {n: v.tobytes() for n, v in again.items()}
    for spec in SPECS:
        having = [(stored[spec.name], examples) for stored, names, examples in held if spec.name in names]
        if not having:
            assert mean[spec.name].tobytes() == start[spec.name].tobytes()
            continue
        exact = start[spec.name] + rate * sum(value * n for value, n in having) / sum(n for _, n in having)
        np.testing.assert_allclose(mean[spec.name], exact, rtol=1e-6, atol=1e-6 * max(update[1] for update in drawn))


def _values(seed: int, scale: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {spec.name: np.asarray(random.standard_normal(spec.shape) * scale, np.float32) for spec in SPECS}


@pytest.mark.parametrize("rule", [Adam(), Momentum(), TrimmedMean(trim=0.4)], ids=lambda rule: rule.rule)
def test_a_rule_keeps_its_state_over_rounds_and_stages_and_restarts_change_nothing(make_coordinator, rule: Rule) -> None:
    """And what it kept is deleted in the end: as many blobs as with the mean are left."""
    weights, blobs = [], []
    for name, chosen, is_disturbed in (("mean", Mean(), False), ("calm", rule, False), ("disturbed", rule, True)):
        coordinator: InProcess = make_coordinator(name)
        coordinator.publish(make_bundle(cohort=Cohort(size=3), rounds=[2, 2], aggregation=chosen, server_learning_rate=0.5))
        devices = [coordinator.join(f"d{index}") for index in range(3)]
        while coordinator.status().state != "finished":
            for device in devices:
                device.step()
                if is_disturbed:
                    coordinator.restart()
        weights.append(coordinator.weights())
        blobs.append(sum(1 for path in (coordinator.state / "blobs").iterdir()))
    assert weights[1] == weights[2] != weights[0]
    assert blobs[0] == blobs[1] == blobs[2]

"""No device owns the mean: bounds of the plan, bounds without one, and that they are told."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from coordinator_harness import REPORT, Device, InProcess, make_bundle, problem_of, tensors_of
from hypothesis import given
from hypothesis import strategies as st

from lamina.encoding.tensors import encode
from lamina.federation.content import MAX_DIFFERENCE
from lamina.federation.influence import MOST_MEDIANS, Size, count_within_bounds
from lamina.federation.losses import MAX_EXAMPLES
from lamina.plans.plan import Cohort
from lamina.plans.segments import TensorSpec
from lamina.wire import Assignment

SPECS = [TensorSpec(name="a/w", shape=(4, 4))]


def sizes(*norms: float, examples: int = 10) -> list[Size]:
    return [Size(examples, norm, SPECS) for norm in norms]


def test_without_bounds_everything_counts() -> None:
    for norms in ((1.0, 2.0, 99.0), (0.0, 0.0, 9.0), (0.0, 9.0), (9.0,)):
        counted = count_within_bounds(Cohort(), sizes(*norms, examples=2**40))
        assert [(each.num_examples, each.scale) for each in counted] == [(2**40, 1.0)] * len(norms)


@pytest.mark.parametrize("norms", [(1.0, 1e6), (1.0, 1.0, 1e6), (1.0, 1e6, 1.0, 1e6)])
def test_without_bounds_no_update_is_longer_than_a_hundred_medians(norms: tuple[float, ...]) -> None:
    counted = count_within_bounds(Cohort(), sizes(*norms))
    assert [norm * each.scale for norm, each in zip(norms, counted, strict=True)] == pytest.approx(
        [min(norm, MOST_MEDIANS) for norm in norms]
    )


@pytest.mark.parametrize(
    ("norms", "scales"),
    [
        ((5.0,), (1.0,)),  # alone: nothing to compare with
        ((1.0, 8.0), (1.0, 0.25)),  # of two, the shorter one is the measure
        ((1.0, 1.0, 8.0), (1.0, 1.0, 0.25)),
        ((1.0, 1.0, 8.0, 9.0), (1.0, 1.0, 0.25, 2 / 9)),
        ((0.0, 0.0, 8.0), (1.0, 1.0, 0.0)),
        ((0.0, 0.0), (1.0, 1.0)),
        ((1.0, 2.0, 2.0), (1.0, 1.0, 1.0)),  # at the bound
    ],
)
def test_a_long_update_is_scaled_to_a_multiple_of_the_median(norms: tuple[float, ...], scales: tuple[float, ...]) -> None:
    counted = count_within_bounds(Cohort(max_norm=2.0), sizes(*norms))
    assert [each.scale for each in counted] == pytest.approx(list(scales), rel=1e-15)


@given(norms=st.lists(st.floats(0, 1e6), min_size=1, max_size=6), max_norm=st.floats(1, 100))
def test_scales_do_not_depend_on_the_order_and_no_update_stays_longer(norms: list[float], max_norm: float) -> None:
    cohort = Cohort(max_norm=max_norm)
    counted = dict(zip(norms, count_within_bounds(cohort, sizes(*norms)), strict=True))
    for order in list(permutations(norms))[:24]:
        assert dict(zip(order, count_within_bounds(cohort, sizes(*order)), strict=True)) == counted
    middle = sorted(norms)[(len(norms) - 1) // 2]
    assert all(norm * each.scale <= max_norm * middle * (1 + 1e-9) for norm, each in counted.items())


def test_devices_with_some_of_the_modalities_compare_with_those_that_have_all() -> None:
    """Twice the values, all of the same size: the norm is larger, the update is not."""
    one, both = SPECS, [*SPECS, TensorSpec(name="b/w", shape=(4, 4))]
    counted = count_within_bounds(Cohort(max_norm=1.0), [Size(1, 4.0, one), Size(1, 4.0 * 2**0.5, both), Size(1, 4.0, one)])
    assert [each.scale for each in counted] == pytest.approx([1.0, 1.0, 1.0])


def test_an_older_reader_understands_a_plan_without_bounds() -> None:
    assert not {"max_examples", "max_norm"} & set(Cohort(size=3).model_dump(mode="json"))
    assert Cohort.from_json('{"size": 3}') == Cohort(size=3)
    bounded = Cohort(size=3, max_examples=100, max_norm=2.5)
    assert Cohort.from_json(bounded.to_json()) == bounded


BOUNDED = Cohort(size=3, max_examples=20, max_norm=2.0)


def start(coordinator: InProcess, cohort: Cohort, names: tuple[str, ...] = ("pi-1", "pi-2", "pi-3")) -> list[Device]:
    coordinator.publish(make_bundle(cohort=cohort))
    devices = [coordinator.join(name) for name in names]
    for device in devices:
        device.check_in()
    return devices


def hostile(device: Device, work: Assignment, factor: float) -> bytes:
    return encode({name: value * np.float32(factor) for name, value in device.difference(work).items()})


def moved(coordinator: InProcess, device: Device, work: Assignment, folder: Path) -> dict[str, np.ndarray]:
    """How far the round moved each tensor."""
    blobs = coordinator.status().weights
    change = {}
    for segment in {spec.name.partition("/")[0] for spec in device.specs(work)}:
        specs = [
            TensorSpec(name=spec.name.partition("/")[2], shape=spec.shape)
            for spec in device.specs(work)
            if spec.name.startswith(f"{segment}/")
        ]
        old, new = (tensors_of(coordinator.blob(blob), specs, folder) for blob in (work.weights[segment], blobs[segment]))
        change |= {f"{segment}/{name}": new[name].astype(np.float64) - old[name] for name in new}
    return change


def test_a_hostile_update_moves_the_model_no_further_than_the_plan_allows(coordinator: InProcess, tmp_path: Path) -> None:
    honest, other, attacker = start(coordinator, BOUNDED)
    work = honest.work()
    before = {name: coordinator.blob(blob) for name, blob in work.weights.items()}
    for device in (honest, other):
        assert device.send(device.work()).status_code == 200
    many = REPORT.model_copy(update={"num_examples": MAX_EXAMPLES})
    assert attacker.send(attacker.work(), hostile(attacker, work, 1e4), report=many).status_code == 200

    updates = [each.difference(work) for each in (honest, other, attacker)]
    norms = [np.sqrt(sum(float(np.square(v, dtype=np.float64).sum()) for v in update.values())) for update in updates]
    scale = 2.0 * np.median([norms[0], norms[1], 1e4 * norms[2]]) / norms[2]  # of the attacker's direction
    names = list(updates[0])
    expected = {n: (10 * updates[0][n] + 10 * updates[1][n] + 20 * scale * updates[2][n]) / 40 for n in names}
    assert before.keys() == work.weights.keys()
    for name, change in moved(coordinator, honest, work, tmp_path).items():
        np.testing.assert_allclose(change, expected[name], rtol=1e-3, atol=1e-6)

    (row, *_) = coordinator.status().rounds
    told = " / ".join(row.notes)
    assert f"pi-3 counts with 20 of the {MAX_EXAMPLES} examples that it tells of (cohort.max_examples)" in told
    assert "pi-3 is clipped: its update of norm" in told and "at most 2 count (cohort.max_norm)" in told
    assert "pi-1" not in told and "pi-2" not in told


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_clipped_rounds_have_the_same_bytes_in_any_order_and_over_restarts(make_coordinator, order) -> None:
    outcomes = []
    for folder, sequence, is_disturbed in (("calm", (0, 1, 2), False), ("other", order, True)):
        coordinator: InProcess = make_coordinator(folder)
        devices = start(coordinator, BOUNDED)
        for index in sequence:
            work = devices[index].work()
            body = hostile(devices[index], work, 10.0**index)
            report = REPORT.model_copy(update={"num_examples": 10**index})
            assert devices[index].send(work, body, report=report).status_code == 200
            if is_disturbed:
                coordinator.restart()
        assert any("is clipped" in note for note in coordinator.status().rounds[0].notes)
        outcomes.append(coordinator.weights())
    assert outcomes[0] == outcomes[1]


def test_one_update_alone_counts_as_it_is_and_the_status_says_why(coordinator: InProcess) -> None:
    (device,) = start(coordinator, Cohort(size=1, max_norm=1.0), ("pi-1",))
    assert device.send(device.work()).status_code == 200
    (row, *_) = coordinator.status().rounds
    assert row.notes == ("cohort.max_norm: pi-1 sent the only update, which has no other to compare with and counts as it is",)


@pytest.mark.parametrize("value", [9e29, 1e20, 2 * MAX_DIFFERENCE, -2 * MAX_DIFFERENCE])
def test_without_a_plan_s_bounds_no_value_is_beyond_what_an_honest_device_sends(coordinator: InProcess, value: float) -> None:
    device, *_ = start(coordinator, Cohort(size=3))
    work = device.work()
    body = encode({name: np.full_like(array, value) for name, array in device.difference(work).items()})
    assert "above 10000: the training diverged" in problem_of(device.send(work, body), 422, "tensor-file")


@pytest.mark.parametrize("examples", [2**53, MAX_EXAMPLES + 1])
def test_without_a_plan_s_bounds_no_device_tells_of_more_examples_than_it_can_have(
    coordinator: InProcess, examples: int
) -> None:
    device, *_ = start(coordinator, Cohort(size=3))
    report = REPORT.model_copy(update={"num_examples": examples})
    answer = device.send(device.work(), report=report)
    assert answer.status_code in (409, 422) and str(MAX_EXAMPLES) in answer.text


def test_weights_beyond_fp16_travel_in_fp32_and_the_run_goes_on(coordinator: InProcess, tmp_path: Path) -> None:
    coordinator.publish(make_bundle(rounds=[9, 1], cohort=Cohort(size=1), download_encoding="fp16"))
    device = coordinator.join("pi-1", encodings=("fp32", "fp16"))
    encodings = []
    for _ in range(9):
        work = device.work()
        encodings.append(work.download_encoding)
        body = encode({name: np.full_like(array, MAX_DIFFERENCE) for name, array in device.difference(work).items()})
        assert device.send(work, body).status_code == 200
    assert encodings == ["fp16"] * 7 + ["fp32"] * 2  # above 65504 from the seventh round on
    assert device.work().stage == 1


@pytest.mark.parametrize("value", [MAX_DIFFERENCE, -MAX_DIFFERENCE])
def test_after_the_worst_legal_updates_the_weights_are_finite(coordinator: InProcess, tmp_path: Path, value: float) -> None:
    """The worst that one may send without a plan's bounds: every value at its bound, and all the examples that count."""
    honest, attacker = start(coordinator, Cohort(size=2), ("pi-1", "pi-2"))
    work = honest.work()
    assert honest.send(work).status_code == 200
    theirs = attacker.work()
    body = encode({name: np.full_like(array, value) for name, array in attacker.difference(theirs).items()})
    report = REPORT.model_copy(update={"num_examples": MAX_EXAMPLES})
    assert attacker.send(theirs, body, report=report).status_code == 200
    length = np.sqrt(
        np.mean(np.concatenate([each.ravel() for each in honest.difference(work).values()]) ** 2, dtype=np.float64)
    )
    change = np.concatenate([each.ravel() for each in moved(coordinator, honest, work, tmp_path).values()])
    assert np.sqrt(np.mean(change**2)) == pytest.approx(MOST_MEDIANS * length, rel=1e-2)
    (row, *_) = coordinator.status().rounds
    assert "pi-2 is clipped" in row.notes[0] and "at most 100 count" in row.notes[0]

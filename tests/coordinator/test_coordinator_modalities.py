"""Devices that have only some of the modalities: what they get, what they may send, and what the mean makes of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from coordinator_harness import (
    REPORT,
    Bundle,
    Device,
    InProcess,
    difference_of,
    make_bundle,
    problem_of,
    tensors_of,
    work_until_finished,
)

from lamina.encoding.tensors import encode, hash_bytes
from lamina.federation.modalities import from_text, largest_set, to_text
from lamina.plans.model import Contrastive
from lamina.plans.plan import Augmentation, Cohort, FeatureStore
from lamina.wire import Refused, Wait

MODALITIES = ("audio", "image", "motion")
EXAMPLES = {"all": 10, "pairs": 10, "ear": 30, "eye": 5}
SETS = (("audio",), ("image",), ("audio", "image"), ("image", "motion"))


def partial_bundle(**settings) -> Bundle:
    return make_bundle(modalities=MODALITIES, device_modalities=SETS, **settings)


@pytest.mark.parametrize(
    ("has", "takes_part_with"),
    [
        (("motion", "image", "audio"), ()),
        (("motion", "image", "audio", "smell"), ()),
        (("audio",), ("audio",)),
        (("audio", "image"), ("audio", "image")),
        (("motion", "image"), ("image", "motion")),
        (("audio", "motion"), ("audio",)),
        (("motion",), None),
        ((), None),
    ],
)
def test_a_device_takes_part_with_the_largest_set_that_it_has(has, takes_part_with) -> None:
    assert largest_set(partial_bundle().manifest.plan, has) == takes_part_with
    assert from_text(to_text(takes_part_with or ())) == (takes_part_with or ())


def test_a_device_that_fits_no_set_is_told_which_there_are(coordinator: InProcess) -> None:
    coordinator.publish(partial_bundle())
    answer = coordinator.join("odd").check_in(modalities=("motion",))
    assert isinstance(answer, Refused)
    assert (
        "trains audio, image, motion, or with audio alone, or with image alone, or with audio and image alone" in answer.detail
    )
    assert "no data for audio, image" in answer.detail


def three_devices(coordinator: InProcess) -> dict[str, Device]:
    devices = {
        "all": coordinator.join("all", modalities=MODALITIES, test_examples=4),
        "ear": coordinator.join("ear", modalities=("audio",), test_examples=4),
        "eye": coordinator.join("eye", modalities=("motion", "image"), test_examples=4),
    }
    for device in devices.values():
        device.check_in()
    return devices


def test_a_device_gets_only_the_segments_of_its_modalities(coordinator: InProcess) -> None:
    bundle = partial_bundle(rounds=[0, 2], cohort=Cohort(size=3))
    coordinator.publish(bundle)
    stage = bundle.manifest.plan.stages[1]
    devices = three_devices(coordinator)
    works = {name: device.work() for name, device in devices.items()}
    assert {name: work.modalities for name, work in works.items()} == {
        "all": (), "ear": ("audio",), "eye": ("image", "motion"),
    }  # fmt: skip
    for work in works.values():
        wanted = work.modalities or MODALITIES
        assert set(work.weights) == {n for n in (*stage.active, *stage.frozen) if n == "head" or n.partition(".")[0] in wanted}
        assert "head" in work.weights and any("layers.0" in name for name in work.weights)
    assert [devices[name].send(work).status_code for name, work in works.items()] == [200, 200, 200]
    asked = {name: device.work() for name, device in devices.items()}
    assert {name: (work.phase, work.modalities, set(work.weights)) for name, work in asked.items()} == {
        name: ("evaluate", work.modalities, set(work.weights)) for name, work in works.items()
    }
    for correct, (name, work) in enumerate(asked.items()):
        devices[name].evaluate(work, correct=correct)

    row = coordinator.status().rounds[0]
    assert [(update.device, update.modalities) for update in row.updates] == [
        ("all", ()), ("ear", ("audio",)), ("eye", ("image", "motion")),
    ]  # fmt: skip
    assert row.notes == (
        "accuracy with all modalities: 0.0000 of 4 examples",
        "accuracy with audio alone: 0.2500 of 4 examples",
        "accuracy with image and motion alone: 0.5000 of 4 examples",
    )


Sent = dict[str, dict[str, np.ndarray]]
"""By device, what it sent for each tensor."""


def train_once(
    coordinator: InProcess, devices: Mapping[str, Device], bundle: Bundle, modalities: Mapping[str, tuple[str, ...]]
) -> Sent:
    """Every device trains the first round, on a number of examples of its own."""
    for name, device in devices.items():
        device.send(device.work(), report=REPORT.model_copy(update={"num_examples": EXAMPLES[name]}))
    return {name: difference_of(name, bundle.manifest.exchange_specs(0, has), 0, 0) for name, has in modalities.items()}


def assert_mean_of(
    having: Sequence[str], coordinator: InProcess, bundle: Bundle, segment: str, sent: Sent, scratch: Path
) -> None:
    """The segment has moved by the mean of what these devices sent, weighted by their examples."""
    specs = bundle.manifest.segment(segment).tensors
    start = tensors_of(bundle.blobs[bundle.manifest.initial_weights[segment]], specs, scratch)
    found = tensors_of(coordinator.blob(coordinator.status().weights[segment]), specs, scratch)
    for spec in specs:
        total = sum(sent[device][f"{segment}/{spec.name}"].astype(np.float64) * EXAMPLES[device] for device in having)
        mean = total / sum(EXAMPLES[device] for device in having)
        np.testing.assert_allclose(found[spec.name], start[spec.name] + mean, rtol=1e-6)


def test_a_tensor_s_mean_is_over_those_that_have_it_by_their_examples(coordinator: InProcess, tmp_path: Path) -> None:
    bundle = partial_bundle(rounds=[1, 0], cohort=Cohort(size=3))
    coordinator.publish(bundle)
    modalities = {"all": (), "ear": ("audio",), "eye": ("image", "motion")}
    sent = train_once(coordinator, three_devices(coordinator), bundle, modalities)
    for name in bundle.manifest.plan.stages[0].active:
        having = [device for device in modalities if any(key.startswith(f"{name}/") for key in sent[device])]
        assert len(having) == (3 if name == "head" else 2)
        assert_mean_of(having, coordinator, bundle, name, sent, tmp_path)


def test_a_segment_that_nobody_trained_keeps_its_blob(coordinator: InProcess) -> None:
    bundle = partial_bundle(rounds=[1, 0], cohort=Cohort(size=1))
    coordinator.publish(bundle)
    work_until_finished(coordinator, [coordinator.join("ear", modalities=("audio",))])
    new, old = coordinator.status().weights, bundle.manifest.initial_weights
    changed = {name for name in new if new[name] != old[name]}
    assert changed == set(bundle.manifest.exchange(0, ("audio",)))
    assert "head" in changed and not [name for name in changed if name.startswith(("image", "motion"))]


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0)])
def test_partial_updates_give_the_same_bytes_in_any_order_and_over_restarts(make_coordinator, order) -> None:
    outcomes = []
    for name, sequence, is_disturbed in (("calm", (0, 1, 2), False), ("other", order, True)):
        coordinator: InProcess = make_coordinator(name)
        coordinator.publish(partial_bundle(cohort=Cohort(size=3)))
        devices = list(three_devices(coordinator).values())
        for index in sequence:
            assert devices[index].send(devices[index].work()).status_code == 200
            if is_disturbed:
                coordinator.restart()
        outcomes.append(coordinator.weights())
    assert outcomes[0] == outcomes[1]


def test_an_update_has_the_tensors_of_the_device_s_modalities_and_no_others(coordinator: InProcess) -> None:
    bundle = partial_bundle(rounds=[1, 0], cohort=Cohort(size=1))
    coordinator.publish(bundle)
    device = coordinator.join("ear", modalities=("audio",))
    work = device.work()
    whole = encode(difference_of("ear", bundle.manifest.exchange_specs(0), 0, 0))
    other = encode(difference_of("ear", bundle.manifest.exchange_specs(0, ("image",)), 0, 0))
    assert device.send(work, whole).status_code in (413, 422)
    assert "missing" in problem_of(device.send(work, other), 422, "tensor-file")
    assert device.send(work).status_code == 200
    assert hash_bytes(device.body(work)) != hash_bytes(whole)


def test_a_device_that_asked_with_other_modalities_meanwhile_sends_what_it_agreed_to_last(coordinator: InProcess) -> None:
    coordinator.publish(partial_bundle(rounds=[1, 0], cohort=Cohort(size=1)))
    device = coordinator.join("a", modalities=MODALITIES)
    first = device.work()
    second = device.work(modalities=("audio",))
    assert (first.modalities, second.modalities) == ((), ("audio",))
    assert device.send(first).status_code in (413, 422)
    assert device.send(second).status_code == 200
    assert coordinator.status().rounds[0].updates[0].modalities == ("audio",)


def test_a_bundle_without_the_programs_that_its_plan_needs_is_refused(coordinator: InProcess) -> None:
    bundle = partial_bundle()
    stages = tuple(stage.model_copy(update={"partial": stage.partial[:-1]}) for stage in bundle.manifest.stages)
    for data in bundle.blobs.values():
        coordinator.http.put(f"/v1/blobs/{hash_bytes(data)}", content=data, headers=coordinator.admin)
    answer = coordinator.post_manifest(bundle.manifest.model_copy(update={"stages": stages}).to_json())
    assert "has ['image', 'motion'], and the bundle has no programs of stage 0" in problem_of(answer, 422, "bundle")


PAIR = ("audio", "image")
VIEWS = {"augmentation": {name: Augmentation(noise=0.1) for name in PAIR}, "features": FeatureStore(views=2)}


def pair_bundle(**settings) -> Bundle:
    """A contrastive model, and devices with one of its modalities."""
    sets = (("audio",), ("image",))
    return make_bundle(modalities=PAIR, device_modalities=sets, objective=Contrastive(), training=VIEWS, **settings)


def pair_devices(coordinator: InProcess) -> dict[str, Device]:
    """One with pairs, and one with each of the modalities."""
    sets = {"pairs": PAIR, "ear": ("audio",), "eye": ("image",)}
    devices = {name: coordinator.join(name, modalities=has, test_examples=4) for name, has in sets.items()}
    for device in devices.values():
        device.check_in()
    return devices


def test_the_mean_of_a_contrastive_segment_is_over_pairs_and_views_by_their_examples(
    coordinator: InProcess, tmp_path: Path
) -> None:
    bundle = pair_bundle(rounds=[1, 0], cohort=Cohort(size=3))
    coordinator.publish(bundle)
    sent = train_once(coordinator, pair_devices(coordinator), bundle, {"pairs": (), "ear": ("audio",), "eye": ("image",)})
    for name in bundle.manifest.plan.stages[0].active:
        having = ["pairs", "ear" if name.startswith("audio") else "eye"]
        assert_mean_of(having, coordinator, bundle, name, sent, tmp_path)


def test_what_devices_without_pairs_find_is_told_apart_and_counts_in_no_mean(coordinator: InProcess) -> None:
    coordinator.publish(pair_bundle(rounds=[1, 0], cohort=Cohort(size=3)))
    devices = pair_devices(coordinator)
    for device in devices.values():
        device.send(device.work())
    for name, (correct, loss) in {"pairs": (1, 2.0), "ear": (3, 8.0), "eye": (4, 9.0)}.items():
        devices[name].evaluate(devices[name].work(), correct=correct, loss=loss)
    row = coordinator.status().rounds[0]
    assert (row.test_examples, row.test_correct, row.test_loss) == (4, 1, 2.0)
    assert row.notes == (
        "accuracy with all modalities: 0.2500 of 4 examples",
        "other view found first with audio alone (not part of the accuracy): 0.7500 of 4 examples",
        "other view found first with image alone (not part of the accuracy): 1.0000 of 4 examples",
    )


@pytest.mark.parametrize("measure", ["train_loss", "test_loss"])
def test_only_losses_of_pairs_end_a_stage(coordinator: InProcess, measure: str) -> None:
    """The devices with one modality tell a loss that falls by half in every round, and those with pairs one that stays."""
    tuning = {"measure": measure, "patience": 2}
    coordinator.publish(pair_bundle(rounds=[9, 0], cohort=Cohort(size=3), self_tuning=tuning))
    devices = pair_devices(coordinator)
    rounds = 0
    while not isinstance(devices["pairs"].check_in(), Wait):
        for name, device in devices.items():
            loss = 1.0 if name == "pairs" else 0.5**rounds
            device.send(device.work(), report=REPORT.model_copy(update={"loss": loss}))
        for name, device in devices.items():
            device.evaluate(device.work(), loss=1.0 if name == "pairs" else 0.5**rounds)
        rounds += 1
        for device in list(devices.values())[1:]:
            device.check_in()
    assert (rounds, coordinator.status().state) == (3, "finished")


def test_rounds_without_any_pairs_end_no_stage(coordinator: InProcess) -> None:
    coordinator.publish(pair_bundle(rounds=[4, 0], cohort=Cohort(size=1), self_tuning={"patience": 1}))
    work_until_finished(coordinator, [coordinator.join("ear", modalities=("audio",))])
    rounds = coordinator.status().rounds
    assert len(rounds) == 4 and {(row.test_examples, row.test_loss) for row in rounds} == {(0, None)}


@pytest.mark.parametrize("rate", [1.0, 0.5, 2.0])
def test_the_server_s_learning_rate_scales_the_mean(coordinator: InProcess, tmp_path: Path, rate: float) -> None:
    bundle = make_bundle(rounds=[1, 0], cohort=Cohort(size=1), server_learning_rate=rate)
    coordinator.publish(bundle)
    device = coordinator.join("a")
    work = device.work()
    too_large = {name: np.full_like(value, 0.9e4) for name, value in device.difference(work).items()}
    if rate > 1:
        assert "above 5000" in problem_of(device.send(work, encode(too_large)), 422, "tensor-file")
    device.send(work)
    learned = device.difference(work)
    specs = bundle.manifest.segment("head").tensors
    start = tensors_of(bundle.blobs[bundle.manifest.initial_weights["head"]], specs, tmp_path)
    new = tensors_of(coordinator.blob(coordinator.status().weights["head"]), specs, tmp_path)
    for name, value in new.items():
        exact = start[name].astype(np.float64) + rate * learned[f"head/{name}"].astype(np.float64)
        np.testing.assert_array_equal(value, exact.astype(np.float32))

"""What packing decided about the data of a device is compared with the plan and with the other devices, field by field."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.store.tables import CardRow, DataFactRow
from edge_client.talk.device import Device as RealDevice
from edge_client.talk.device import Options as DeviceOptions
from edge_client.talk.transport import Transport
from lamina.data.card import DataCard, ModalityCard
from lamina.data.convert import Settings
from lamina.data.pack import Options, pack
from lamina.encoding.tensors import hash_bytes
from lamina.errors import ProtocolError
from lamina.plans.plan import Cohort
from lamina.wire import Assignment, CardWanted, Refused, Wait
from tests.coordinator.coordinator_harness import Device, FakeClock, InProcess, make_bundle, problem_of

NAMES = ("cat", "dog", "owl")


def card_of(classes: tuple[str, ...] | None = NAMES, **motion: Any) -> DataCard:
    return DataCard(classes=classes, modalities={"motion": ModalityCard(shape=(2, 8), **motion)})


def ask(device: Device, card: DataCard, **facts: Any) -> Assignment | Wait | Refused | CardWanted:
    """As a device asks: with the hash, and once with the card."""
    answer = device.check_in(data_card=card.sha256, **facts)
    if isinstance(answer, CardWanted):
        sent = device.coordinator.http.put("/v1/data-card", content=card.to_json(), headers=device.headers)
        assert sent.status_code == 204, sent.text
        answer = device.check_in(data_card=card.sha256, **facts)
    assert not isinstance(answer, CardWanted)
    return answer


def refusal(device: Device, card: DataCard, **facts: Any) -> str:
    answer = ask(device, card, **facts)
    assert isinstance(answer, Refused), answer
    return answer.detail


@pytest.mark.parametrize(
    ("mine", "words"),
    [
        (
            card_of(("dog", "cat", "owl")),
            "class names [cat, dog, owl] on device 'a', [dog, cat, owl] in this data; .*--classes cat,dog,owl",
        ),
        (card_of(("Cat", "dog", "owl")), "[Cat, dog, owl] in this data"),
        (card_of(mean=(0.5,)), "motion: mean [0.25] on device 'a', [0.5] in this data; .*--mean motion=0.25"),
        (card_of(rate=8000), "motion: rate 16000 on device 'a', 8000 in this data; .*--rate 16000"),
        (card_of(channels=("y", "x")), "motion: channels [x, y] on device 'a', [y, x] in this data"),
        (
            card_of(tokenizer="sha256:" + "0" * 64),
            "motion: tokenizer words on device 'a', sha256:000.* in this data; .*--tokenizer words",
        ),
    ],
)
def test_a_later_device_with_other_data_is_refused_with_both_values(coordinator: InProcess, mine: DataCard, words: str) -> None:
    coordinator.publish(make_bundle())
    first = card_of(mean=(0.25,), rate=16000, channels=("x", "y"), tokenizer="words")
    assert isinstance(ask(coordinator.join("a"), first), Wait)
    detail = refusal(coordinator.join("b"), mine)
    for part in words.split(".*"):
        assert part in detail
    assert isinstance(ask(coordinator.join("c"), first), Assignment)


def test_the_card_is_asked_for_once_and_survives_a_restart(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle())
    a, b = coordinator.join("a"), coordinator.join("b")
    ask(a, card_of())
    coordinator.restart()
    assert isinstance(a.check_in(data_card=card_of().sha256), Wait)
    assert "[cat, dog, owl] on device 'a'" in refusal(b, card_of(("owl", "cat", "dog")))
    assert isinstance(b.check_in(data_card=card_of().sha256), CardWanted)  # other data than it sent


def test_what_a_card_leaves_open_is_decided_by_the_first_that_knows_it(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=9)))
    ask(coordinator.join("a"), card_of(None))
    assert isinstance(ask(coordinator.join("b"), card_of(rate=100)), Wait)
    assert isinstance(ask(coordinator.join("c"), card_of(NAMES)), Wait)
    assert "rate 100 on device 'b'" in refusal(coordinator.join("d"), card_of(rate=50))


def test_modalities_that_only_one_of_two_devices_has_are_not_compared(coordinator: InProcess) -> None:
    both = ("image", "motion")
    coordinator.publish(make_bundle(modalities=both, device_modalities=(("image",), ("motion",)), cohort=Cohort(size=9)))

    def card(**rates: int) -> DataCard:
        return DataCard(modalities={name: ModalityCard(rate=rate) for name, rate in rates.items()})

    ask(coordinator.join("a"), card(image=1), modalities=("image",))
    assert isinstance(ask(coordinator.join("b"), card(motion=2), modalities=("motion",)), Wait)
    assert isinstance(ask(coordinator.join("c"), card(image=1, motion=2, other=3), modalities=both), Wait)
    assert "image: rate 1 on device 'a'" in refusal(coordinator.join("d"), card(image=2, motion=2), modalities=both)


def test_the_plan_decides_before_any_device(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(data_card=card_of(rate=50), cohort=Cohort(size=9)))
    assert "class names [cat, dog, owl] in its plan, [owl, dog, cat] in this data" in refusal(
        coordinator.join("a"), card_of(NAMES[::-1])
    )
    assert isinstance(ask(coordinator.join("b"), card_of(rate=50)), Wait)


def test_devices_and_files_without_a_card_go_on_as_before(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle())
    assert isinstance(ask(coordinator.join("a"), card_of()), Wait)
    assert isinstance(coordinator.join("b").check_in(), Assignment)


def test_the_server_s_own_data_is_compared_too(coordinator: InProcess) -> None:
    training = {"features": {"keep": "round"}}
    coordinator.publish(make_bundle(calibration={"data": "server.npz", "learning_rate": 0.1}, training=training))
    ask(coordinator.join("a"), card_of())
    assert "on device 'a'" in refusal(coordinator.join("server", role="calibrator"), card_of(NAMES[::-1]))


def test_a_wrong_card_can_be_mended_while_nobody_trained_with_it(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=2)))
    a, b = coordinator.join("a"), coordinator.join("b")
    ask(a, card_of(NAMES[::-1]))
    assert isinstance(ask(a, card_of()), Wait)  # packed anew, and still alone
    assert "[cat, dog, owl] on device 'a'" in refusal(b, card_of(NAMES[::-1]))
    clock.jump(1000)  # `a` has gone
    assert isinstance(ask(b, card_of(NAMES[::-1])), Wait)
    assert "on device 'b'" in refusal(a, card_of())


def test_after_an_update_the_data_of_the_run_is_decided(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=1, deadline_seconds=1e6)))
    a, b = coordinator.join("a"), coordinator.join("b")
    work = ask(a, card_of())
    assert isinstance(work, Assignment) and a.send(work).status_code == 200
    clock.jump(10_000)
    assert "on device 'a'" in refusal(b, card_of(NAMES[::-1]))


def test_what_is_no_card_is_refused_and_two_cards_of_a_device_are_one_row(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle())
    device = coordinator.join("a")
    for body in (
        b"{}x",
        b'{"classes": ["a\\nb"]}',
        b'{"classes": 5}',
        b'{"modalities": {"motion": {"rate": -1}}}',
        b'{"class": []}',
    ):
        answer = coordinator.http.put("/v1/data-card", content=body, headers=device.headers)
        assert problem_of(answer, 422, "config")
    assert coordinator.http.put("/v1/data-card", content=card_of().to_json()).status_code == 401
    for number in range(5):
        ask(device, card_of(rate=number + 1))
    with coordinator.app.state.house.database.read() as session:
        assert session.query(CardRow).count() == 1
        assert session.query(DataFactRow).count() == 3
        assert session.query(CardRow).one().sha256 == hash_bytes(card_of(rate=5).to_json())


class _Waits(Exception):
    pass


def test_a_real_device_with_swapped_names_is_refused(coordinator: InProcess, tmp_path: Path) -> None:
    bundle = make_bundle()
    coordinator.publish(bundle)
    random = np.random.default_rng(0)

    def join(name: str, names: str, **settings: Any) -> None:
        arrays = {"motion": random.normal(size=(6, 2, 8)), "label": np.array([*names.split(), *names.split()])}
        np.savez(tmp_path / "in.npz", **arrays)
        options = Options(test_share=None, convert=Settings(**settings))
        pack(str(tmp_path / "in.npz"), bundle.manifest.plan.model, tmp_path / f"{name}.npz", options)

        def sleep(seconds: float) -> None:
            raise _Waits

        transport = Transport("http://coordinator", transport=coordinator.http._transport, sleep=sleep)
        token = coordinator.enroller["Authorization"].removeprefix("Bearer ")
        data, state = str(tmp_path / f"{name}.npz"), str(tmp_path / name)
        what = DeviceOptions(url=transport.url, data=data, name=name, engine="onnxruntime", state=state)
        RealDevice(what, transport, lambda: token, print).next_job()

    with pytest.raises(_Waits):
        join("a", "Cat dog owl")
    with pytest.raises(ProtocolError, match=r"class names \[Cat, dog, owl\] on device 'a', \[Dog, cat, owl\] in this data"):
        join("b", "cat Dog owl")
    with pytest.raises(ProtocolError, match=r"motion: mean \[0\] on device 'a', \[0.5\] in this data; .*--mean motion=0"):
        join("c", "Cat dog owl", mean={"motion": (0.5,)})

"""Users that have some of the modalities: what they train, what they send, and what the means make of it."""

from pathlib import Path

import numpy as np
import pytest

from edge_client.engines import load_engine
from lamina.bundles.bundle import MANIFEST, blob_path
from lamina.errors import ProtocolError
from lamina.plans.segments import classifier
from lamina.split.manifest import SplitManifest
from lamina.split.plan import FUSION, LOGITS, MIDDLE, modality_adapter, task_adapter
from lamina.split.wire import SplitStatus, features_down, features_up, gradients_up
from tests.split.house import CLASSES, Loopback, loopback, make_plan, varied, write_data

ALL, EYE, EAR = ("image", "audio"), ("image",), ("audio",)


def users(size: int) -> dict[str, object]:
    return {"size": size, "min_users": size, "some_modalities": True, "evaluate_every": 1}


def run(
    bundle: Path, folder: Path, sets: list[tuple[str, ...]], rounds: int, **changes: object
) -> tuple[SplitStatus, SplitManifest, dict[str, dict]]:
    """A run of users with these modalities; its status, and the tensors of the trained parts at its end."""
    folder.mkdir(exist_ok=True)
    made, manifest = varied(bundle, folder / "bundle", rounds=rounds, users=users(len(sets)), **changes)
    files = [write_data(folder / f"{index}.npz", seed=index, has=has) for index, has in enumerate(sets)]
    with loopback(folder) as house:
        name = house.publish(made, manifest)
        house.join(files)
        status = house.status(name)
        return status, manifest, {part: house.weights(status, manifest, part) for part in manifest.plan.trained}


@pytest.fixture(scope="module")
def mixed(server_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SplitStatus, SplitManifest, dict]:
    return run(server_bundle, tmp_path_factory.mktemp("mixed"), [ALL, EYE, EAR], rounds=3)


def test_users_with_some_modalities_train_beside_one_with_all(mixed: tuple) -> None:
    status, manifest, _ = mixed
    assert status.state == "finished" and len(status.rounds) == 3
    for row in status.rounds:
        assert [set(each.report.loss) for each in row.users] == [set(ALL), set(EYE), set(EAR)]
    for user, modality in ((1, "image"), (2, "audio")):
        first, last = (status.rounds[place].users[user].report.loss[modality] for place in (0, -1))
        assert last < first
    for part in manifest.plan.trained:
        assert status.weights[part] != manifest.initial_weights[part], part


def test_only_those_with_all_count_for_the_fusion_and_are_evaluated(mixed: tuple) -> None:
    for row in mixed[0].rounds:
        whole, *others = (each.report for each in row.users)
        assert row.fused_loss == whole.fused_loss and [each.fused_loss for each in others] == [None, None]
        assert row.test_examples == 24
        assert row.test_accuracy() is not None and row.test_accuracy("audio") is not None


def test_a_user_with_one_modality_sends_its_own_parts_and_activations_alone(mixed: tuple) -> None:
    whole, eye, ear = (each.report.bytes_up for each in mixed[0].rounds[-1].users)
    assert eye < 0.7 * whole and ear < 0.7 * whole
    plan = mixed[1].plan
    assert [spec.name for spec in features_up(plan, 2, EYE)] == ["image"]
    assert [spec.name for spec in gradients_up(plan, 2, False, EYE)] == ["image"]
    for fused in (False, True):
        assert [spec.name for spec in features_down(plan, 2, fused, EAR)] == ["audio"]
    assert plan.sent(False, EAR) == [modality_adapter("audio"), classifier("audio")]


def test_after_the_switch_users_with_some_modalities_go_on_with_the_loss_of_what_they_have(
    server_bundle: Path, tmp_path: Path
) -> None:
    status, _, _ = run(server_bundle, tmp_path, [ALL, EYE], rounds=4, switch={"window": 2, "threshold": 1e6})
    assert [row.fused for row in status.rounds] == [False, False, False, True]
    before, after = (row.users[1].report for row in status.rounds[-2:])
    assert set(after.loss) == {"image"} and after.fused_loss is None
    assert after.loss["image"] < before.loss["image"]


def test_the_mean_of_a_part_is_over_the_users_that_have_it(server_bundle: Path, tmp_path: Path) -> None:
    """The user with all comes first; what it makes of the audio parts is then the mean, whoever trains images after it."""
    _, _, together = run(server_bundle, tmp_path / "two", [ALL, EYE], rounds=1)
    _, _, alone = run(server_bundle, tmp_path / "one", [ALL], rounds=1)
    for part in (modality_adapter("audio"), classifier("audio"), FUSION):
        for name, value in together[part].items():
            np.testing.assert_array_equal(value, alone[part][name], err_msg=f"{part}/{name}")
    for part in (modality_adapter("image"), classifier("image"), task_adapter("image")):
        assert not all(np.array_equal(value, alone[part][name]) for name, value in together[part].items()), part


def test_what_nobody_has_stays_as_it_was(server_bundle: Path, tmp_path: Path) -> None:
    status, manifest, weights = run(server_bundle, tmp_path / "eyes", [EYE, EYE], rounds=2)
    start = manifest.initial_weights
    for part in (modality_adapter("audio"), classifier("audio"), FUSION):
        assert status.weights[part] == start[part]
    assert status.weights[modality_adapter("image")] != start[modality_adapter("image")]
    assert [(row.fused_loss, row.test_examples, row.fused) for row in status.rounds] == [(None, 0, False)] * 2
    image, audio = weights[task_adapter("image")], weights[task_adapter("audio")]
    assert all(np.array_equal(image[name], audio[name]) == name.startswith(MIDDLE) for name in image)


def test_the_loss_of_a_modality_alone_does_not_depend_on_the_fused_logits(server_bundle: Path) -> None:
    """So zeros may stand in for them: the program of those that have all is that of those that have some."""
    manifest = SplitManifest.from_file(server_bundle / MANIFEST)
    program = manifest.programs["onnxruntime"]["image.classify"]
    loaded = load_engine("onnxruntime").load(blob_path(server_bundle, program.blob), program)
    random = np.random.default_rng(0)
    weights = [random.normal(size=shape).astype(np.float32) for shape in program.weights]
    features, label = random.normal(size=(5, manifest.plan.width)).astype(np.float32), random.integers(0, CLASSES, 5)
    given = []
    for logits in (np.zeros((5, CLASSES), np.float32), random.normal(size=(5, CLASSES)).astype(np.float32)):
        outputs = [value.copy() for value in loaded.run([*weights, features, logits, label])]
        given.append(dict(zip(program.outputs, outputs, strict=True)))
    zero, other = given
    for name in ("loss", "correct", "gradient", *(name for name in zero if name.startswith(classifier("image")))):
        np.testing.assert_array_equal(zero[name], other[name], err_msg=name)
    assert not np.array_equal(zero["fused_loss"], other["fused_loss"])
    loaded.close()


def join_once(house: Loopback, bundle: Path, manifest: SplitManifest, data: Path) -> None:
    house.publish(bundle, manifest)
    house.join([data])


def test_a_plan_that_wants_all_modalities_refuses_a_user_with_some(server_bundle: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "eye.npz", seed=0, has=EYE)
    with loopback(tmp_path) as house, pytest.raises(ProtocolError, match="needs 'audio', which this user's data lacks"):
        join_once(house, server_bundle, SplitManifest.from_file(server_bundle / MANIFEST), data)


def test_a_user_with_none_of_the_modalities_is_told_which_there_are(server_bundle: Path, tmp_path: Path) -> None:
    bundle, manifest = varied(server_bundle, tmp_path / "bundle", users=users(1))
    other = tmp_path / "other.npz"
    np.savez(other, train_smell=np.zeros((4, 3), np.float32), train_label=np.zeros(4, np.int64))
    with loopback(tmp_path) as house, pytest.raises(ProtocolError, match="needs one of audio, image"):
        join_once(house, bundle, manifest, other)


def test_without_the_coordinator_in_the_loop_all_modalities_are_needed() -> None:
    with pytest.raises(ValueError, match=r'users.some_modalities is built for party = "server" alone'):
        make_plan(party="device", users=users(2))
    assert make_plan().some_of(EYE) is None and make_plan().some_of(("audio", "image", "smell")) == ()
    assert LOGITS in [spec.name for spec in gradients_up(make_plan(), 2, False)]

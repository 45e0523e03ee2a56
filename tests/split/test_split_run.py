"""Split training over a real socket: two users with two modalities each, and the coordinator between their ends."""

from pathlib import Path

import numpy as np
import pytest

from coordinator.split.state import SplitState
from edge_client.split.transport import SplitTransport
from edge_client.split.user import SplitOptions, SplitUser
from lamina.bundles.bundle import MANIFEST
from lamina.errors import UnknownNameError
from lamina.split.manifest import SplitManifest
from lamina.split.plan import FUSION, MIDDLE, Traffic, modality_adapter, task_adapter
from lamina.split.wire import SplitStatus
from tests.split.house import loopback, varied, write_data


@pytest.fixture(scope="module")
def finished(server_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SplitStatus, SplitManifest, dict]:
    """A run of three rounds with two users."""
    folder = tmp_path_factory.mktemp("run")
    files = [write_data(folder / f"{i}.npz", seed=i) for i in range(2)]
    manifest = SplitManifest.from_file(server_bundle / MANIFEST)
    with loopback(folder) as house:
        run = house.publish(server_bundle, manifest)
        house.join(files)
        status = house.status(run)
        weights = {part: house.weights(status, manifest, part) for part in manifest.plan.trained}
        frozen = {part: house.house.blobs.path(manifest.initial_weights[part]).read_bytes() for part in manifest.plan.frozen}
    return status, manifest, weights | {"frozen": frozen}


def test_accuracy_rises_with_each_modality_and_with_their_fusion(finished: tuple) -> None:
    status, manifest, _ = finished
    assert status.state == "finished" and len(status.rounds) == manifest.plan.rounds
    assert all(len(row.users) == 2 and row.test_examples == 48 for row in status.rounds)
    for modality in (*manifest.plan.modalities, None):
        first, last = (status.rounds[i].test_accuracy(modality) for i in (0, -1))
        assert last > 0.6 and last >= first, (modality, first, last)  # four classes: chance is 0.25
    assert status.rounds[-1].fused_loss < status.rounds[0].fused_loss


def test_frozen_parts_are_the_same_bytes_as_before(finished: tuple, server_bundle: Path) -> None:
    _, manifest, weights = finished
    for part, data in weights["frozen"].items():
        assert data == (server_bundle / "blobs" / manifest.initial_weights[part]).read_bytes()
    assert not set(manifest.plan.frozen) & set(manifest.plan.sent(False))


def test_every_trained_part_has_moved(finished: tuple) -> None:
    status, manifest, _ = finished
    for part in manifest.plan.trained:
        assert status.weights[part] != manifest.initial_weights[part], part


def test_task_adapters_share_their_middle_layer_and_nothing_else(finished: tuple) -> None:
    _, _, weights = finished
    image, audio = weights[task_adapter("image")], weights[task_adapter("audio")]
    for name in image:
        assert np.array_equal(image[name], audio[name]) == name.startswith(MIDDLE), name
    own = [weights[modality_adapter(m)][f"{MIDDLE}weight"] for m in ("image", "audio")]
    assert not np.array_equal(*own)  # those of the modality adapters are not shared


def test_the_status_says_what_a_step_moves(finished: tuple) -> None:
    status = finished[0]
    traffic = status.rounds[0].traffic
    assert traffic.steps == 10
    activations = 8 * 2 * 4 * 16 * 4  # batch x modalities x tokens x width x float32
    for measured in (traffic.features_up_bytes, traffic.gradients_down_bytes):
        assert activations <= measured / traffic.steps < activations + 1000
    assert traffic.features_down_bytes / traffic.steps < activations / 2
    report = status.rounds[0].users[0].report
    assert report.bytes_up > (traffic.features_up_bytes + traffic.gradients_up_bytes) / 2


def test_the_same_users_and_seed_give_the_same_weights(finished: tuple, server_bundle: Path, tmp_path: Path) -> None:
    files = [write_data(tmp_path / f"{i}.npz", seed=i) for i in range(2)]
    with loopback(tmp_path) as house:
        run = house.publish(server_bundle, finished[1])
        house.join(files)
        assert house.status(run).weights == finished[0].weights


@pytest.mark.parametrize(("encoding", "share"), [("fp16", 0.55), ("int8", 0.36)])
def test_smaller_encodings_move_fewer_bytes_and_still_learn(
    encoding: str, share: float, finished: tuple, server_bundle: Path, tmp_path: Path
) -> None:
    traffic = Traffic(activations=encoding, gradients=encoding, compression="zstd")
    folder, manifest = varied(server_bundle, tmp_path / "bundle", traffic=traffic.model_dump())
    files = [write_data(tmp_path / f"{i}.npz", seed=i) for i in range(2)]
    with loopback(tmp_path) as house:
        run = house.publish(folder, manifest)
        house.join(files)
        status = house.status(run)
    plain, small = finished[0].rounds[0].traffic, status.rounds[0].traffic
    # The header of a file is some hundred bytes, of 8 KiB here.
    assert small.features_up_bytes < share * plain.features_up_bytes
    assert small.gradients_down_bytes < share * plain.gradients_down_bytes
    accuracy = status.rounds[-1].test_accuracy()
    assert accuracy is not None and accuracy > 0.6


def test_the_switch_fires_once_and_the_fusion_net_is_frozen_from_then_on(server_bundle: Path, tmp_path: Path) -> None:
    changes = {"rounds": 6, "switch": {"window": 2, "threshold": 1e6}, "users": {"size": 1, "evaluate_every": 0}}
    folder, manifest = varied(server_bundle, tmp_path / "bundle", **changes)
    seen = []
    with loopback(tmp_path) as house:
        run = house.publish(folder, manifest)
        find = house.house.blobs.put

        def put(data: bytes) -> str:
            digest = find(data)
            seen.append(digest)
            return digest

        house.house.blobs.put = put  # type: ignore[method-assign]
        house.join([write_data(tmp_path / "0.npz", seed=0, train=16, test=0)])
        status = house.status(run)
    # Two differences need three rounds.
    assert [row.fused for row in status.rounds] == [False, False, False, True, True, True]
    assert len(seen) == 3 * len(manifest.plan.trained) + 3 * (len(manifest.plan.trained) - 1)
    assert status.weights[FUSION] == seen[3 * len(manifest.plan.trained) - 1]
    assert status.fused


def test_a_coordinator_that_is_started_again_goes_on_with_the_next_round(server_bundle: Path, tmp_path: Path) -> None:
    changes = {"rounds": 1, "users": {"size": 1, "evaluate_every": 1}}
    folder, manifest = varied(server_bundle, tmp_path / "bundle", **changes)
    file = write_data(tmp_path / "0.npz", seed=0, train=16, test=8)
    with loopback(tmp_path) as house:
        run = house.publish(folder, manifest)
        house.stop()
        house.start()
        house.join([file])
        before = house.status(run)
        house.stop()
        house.start()
        assert house.status(run) == before
        assert before.state == "finished" and before.rounds[0].test_examples == 8


def test_weights_of_past_rounds_are_deleted_unless_another_run_has_them(server_bundle: Path, tmp_path: Path) -> None:
    file = write_data(tmp_path / "0.npz", seed=0, train=16, test=0)
    shared: dict = {"users": {"size": 1, "evaluate_every": 0}}
    with loopback(tmp_path) as house:
        manifests, ends = {}, {}
        for rounds in (1, 2):
            folder, manifests[rounds] = varied(server_bundle, tmp_path / f"bundle-{rounds}", rounds=rounds, **shared)
            run = house.publish(folder, manifests[rounds])
            house.join([file])
            ends[rounds] = house.status(run)
        trained = {rounds: set(status.weights.values()) for rounds, status in ends.items()}
        # The second run came through the weights at which the first one ended.
        state = SplitState.from_file(house.settings.state / "split" / f"{run}.json")
        assert set(state.superseded) == trained[1] != trained[2]
        needed = set.union(*trained.values(), *(set(each.blobs) for each in manifests.values()))
        blobs = {path.name for path in (house.settings.state / "blobs").iterdir()}
        assert blobs == needed | {status.manifest for status in ends.values()}


def test_what_a_stopped_coordinator_did_not_delete_is_deleted_at_the_start(server_bundle: Path, tmp_path: Path) -> None:
    folder, manifest = varied(server_bundle, tmp_path / "bundle", rounds=2, users={"size": 1, "evaluate_every": 0})
    with loopback(tmp_path) as house:
        run = house.publish(folder, manifest)
        house.join([write_data(tmp_path / "0.npz", seed=0, train=16, test=0)])
        house.stop()
        state = SplitState.from_file(house.settings.state / "split" / f"{run}.json")
        left = [house.settings.state / "blobs" / blob for blob in state.superseded]
        assert left and not any(path.exists() for path in left)
        for path in left:
            path.write_bytes(b"as if the power had failed")
        house.start()
        assert not any(path.exists() for path in left)
        assert all(house.house.blobs.find(blob) for blob in house.status(run).weights.values())


def test_a_user_that_finds_weights_gone_checks_in_again_and_gives_up_if_they_are_lost(
    server_bundle: Path, tmp_path: Path
) -> None:
    folder, manifest = varied(server_bundle, tmp_path / "bundle", rounds=1, users={"size": 1, "evaluate_every": 0})
    said: list[str] = []
    with loopback(tmp_path) as house, SplitTransport(house.url) as transport:
        run = house.publish(folder, manifest)
        options = SplitOptions(
            url=house.url,
            data=str(write_data(tmp_path / "0.npz", seed=0, train=16, test=0)),
            name="user-0",
            engine="onnxruntime",
            state=str(tmp_path / "user-0"),
        )
        user = SplitUser(options, transport, lambda: house.enrolment_token, say=said.append)
        lost = house.house.blobs.path(house.status(run).weights[modality_adapter("image")])
        data = lost.read_bytes()
        lost.unlink()
        assert user.work_once()
        assert "no blob" in said[-1] and said[-1].endswith("checking in again")
        with pytest.raises(UnknownNameError, match="no blob"):
            user.work_once()
        lost.write_bytes(data)
        while house.status(run).state != "finished":
            assert user.work_once()

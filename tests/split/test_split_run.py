"""Split training over a real socket: two users with two modalities each, and the coordinator between their ends."""

from pathlib import Path

import numpy as np
import pytest

from lamina.bundle import MANIFEST
from lamina.split import FUSION, MIDDLE, Traffic, modality_adapter, task_adapter
from lamina.split_manifest import SplitManifest
from lamina.split_wire import SplitStatus
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

"""Our variation without the coordinator in the loop: the device holds all, frozen layers in int8, and trains every adapter."""

from pathlib import Path

import numpy as np
import pytest

from lamina.bundles.bundle import MANIFEST
from lamina.split.manifest import SplitManifest
from lamina.split.plan import FUSION, MIDDLE, task_adapter
from tests.split.house import loopback, varied, write_data


@pytest.mark.slow
def test_two_users_learn_without_sending_a_single_activation(device_bundle: Path, tmp_path: Path) -> None:
    changes = {"rounds": 4, "switch": {"window": 2, "threshold": 1e6}}
    folder, manifest = varied(device_bundle, tmp_path / "bundle", **changes)
    files = [write_data(tmp_path / f"{i}.npz", seed=i) for i in range(2)]
    with loopback(tmp_path, engine=None) as house:
        run = house.publish(folder, manifest)
        house.join(files, engine="torch")
        status = house.status(run)
        image, audio = (house.weights(status, manifest, task_adapter(m)) for m in ("image", "audio"))
    assert [row.fused for row in status.rounds] == [False, False, False, True]
    assert all(row.traffic.steps == 0 and len(row.users) == 2 for row in status.rounds)
    for modality in (*manifest.plan.modalities, None):
        accuracy = status.rounds[-1].test_accuracy(modality)
        assert accuracy is not None and accuracy > 0.6, modality
    for name in image:
        assert np.array_equal(image[name], audio[name]) == name.startswith(MIDDLE), name
    adapters = sum(part.parameters for part in manifest.parts if part.name in manifest.plan.trained)
    for row in status.rounds:
        for user in row.users:
            assert user.report.bytes_up < 4 * adapters + 60_000  # the update of the round before, and control messages


def test_the_device_gets_frozen_layers_in_int8_and_the_fusion_net_is_exchanged(device_bundle: Path) -> None:
    manifest = SplitManifest.from_file(device_bundle / MANIFEST)
    assert FUSION in manifest.plan.sent(False) and FUSION not in manifest.plan.sent(True)
    layers = [name for name in manifest.plan.frozen if ".layers." in name]
    for name in layers:
        size, count = manifest.blobs[manifest.initial_weights[name]], manifest.part(name).parameters
        assert size < 2.5 * count, name  # int8 with float32 scales, biases and a header, of a tiny layer
    assert all(program.runs_on == "device" for program in manifest.programs["torch"].values())

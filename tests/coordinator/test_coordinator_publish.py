"""Publishing: nothing starts from a bundle that is not whole."""

import numpy as np
from coordinator_harness import InProcess, as_json, make_bundle, problem_of, work_until_finished

from lamina.bundles.manifest import Manifest
from lamina.encoding.tensors import encode, hash_bytes


def post(coordinator: InProcess, manifest: Manifest):
    return coordinator.post_manifest(manifest.to_json())


def test_a_published_run_waits_for_its_cohort(coordinator: InProcess) -> None:
    bundle = make_bundle()
    assert coordinator.publish(bundle) == "run-1"
    status = coordinator.status()
    assert (status.name, status.state, status.stage, status.round, status.rounds) == ("tiny_plan", "running", 0, 0, ())
    assert status.weights == bundle.manifest.initial_weights
    assert "0 of 2 devices are here" in status.detail


def test_the_manifest_is_a_blob_with_its_digest_as_address(coordinator: InProcess) -> None:
    bundle = make_bundle()
    coordinator.publish(bundle)
    assert coordinator.status().manifest == hash_bytes(bundle.manifest.to_json())
    assert Manifest.from_json(coordinator.blob(hash_bytes(bundle.manifest.to_json()))) == bundle.manifest


def test_publishing_the_same_bundle_again_makes_another_run(coordinator: InProcess) -> None:
    bundle = make_bundle()
    assert [coordinator.publish(bundle) for _ in range(3)] == ["run-1", "run-2", "run-3"]
    answer = coordinator.http.get("/v1/runs", headers=coordinator.admin)
    assert as_json(answer) == {"runs": ["run-1", "run-2", "run-3"]}


def test_two_runs_of_one_bundle_do_not_touch_each_other(coordinator: InProcess) -> None:
    bundle = make_bundle()
    coordinator.publish(bundle)
    coordinator.publish(bundle)
    devices = [coordinator.join(name) for name in "ab"]
    work_until_finished(coordinator, devices, "run-1")
    assert coordinator.status("run-2").weights == bundle.manifest.initial_weights or coordinator.status("run-2").rounds
    work_until_finished(coordinator, devices, "run-2")
    assert coordinator.weights("run-1") == coordinator.weights("run-2")


def test_a_missing_blob_is_named(coordinator: InProcess) -> None:
    bundle = make_bundle()
    missing = min(bundle.blobs)
    for digest in set(bundle.blobs) - {missing}:
        coordinator.http.put(f"/v1/blobs/{digest}", content=bundle.blobs[digest], headers=coordinator.admin)
    assert missing in problem_of(post(coordinator, bundle.manifest), 422, "bundle")
    assert as_json(coordinator.http.get("/v1/runs", headers=coordinator.admin)) == {"runs": []}


def test_a_blob_of_another_size_is_named(coordinator: InProcess) -> None:
    bundle = make_bundle()
    coordinator.publish(bundle)
    altered = min(bundle.blobs)
    blobs = {**bundle.manifest.blobs, altered: bundle.manifest.blobs[altered] + 1}
    detail = problem_of(post(coordinator, bundle.manifest.model_copy(update={"blobs": blobs})), 422, "bundle")
    assert altered in detail


def test_initial_weights_of_another_shape_are_refused_by_segment(coordinator: InProcess) -> None:
    bundle = make_bundle()
    coordinator.publish(bundle)
    data = encode({"weight": np.zeros((2, 2), np.float32)})
    digest = hash_bytes(data)
    coordinator.http.put(f"/v1/blobs/{digest}", content=data, headers=coordinator.admin)
    manifest = bundle.manifest.model_copy(
        update={
            "initial_weights": {**bundle.manifest.initial_weights, "head": digest},
            "blobs": {**bundle.manifest.blobs, digest: len(data)},
        }
    )
    assert "segment head" in problem_of(post(coordinator, manifest), 422, "tensor-file")


def test_a_manifest_with_an_unknown_key_is_refused(coordinator: InProcess) -> None:
    text = make_bundle().manifest.to_json().replace(b'"format"', b'"fromat"')
    answer = coordinator.post_manifest(text)
    assert "fromat" in problem_of(answer, 422, "config")


def test_only_the_admin_publishes(coordinator: InProcess) -> None:
    device = coordinator.join("phone")
    answer = coordinator.http.post("/v1/runs", content=make_bundle().manifest.to_json(), headers=device.headers)
    problem_of(answer, 401, "not-enrolled")

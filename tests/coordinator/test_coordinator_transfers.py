"""How weights and updates travel: what is agreed with whom, what is refused, and that the master stays float32."""

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import zstandard
from coordinator_harness import (
    REPORT,
    Bundle,
    Device,
    InProcess,
    as_json,
    downgrade,
    make_bundle,
    problem_of,
    schema_version,
    tensors_of,
    work_until_finished,
)
from hypothesis import given
from hypothesis import strategies as st

from coordinator.store.tables import SCHEMA_VERSION
from lamina.cli.status import encodings_of, table_of
from lamina.encoding.compression import compress, decompress
from lamina.encoding.tensors import ENCODINGS, encode, hash_bytes, max_file_bytes
from lamina.federation.terms import Terms, agree, shortfall
from lamina.plans.plan import Cohort, Training
from lamina.wire import Assignment, CheckIn

ALL = {"encodings": ENCODINGS, "compressions": ("none", "zstd")}
"""What a device of today can do."""


def facts(**known: object) -> CheckIn:
    return CheckIn.model_validate(
        {"engine": "torch", "modalities": ("motion",), "train_examples": 1, "test_examples": 0, **known}
    )


@pytest.mark.parametrize(
    ("plan", "device", "agreed"),
    [
        ("fp32", ("fp32", "fp16", "int8"), "fp32"),
        ("fp16", ("fp32", "fp16", "int8"), "fp16"),
        ("int8", ("fp32", "fp16", "int8"), "int8"),
        ("int8", ("fp32", "fp16"), "fp16"),
        ("int8", ("fp32",), "fp32"),
        ("int8", (), "fp32"),
        ("fp16", ("int8",), "fp32"),
    ],
)
def test_the_smallest_that_both_allow_is_agreed(plan, device, agreed) -> None:
    terms = agree(Training(download_encoding=plan, upload_encoding="fp32"), facts(encodings=device))
    assert (terms.download_encoding, terms.upload_encoding) == (agreed, "fp32")
    terms = agree(Training(download_encoding="fp32", upload_encoding=plan), facts(encodings=device))
    assert (terms.download_encoding, terms.upload_encoding) == ("fp32", agreed)


@given(
    plan=st.tuples(st.sampled_from(ENCODINGS), st.sampled_from(ENCODINGS), st.sampled_from(["none", "zstd"])),
    device=st.tuples(
        st.lists(st.sampled_from(ENCODINGS), max_size=16), st.lists(st.sampled_from(["none", "zstd"]), max_size=16)
    ),
)
def test_nothing_is_rounded_more_than_the_plan_and_the_device_allow(plan, device) -> None:
    training = Training(download_encoding=plan[0], upload_encoding=plan[1], compression=plan[2])
    terms = agree(training, facts(encodings=tuple(device[0]), compressions=tuple(device[1])))
    for agreed, allowed in ((terms.download_encoding, plan[0]), (terms.upload_encoding, plan[1])):
        assert ENCODINGS.index(agreed) <= ENCODINGS.index(allowed)
        assert agreed in {*device[0], "fp32"}
    assert terms.compression in {plan[2], "none"} & {*device[1], "none"}
    assert (shortfall(training, terms) == "") == (terms == Terms(*plan))


def test_what_is_larger_than_the_plan_allows_is_said() -> None:
    training = Training(download_encoding="int8", upload_encoding="fp16", compression="zstd")
    assert shortfall(training, Terms("fp16", "fp32", "none")) == (
        "weights in fp16 instead of int8, updates in fp32 instead of fp16, no zstd"
    )


def published(coordinator: InProcess, **settings: object) -> Bundle:
    """A run with two stages and a cohort of one, so that a single device sees active and frozen segments."""
    bundle = make_bundle(rounds=[1, 1], **{"cohort": Cohort(size=1), **settings})
    coordinator.publish(bundle)
    return bundle


def test_a_device_from_before_these_fields_is_asked_and_answered_as_ever(coordinator: InProcess) -> None:
    published(coordinator, encoding="int8", download_encoding="int8", compression="zstd")
    device = coordinator.join("old")
    known = {"engine": "torch", "modalities": ["motion"], "train_examples": 10, "test_examples": 0, "run": None}
    answer = coordinator.http.post("/v1/check-in", content=json.dumps(known), headers=device.headers)
    assert set(as_json(answer)) == {
        "kind", "phase", "run", "manifest", "stage", "round", "weights", "lease_seconds", "upload_encoding",
    }  # fmt: skip
    work = Assignment.model_validate_json(answer.content)
    assert work.upload_encoding == "fp32"
    assert set(work.weights.values()) <= set(coordinator.status().weights.values())
    assert device.send(work).status_code == 200


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_weights_come_as_agreed_and_the_master_stays_fp32(
    coordinator: InProcess, tmp_path: Path, encoding, compression
) -> None:
    """Initial weights in stage 0, aggregated and frozen ones in stage 1."""
    bundle = published(coordinator, download_encoding=encoding, compression=compression)
    device = coordinator.join("a", **ALL)
    for stage in (0, 1):
        work = device.work()
        masters = coordinator.status().weights
        assert (work.stage, work.download_encoding, work.download_compression) == (stage, encoding, compression)
        assert set(work.compressed_weights) == (set(work.weights) if compression == "zstd" else set())
        for name, digest in work.weights.items():
            specs = bundle.manifest.segment(name).tensors
            master = tensors_of(coordinator.blob(masters[name]), specs, tmp_path)
            data = coordinator.blob(digest)
            assert data == encode(master, encoding)
            assert (digest == masters[name]) == (encoding == "fp32")
            if compression == "zstd":
                packed = coordinator.blob(work.compressed_weights[name])
                assert len(packed) < len(data)
                assert decompress(packed, "zstd", max_file_bytes(specs)) == data
        assert {coordinator.blob(digest)[:4096].count(b'"encoding":"fp32"') for digest in masters.values()} == {1}
        assert device.work() == work
        assert device.send(work).status_code == 200


def test_devices_of_all_encodings_train_in_one_round(coordinator: InProcess, tmp_path: Path) -> None:
    bundle = make_bundle(
        rounds=[1, 0], encoding="int8", download_encoding="int8", compression="zstd", cohort=Cohort(size=3, min_updates=1)
    )
    coordinator.publish(bundle)
    devices = [
        coordinator.join("a"),
        coordinator.join("b", encodings=("fp32", "fp16")),
        coordinator.join("c", **ALL),
    ]
    for device in devices:
        device.check_in()
    works = [device.work() for device in devices]
    assert [work.upload_encoding for work in works] == ["fp32", "fp16", "int8"]
    specs = bundle.manifest.exchange_specs(0)
    sent = [tensors_of(device.body(work), specs, tmp_path) for device, work in zip(devices, works, strict=True)]
    assert {device.send(work).status_code for device, work in zip(devices, works, strict=True)} == {200}

    status = coordinator.status()
    (row,) = status.rounds
    assert [(u.device, u.download_encoding, u.upload_encoding, u.upload_compression) for u in row.updates] == [
        ("a", "fp32", "fp32", "none"),
        ("b", "fp16", "fp16", "none"),
        ("c", "int8", "int8", "zstd"),
    ]
    assert row.notes == (
        "a takes weights in fp32 instead of int8, updates in fp32 instead of int8, no zstd",
        "b takes weights in fp16 instead of int8, updates in fp16 instead of int8, no zstd",
    )
    for name in bundle.manifest.plan.stages[0].active:
        tensors = bundle.manifest.segment(name).tensors
        start = tensors_of(bundle.blobs[bundle.manifest.initial_weights[name]], tensors, tmp_path)
        new = tensors_of(coordinator.blob(status.weights[name]), tensors, tmp_path)
        for tensor, value in new.items():
            mean = np.mean([update[f"{name}/{tensor}"].astype(np.float64) for update in sent], axis=0)
            np.testing.assert_allclose(value, start[tensor] + mean, rtol=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_mixed_encodings_give_the_same_bytes_in_any_order_and_over_restarts(make_coordinator, order) -> None:
    outcomes = []
    abilities = ({}, {"encodings": ("fp32", "fp16")}, ALL)
    for name, sequence, is_disturbed in (("calm", (0, 1, 2), False), ("other", order, True)):
        coordinator: InProcess = make_coordinator(name)
        coordinator.publish(make_bundle(encoding="int8", download_encoding="int8", compression="zstd", cohort=Cohort(size=3)))
        devices = [coordinator.join(f"d{index}", **abilities[index]) for index in range(3)]
        for device in devices:
            device.check_in()
        for index in sequence:
            assert devices[index].send(devices[index].work()).status_code == 200
            if is_disturbed:
                coordinator.restart()
        outcomes.append(coordinator.weights())
    assert outcomes[0] == outcomes[1]


def test_evaluations_use_the_same_variants_and_the_status_says_so(coordinator: InProcess) -> None:
    published(coordinator, download_encoding="int8")
    device = coordinator.join("a", test_examples=4, **ALL)
    device.send(device.work())
    work = device.work()
    assert (work.phase, work.download_encoding) == ("evaluate", "int8")
    assert not set(work.weights.values()) & set(coordinator.status().weights.values())
    device.evaluate(work)
    following = device.work()
    assert following.stage == 1
    assert {name: following.weights[name] for name in work.weights} == work.weights

    (row, _) = coordinator.status().rounds
    assert row.evaluated_encodings == ("int8",)
    assert encodings_of(row) == "down 1 of 1 int8, evaluated in int8"


def count_encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    monkeypatch.setattr(
        "coordinator.store.variants.encode", lambda tensors, encoding: made.append(encoding) or encode(tensors, encoding)
    )
    return made


def test_a_variant_is_made_once_and_survives_restarts(coordinator: InProcess, monkeypatch) -> None:
    made = count_encodings(monkeypatch)
    coordinator.publish(make_bundle(download_encoding="int8", compression="zstd", cohort=Cohort(size=3)))
    devices = [coordinator.join(name, **ALL) for name in "abc"]
    for device in devices:
        device.check_in()
    works = [device.work() for device in devices]
    coordinator.restart()
    works += [device.work() for device in devices]
    assert all(work == works[0] for work in works)
    assert made == ["int8"] * len(works[0].weights)


def test_a_variant_that_is_lost_is_made_again_with_the_same_bytes(coordinator: InProcess, monkeypatch) -> None:
    published(coordinator, download_encoding="fp16", compression="zstd")
    device = coordinator.join("a", **ALL)
    work = device.work()
    digests = [work.weights["head"], work.compressed_weights["head"]]
    before = [coordinator.blob(digest) for digest in digests]
    for digest in digests:
        (coordinator.state / "blobs" / digest).unlink()
    made = count_encodings(monkeypatch)
    assert device.work() == work
    assert [coordinator.blob(digest) for digest in digests] == before
    assert made == ["fp16"]


def test_weights_that_are_past_are_removed_with_their_variants_and_all_else_stays(coordinator: InProcess) -> None:
    bundle = published(coordinator, encoding="fp16", download_encoding="int8", compression="zstd")
    device = coordinator.join("a", **ALL)
    works, masters = [], [coordinator.status().weights]
    while isinstance(work := device.check_in(), Assignment):
        works.append(work)
        device.send(work)
        masters.append(coordinator.status().weights)
    assert [work.stage for work in works] == [0, 1] and masters[1]["head"] != masters[2]["head"]
    stored = {path.name for path in (coordinator.state / "blobs").iterdir()}

    assert stored == {hash_bytes(bundle.manifest.to_json()), *bundle.blobs, *masters[-1].values(), *masters[-2].values()}
    missing = coordinator.http.get(f"/v1/blobs/{works[0].weights['head']}", headers=device.headers)
    problem_of(missing, 404, "unknown-name")
    coordinator.restart()
    assert {path.name for path in (coordinator.state / "blobs").iterdir()} == stored


def test_a_variant_that_a_later_master_shares_stays(coordinator: InProcess) -> None:
    """An update of zeros gives the same master again, and one that int8 cannot tell apart gives the same variant."""
    bundle = published(coordinator, download_encoding="int8")
    device = coordinator.join("a", **ALL)
    work = device.work()
    small = {name: np.full_like(value, 0) for name, value in device.difference(work).items()}
    weight = next(name for name, value in small.items() if value.ndim == 2)
    small[weight][0, 0] = 1e-7
    device.send(work, encode(small))
    assert coordinator.status().weights != bundle.manifest.initial_weights
    for digest in device.work().weights.values():
        assert hash_bytes(coordinator.blob(digest)) == digest


def test_zstd_is_used_only_where_both_sides_have_it(coordinator: InProcess) -> None:
    published(coordinator, compression="zstd")
    device = coordinator.join("a")
    work = device.work()
    assert (work.download_compression, work.upload_compression, work.compressed_weights) == ("none", "none", {})
    assert device.send(work).status_code == 200
    (row, *_) = coordinator.status().rounds
    assert row.notes == ("a takes no zstd",)
    assert row.updates[0].upload_compression == "none"


@pytest.fixture
def able(coordinator: InProcess) -> Device:
    """A device of today in a run that allows everything."""
    published(coordinator, encoding="int8", download_encoding="int8", compression="zstd")
    return coordinator.join("able", **ALL)


def nothing_was_kept(device: Device) -> bool:
    files = list((device.coordinator.state / "updates").iterdir())
    return not files and not device.coordinator.status().rounds[0].updates


def zipped(device: Device, work: Assignment, data: bytes, encoding: str = "int8", **headers: str | None):
    report = REPORT.model_copy(update={"upload_encoding": encoding})
    return device.send(work, data, report=report, headers={"Content-Encoding": "zstd", **headers})


def test_a_compressed_update_counts_once_however_often_it_is_sent(able: Device) -> None:
    work = able.work()
    body = compress(able.body(work), "zstd")
    assert len(body) < len(able.body(work))
    answers = [zipped(able, work, body) for _ in range(3)]
    able.coordinator.restart()
    answers.append(zipped(able, work, body))
    assert {(answer.status_code, answer.content) for answer in answers} == {(200, answers[0].content)}
    assert as_json(answers[0])["sha256"] == hash_bytes(body)
    assert len(able.coordinator.status().rounds[0].updates) == 1


def test_a_device_may_always_send_more_than_it_was_asked_for(able: Device) -> None:
    """fp32 without compression: it rounds nothing, so there is nothing to refuse."""
    work = able.work()
    assert able.send(work, encode(able.difference(work)), report=REPORT).status_code == 200
    (update,) = able.coordinator.status().rounds[0].updates
    assert (update.upload_encoding, update.upload_compression) == ("fp32", "none")


def test_a_bomb_is_refused(able: Device) -> None:
    work = able.work()
    limit = max_file_bytes(able.specs(work))
    bomb = zstandard.ZstdCompressor(level=3).compress(bytes(200 << 20))
    assert len(bomb) < limit
    detail = problem_of(zipped(able, work, bomb), 413, "too-large")
    assert f"becomes {200 << 20} bytes, at most {limit} are legal" in detail
    assert nothing_was_kept(able)
    assert able.send(work).status_code == 200


def test_damaged_compressed_bodies_are_refused(able: Device) -> None:
    work = able.work()
    whole = compress(able.body(work), "zstd")
    for body in (b"", b"hello", whole[:-5], whole[:20], able.body(work)):
        problem_of(zipped(able, work, body), 422, "tensor-file")
    assert "hash-mismatch" in zipped(able, work, whole, **{"Content-Digest": f"sha-256=:{'A' * 43}=:"}).text
    assert nothing_was_kept(able)


def test_an_unknown_coding_is_refused_and_identity_is_none(able: Device) -> None:
    work = able.work()
    answer = able.send(work, able.body(work), headers={"Content-Encoding": "gzip"})
    assert "'gzip' is not known" in problem_of(answer, 400, "protocol")
    report = REPORT.model_copy(update={"upload_encoding": "int8"})
    assert able.send(work, able.body(work), report=report, headers={"Content-Encoding": "identity"}).status_code == 200


def test_an_encoding_or_a_compression_that_was_not_asked_for_is_refused(coordinator: InProcess) -> None:
    published(coordinator, encoding="fp16")
    device = coordinator.join("a", **ALL)
    work = device.work()
    body = encode(device.difference(work), "int8")
    report = REPORT.model_copy(update={"upload_encoding": "int8"})
    refused = problem_of(device.send(work, body, report=report), 409, "update-rejected")
    assert refused == "an update in int8 was not asked for: send fp16, or fp32"
    refused = problem_of(device.send(work, body), 422, "tensor-file")
    assert refused == "the file is encoded as int8, but its report says fp32"
    refused = problem_of(zipped(device, work, compress(device.body(work), "zstd"), "fp16"), 409, "update-rejected")
    assert refused == "an update compressed with zstd was not asked for: send it as it is"
    assert nothing_was_kept(device)
    assert device.send(work).status_code == 200


def test_a_hostile_int8_update_is_refused_by_name(able: Device) -> None:
    work = able.work()
    body = encode(able.difference(work), "int8")
    scale = body.index(b"head/weight#scale")
    assert scale > 0
    huge = {name: value * np.float32(1e34) for name, value in able.difference(work).items()}
    report = REPORT.model_copy(update={"upload_encoding": "int8"})
    refused = problem_of(able.send(work, encode(huge, "int8"), report=report), 422, "tensor-file")
    assert "above 10000" in refused
    assert nothing_was_kept(able)


def test_the_status_command_says_what_is_not_fp32(coordinator: InProcess) -> None:
    from rich.console import Console

    def shown() -> str:
        console = Console(width=250, file=StringIO())
        console.print(table_of(coordinator.status()))
        return console.file.getvalue()

    coordinator.publish(make_bundle(rounds=[1, 0], encoding="fp16", download_encoding="int8"))
    a, b = coordinator.join("a", **ALL), coordinator.join("b")
    a.check_in()
    b.check_in()
    assert "not fp32" not in shown()
    assert "b takes weights in fp32 instead of int8, updates in fp32 instead of fp16" in shown()
    work_until_finished(coordinator, [a, b])
    assert "down 1 of 2 int8, up 1 of 2 fp16" in shown()


def test_initial_weights_must_be_fp32(coordinator: InProcess) -> None:
    bundle = make_bundle()
    segment = bundle.manifest.segment("head")
    data = encode({spec.name: np.zeros(spec.shape, np.float32) for spec in segment.tensors}, "int8")
    digest = hash_bytes(data)
    manifest = bundle.manifest.model_copy(
        update={
            "initial_weights": {**bundle.manifest.initial_weights, "head": digest},
            "blobs": {**bundle.manifest.blobs, digest: len(data)},
        }
    )
    for blob in (*bundle.blobs.values(), data):
        coordinator.http.put(f"/v1/blobs/{hash_bytes(blob)}", content=blob, headers=coordinator.admin)
    answer = coordinator.post_manifest(manifest.to_json())
    assert "segment head: encoded as int8; they must be fp32" in problem_of(answer, 422, "tensor-file")


def test_a_plan_with_a_compression_that_is_not_installed_is_refused(coordinator: InProcess, monkeypatch) -> None:
    monkeypatch.setattr("coordinator.rounds.publish.available_compressions", lambda: ("none",))
    manifest = make_bundle(compression="zstd").manifest
    answer = coordinator.post_manifest(manifest.to_json())
    assert "pip install 'lamina[coordinator]'" in problem_of(answer, 422, "config")


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION))
def test_a_database_of_an_older_version_is_taken_on(coordinator: InProcess, version: int) -> None:
    """The rows of the first stand for devices and updates in fp32, those of the second for devices with all modalities."""
    coordinator.publish(make_bundle(rounds=[1, 0]))
    a, b = coordinator.join("a", test_examples=4), coordinator.join("b")
    a.check_in()
    b.send(b.work())
    before = coordinator.status()
    coordinator.stop()
    downgrade(coordinator.state, version)

    coordinator.start()
    assert coordinator.status() == before
    assert work_until_finished(coordinator, [a, b]).rounds[0].test_accuracy == 0.75
    assert schema_version(coordinator.state) == SCHEMA_VERSION

"""Who may publish, what a bundle on disk must have, and what a real device does with what a real coordinator shows it."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from coordinator_harness import Bundle, InProcess, make_bundle, problem_of
from typer.testing import CliRunner

from coordinator.settings import Settings
from edge_client.job import Job
from edge_client.talk.device import Device, Options
from edge_client.talk.transport import Transport
from lamina.bundles.bundle import SIGNATURE, read_bundle, sign_bundle
from lamina.bundles.keys import VARIABLE, SigningKey, keys_folder, new_key, own_key, trust_key, users_trust
from lamina.bundles.signing import TrustedKeys, fingerprint, key_text
from lamina.cli.key import key as key_command
from lamina.cli.publish import publish
from lamina.cli.serve import serve
from lamina.client import Client
from lamina.encoding.tensors import hash_bytes
from lamina.errors import ConfigError, HashMismatchError, SignatureError
from lamina.plans.plan import Cohort
from lamina.wire import SIGNATURE_HEADER, Signature
from tests.edge_client.tiny import make_data


@pytest.fixture
def others_key(tmp_path: Path) -> SigningKey:
    """The key of an exporter on another machine."""
    return new_key("alice", tmp_path / "others keys")


@pytest.fixture
def no_trusted_keys() -> Any:
    """Takes back what a test trusted with `lamina key trust`."""
    yield
    (keys_folder() / "trusted.json").unlink(missing_ok=True)


def post(coordinator: InProcess, body: bytes, signature: Signature | str | None) -> httpx.Response:
    text = signature.model_dump_json() if isinstance(signature, Signature) else signature
    headers = coordinator.admin | ({} if text is None else {SIGNATURE_HEADER: text})
    return coordinator.http.post("/v1/runs", content=body, headers=headers)


def send_blobs(coordinator: InProcess, bundle: Bundle) -> bytes:
    for digest, data in bundle.blobs.items():
        coordinator.http.put(f"/v1/blobs/{digest}", content=data, headers=coordinator.admin)
    return bundle.manifest.to_json()


def runs(coordinator: InProcess) -> list[str]:
    return list(coordinator.http.get("/v1/runs", headers=coordinator.admin).json()["runs"])


# The coordinator


def test_a_published_signature_is_served_and_survives_a_restart(coordinator: InProcess) -> None:
    bundle = make_bundle()
    coordinator.publish(bundle)
    coordinator.restart()
    answer = coordinator.http.get(f"/v1/manifests/{hash_bytes(bundle.manifest.to_json())}/signature", headers=coordinator.admin)
    assert Signature.from_json(answer.content) == own_key().sign(bundle.manifest.to_json())


def test_the_manifest_is_kept_byte_for_byte(coordinator: InProcess) -> None:
    """It is the bytes that are signed: an indentation that another lamina writes must not break the signature."""
    bundle = make_bundle()
    body = json.dumps(json.loads(send_blobs(coordinator, bundle)), indent=7).encode()
    assert body != bundle.manifest.to_json()
    assert post(coordinator, body, own_key().sign(body)).status_code == 201
    assert coordinator.blob(coordinator.status().manifest) == body


@pytest.mark.parametrize("digest", ["0" * 64, "0" * 63, "..%2f..%2fadmin.token", "Z" * 64])
def test_there_is_no_signature_of_what_was_not_published(coordinator: InProcess, digest: str) -> None:
    answer = coordinator.http.get(f"/v1/manifests/{digest}/signature", headers=coordinator.admin)
    problem_of(answer, 404, "unknown-name")


def test_an_unsigned_manifest_is_refused_unless_the_coordinator_was_told(
    make_coordinator: Callable[..., InProcess],
) -> None:
    strict, lax = make_coordinator("strict"), make_coordinator("lax", allow_unsigned=True)
    bundle = make_bundle()
    assert "is not signed" in problem_of(post(strict, send_blobs(strict, bundle), None), 422, "signature")
    assert runs(strict) == []
    assert post(lax, send_blobs(lax, bundle), None).status_code == 201
    answer = lax.http.get(f"/v1/manifests/{hash_bytes(bundle.manifest.to_json())}/signature", headers=lax.admin)
    problem_of(answer, 404, "unknown-name")


def test_what_was_altered_after_signing_is_refused_even_where_unsigned_is_allowed(
    make_coordinator: Callable[..., InProcess],
) -> None:
    lax = make_coordinator("lax", allow_unsigned=True)
    body = send_blobs(lax, make_bundle())
    signature = own_key().sign(body)
    assert "was altered" in problem_of(post(lax, body + b"\n", signature), 422, "signature")
    truncated = signature.model_dump_json()[:-9]
    assert SIGNATURE_HEADER in problem_of(post(lax, body, truncated), 422, "signature")
    problem_of(post(lax, body, signature.model_dump_json().replace("ed25519", "none")), 422, "signature")
    problem_of(post(lax, body, ""), 422, "signature")
    assert runs(lax) == []


def test_a_key_that_is_not_trusted_is_refused_until_it_is_trusted_without_a_restart(
    coordinator: InProcess, others_key: SigningKey, no_trusted_keys: None
) -> None:
    body = send_blobs(coordinator, make_bundle())
    detail = problem_of(post(coordinator, body, others_key.sign(body)), 422, "signature")
    assert f"lamina key trust {key_text(others_key.public_key)}" in detail and "calls itself 'alice'" in detail
    trust_key(key_text(others_key.public_key))
    assert post(coordinator, body, others_key.sign(body)).status_code == 201


def test_keys_given_to_serve_are_kept_in_the_state_folder(
    tmp_path: Path, others_key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Settings] = []
    monkeypatch.setattr("coordinator.serve.serve", lambda settings, tell: served.append(settings))
    app = typer.Typer()
    app.command()(serve)
    state = tmp_path / "state"
    key = key_text(others_key.public_key)
    assert CliRunner().invoke(app, ["--state", str(state), "--trust", key]).exit_code == 0
    assert CliRunner().invoke(app, ["--state", str(state), "--allow-unsigned"]).exit_code == 0
    assert [settings.allow_unsigned for settings in served] == [False, True]
    assert isinstance(CliRunner().invoke(app, ["--state", str(state), "--trust", key[:-1]]).exception, ConfigError)

    coordinator = InProcess(state)
    body = send_blobs(coordinator, make_bundle())
    assert post(coordinator, body, others_key.sign(body)).status_code == 201
    coordinator.stop()


# A bundle on disk


def test_a_bundle_says_who_signed_it(tmp_path: Path) -> None:
    said: list[str] = []
    folder = make_bundle().write(tmp_path / "bundle")
    assert read_bundle(folder, tell=said.append) == make_bundle().manifest
    assert said == [f"{folder}: signed by key {fingerprint(own_key().public_key)} (default, a key of this machine)"]


def test_an_unsigned_bundle_is_read_only_when_told(tmp_path: Path) -> None:
    folder = make_bundle().write(tmp_path / "bundle")
    (folder / SIGNATURE).unlink()
    with pytest.raises(SignatureError, match="is not signed"):
        read_bundle(folder)
    assert read_bundle(folder, trust=users_trust(allow_unsigned=True)) == make_bundle().manifest


def test_an_altered_manifest_and_a_truncated_signature_are_refused(tmp_path: Path) -> None:
    folder = make_bundle().write(tmp_path / "bundle")
    manifest = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(manifest.replace(b'"tiny_plan"', b'"tiny_plot"'))
    with pytest.raises(SignatureError, match="was altered"):
        read_bundle(folder, trust=users_trust(allow_unsigned=True))
    (folder / "manifest.json").write_bytes(manifest)
    signature = (folder / SIGNATURE).read_bytes()
    for length in (0, 1, len(signature) // 2):
        (folder / SIGNATURE).write_bytes(signature[:length])
        with pytest.raises(SignatureError, match=r"manifest\.sig"):
            read_bundle(folder)


def test_a_bundle_of_another_exporter_can_be_trusted_or_signed_anew(
    tmp_path: Path, others_key: SigningKey, no_trusted_keys: None
) -> None:
    folder = make_bundle().write(tmp_path / "bundle")
    sign_bundle(folder, others_key)
    with pytest.raises(SignatureError, match="not trusted here"):
        read_bundle(folder)
    signed = CliRunner().invoke(key_command, ["sign", str(folder)])
    assert signed.exit_code == 0 and fingerprint(own_key().public_key) in signed.stdout
    assert read_bundle(folder) == make_bundle().manifest

    blob = min((folder / "blobs").iterdir())
    blob.write_bytes(bytes(blob.stat().st_size))
    assert isinstance(CliRunner().invoke(key_command, ["sign", str(folder)]).exception, HashMismatchError)


def test_publish_refuses_before_anything_is_sent(tmp_path: Path, others_key: SigningKey) -> None:
    folder = make_bundle().write(tmp_path / "bundle")
    app = typer.Typer()
    app.command()(publish)
    runner = CliRunner(env={"LAMINA_TOKEN": "t"})
    nobody = "http://127.0.0.1:9"  # would be UnreachableError
    sign_bundle(folder, others_key)
    assert isinstance(runner.invoke(app, [str(folder), nobody]).exception, SignatureError)
    (folder / SIGNATURE).unlink()
    assert isinstance(runner.invoke(app, [str(folder), nobody]).exception, SignatureError)
    assert not isinstance(runner.invoke(app, [str(folder), nobody, "--allow-unsigned"]).exception, SignatureError)


# A device of a coordinator


class Party:
    """A coordinator that takes the keys of two exporters, and what a device in a folder of its own does there."""

    def __init__(self, coordinator: InProcess, folder: Path, others_key: SigningKey) -> None:
        self.coordinator, self.folder, self.others_key = coordinator, folder, others_key
        self.asked: list[str] = []
        self.said: list[str] = []
        self.alter: Callable[[httpx.Request, bytes], bytes] = lambda request, body: body
        TrustedKeys.given([key_text(others_key.public_key)], "alice").write(coordinator.state / "trusted.json")
        make_data(folder / "data.npz")

    def publish(self, seed: int, key: SigningKey | None) -> str:
        body = send_blobs(self.coordinator, make_bundle(seed=seed, cohort=Cohort(size=1)))
        answer = post(self.coordinator, body, key.sign(body) if key else None)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["run"])

    def join(self, run: str, **options: Any) -> Job | None:
        """A device of the same folder, from its start to its first job."""
        self.asked, self.said = [], []
        connect = partial(Transport, transport=httpx.MockTransport(self._handle), say=self.said.append)
        known = {"data": str(self.folder / "data.npz"), "name": "attic", "engine": "onnxruntime", "run": run}
        with connect("http://coordinator") as transport:
            chosen = Options("http://coordinator", state=str(self.folder / "device"), **(known | options))
            return Device(chosen, transport, lambda: self._token("enrolment"), self.said.append).next_job()

    @property
    def pinned(self) -> set[str]:
        return set(TrustedKeys.read(self.folder / "device" / "trusted.json").names)

    @property
    def fetched(self) -> list[str]:
        return [path for path in self.asked if path.startswith("/v1/blobs/")]

    def _token(self, kind: str) -> str:
        return (self.coordinator.state / f"{kind}.token").read_text().strip()

    def _handle(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.url.path)
        headers = {name: value for name, value in request.headers.items() if name != "host"}
        answer = self.coordinator.http.request(request.method, request.url.path, content=request.read(), headers=headers)
        body = self.alter(request, answer.content)
        kept = {name: answer.headers[name] for name in ("content-type", "content-range") if name in answer.headers}
        return httpx.Response(
            answer.status_code if body == answer.content else 200,
            headers=kept | {"Content-Length": str(len(body))},
            stream=httpx.ByteStream(body),
        )


@pytest.fixture
def party(make_coordinator: Callable[..., InProcess], tmp_path: Path, others_key: SigningKey) -> Party:
    return Party(make_coordinator("coordinator", allow_unsigned=True), tmp_path, others_key)


def test_a_device_pins_the_first_key_says_so_and_keeps_it(party: Party) -> None:
    run = party.publish(0, own_key())
    job = party.join(run)
    assert job is not None and all(Path(program.path).is_file() for program in job.programs.values())
    assert party.pinned == {own_key().public_key}
    (line,) = (line for line in party.said if "from now on only" in line)
    assert fingerprint(own_key().public_key) in line and "--trust" in line

    assert party.join(run) is not None  # a restart: the signature on disk is verified again, and not fetched
    assert not any("signature" in path for path in party.asked)
    assert not any("from now on" in line for line in party.said)


def test_another_key_is_refused_afterwards_before_anything_is_fetched(party: Party) -> None:
    first, second = party.publish(0, own_key()), party.publish(1, party.others_key)
    party.join(first)
    with pytest.raises(SignatureError) as refused:
        party.join(second)
    assert f"join again with --trust {key_text(party.others_key.public_key)}" in refused.value.message
    assert "trusted.json" in refused.value.message
    assert party.fetched == []
    assert party.pinned == {own_key().public_key}
    with pytest.raises(SignatureError):  # nor is it forgotten by a restart, or by --allow-unsigned
        party.join(second, allow_unsigned=True)

    assert party.join(second, trust=[key_text(party.others_key.public_key)]) is not None
    assert party.pinned == {party.others_key.public_key}
    with pytest.raises(SignatureError):
        party.join(first)


def test_a_key_given_at_join_refuses_all_others_from_the_first_moment(party: Party) -> None:
    run = party.publish(0, own_key())
    with pytest.raises(SignatureError, match="given with --trust"):
        party.join(run, trust=[key_text(party.others_key.public_key)])
    assert party.fetched == [] and party.pinned == {party.others_key.public_key}
    with pytest.raises(SignatureError):  # the same command without the key: it was kept
        party.join(run)
    both = [key_text(key.public_key) for key in (own_key(), party.others_key)]
    assert party.join(run, trust=both) is not None
    assert party.pinned == {own_key().public_key, party.others_key.public_key}


def test_an_unsigned_run_is_refused_by_the_device_unless_told(party: Party) -> None:
    run = party.publish(0, None)
    with pytest.raises(SignatureError, match="is not signed"):
        party.join(run)
    assert party.fetched == [] and party.pinned == set()
    assert party.join(run, allow_unsigned=True) is not None
    assert any("because of --allow-unsigned" in line for line in party.said)
    assert party.pinned == set()


def test_a_coordinator_from_before_signatures_counts_as_unsigned(party: Party) -> None:
    run = party.publish(0, own_key())
    old = Transport("http://coordinator", "x", transport=httpx.MockTransport(party._handle))
    party.coordinator.app.router.routes = [
        route for route in party.coordinator.app.routes if not getattr(route, "path", "").endswith("/signature")
    ]
    with pytest.raises(SignatureError, match="is not signed"):
        party.join(run)
    assert old.signature("0" * 64) is None


def test_a_manifest_altered_on_the_way_is_refused(party: Party) -> None:
    run = party.publish(0, own_key())
    manifest = party.coordinator.status(run).manifest
    party.alter = lambda request, body: body.replace(b"tiny_plan", b"evil_plan") if manifest in request.url.path else body
    with pytest.raises(HashMismatchError, match=manifest):
        party.join(run)
    assert not (party.folder / "device" / "blobs" / manifest).exists()


def test_a_manifest_exchanged_with_its_address_is_refused(party: Party) -> None:
    """Who sits between and names another manifest has no signature for it."""
    run = party.publish(0, own_key())
    party.join(run)
    evil = make_bundle(seed=9, cohort=Cohort(size=1)).manifest
    genuine = party.coordinator.status(run).manifest

    def alter(request: httpx.Request, body: bytes) -> bytes:
        if hash_bytes(evil.to_json()) in request.url.path and "signature" in request.url.path:
            return own_key().sign(b"another manifest").to_json()
        return body.replace(genuine.encode(), hash_bytes(evil.to_json()).encode())

    party.alter = alter
    party.coordinator.http.put(
        f"/v1/blobs/{hash_bytes(evil.to_json())}", content=evil.to_json(), headers=party.coordinator.admin
    )
    with pytest.raises(SignatureError):
        party.join(run)
    assert party.fetched == []


@pytest.mark.parametrize("body", [b"", b"{}", b'{"algorithm": "rsa"}'])
def test_an_answer_that_is_no_signature_is_refused(party: Party, body: bytes) -> None:
    run = party.publish(0, own_key())
    party.alter = lambda request, answer: body if request.url.path.endswith("/signature") else answer
    with pytest.raises(SignatureError, match="the signature from http://coordinator"):
        party.join(run, allow_unsigned=True)
    assert party.fetched == []


def test_damaged_files_of_the_device_never_widen_its_trust(party: Party) -> None:
    first, second = party.publish(0, own_key()), party.publish(1, party.others_key)
    party.join(first)
    (party.folder / "device" / "signature.json").write_bytes(b"{")
    assert party.join(first) is not None  # fetched again
    (party.folder / "device" / "trusted.json").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"trusted\.json"):
        party.join(second)


def test_the_client_sends_the_files_own_bytes(coordinator: InProcess, tmp_path: Path) -> None:
    folder = make_bundle().write(tmp_path / "bundle")
    body = b" " + (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(body)
    sign_bundle(folder, own_key())
    token = (coordinator.state / "admin.token").read_text().strip()
    client = Client("http://coordinator", token, transport=coordinator.http._transport)
    run = client.publish(folder, read_bundle(folder)).run
    assert coordinator.blob(coordinator.status(run).manifest) == body


def test_the_tests_have_keys_of_their_own() -> None:
    assert Path.home() not in keys_folder().parents
    assert keys_folder({VARIABLE: "/somewhere"}) == Path("/somewhere")

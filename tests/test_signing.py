"""Keys of a machine, signatures, and the rule by which a bundle is taken or refused."""

import logging
import os
import pickle
import re
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from typer.testing import CliRunner

from lamina.bundles.keys import VARIABLE, keys_folder, load_key, new_key, own_key, own_keys, public_key, trust_key, users_trust
from lamina.bundles.signing import Trust, TrustedKeys, fingerprint, key_text, parse_key, parse_signature
from lamina.cli.key import key as command
from lamina.encoding.tensors import hash_bytes
from lamina.errors import ConfigError, SignatureError

MANIFEST = b'{"format": 1}\n'
DIGEST = hash_bytes(MANIFEST)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of keys, this user's."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "keys"))
    return tmp_path / "keys"


@pytest.fixture
def lamina_key(folder: Path):
    runner = CliRunner(env={"COLUMNS": "200"})
    return lambda *arguments: runner.invoke(command, [*map(str, arguments)])


def test_the_first_own_key_is_made_and_told_the_next_time_it_is_the_same(folder: Path) -> None:
    said: list[str] = []
    made = own_key(tell=said.append)
    assert len(said) == 1 and str(folder / "default.key") in said[0] and key_text(made.public_key) in said[0]
    assert own_key(tell=said.append).public_key == made.public_key == public_key()
    assert len(said) == 1
    assert (folder / "default.key").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_key_is_never_overwritten(folder: Path) -> None:
    first = new_key().public_key
    before = (folder / "default.key").read_bytes()
    with pytest.raises(ConfigError, match=r"default\.key exists and is never overwritten"):
        new_key()
    assert (folder / "default.key").read_bytes() == before and public_key() == first
    assert sorted(path.name for path in folder.iterdir()) == ["default.key", "default.pub"]


def test_two_processes_that_start_at_once_have_one_key(folder: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(own_key(tell=lambda line: None).public_key)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1


def test_the_private_half_shows_up_nowhere(folder: Path, lamina_key, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    made = own_key(tell=said.append)
    pem = (folder / "default.key").read_text()
    private = serialization.load_pem_private_key(pem.encode(), None)
    secrets = [pem.splitlines()[1], private.private_bytes_raw().hex(), str(list(private.private_bytes_raw()))]
    shown = [repr(made), str(made), caplog.text, *said]
    shown += [lamina_key(*words).output for words in (("new", "--name", "other"), ("show",), ("list",))]
    (folder / "default.key").chmod(0o644)
    with pytest.raises(ConfigError) as refused:
        load_key()
    (folder / "bad.key").write_text(pem.replace("PRIVATE", "BROKEN"))
    (folder / "bad.key").chmod(0o600)
    with pytest.raises(ConfigError) as broken:
        load_key("bad")
    shown += [refused.value.message, broken.value.message]
    for text in shown:
        assert not any(secret in text for secret in secrets)
    with pytest.raises(TypeError, match="not to be copied"):
        pickle.dumps(made)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_file_that_others_can_read_is_refused(folder: Path, mode: int) -> None:
    new_key()
    (folder / "default.key").chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:04o}.*chmod 600"):
        own_key()


def test_a_key_file_of_another_kind_is_refused(folder: Path) -> None:
    folder.mkdir()
    pem = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for name, data in (("rsa", pem), ("empty", b""), ("noise", os.urandom(100))):
        (folder / f"{name}.key").write_bytes(data)
        (folder / f"{name}.key").chmod(0o600)
        with pytest.raises(ConfigError, match=rf"{name}\.key"):
            load_key(name)
    with pytest.raises(ConfigError, match="`lamina key new` makes one"):
        load_key("none")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 65, "ä"])
def test_a_name_that_is_none_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no name for a key"):
        new_key(name)


def test_a_lost_public_half_is_written_again(folder: Path) -> None:
    made = new_key()
    (folder / "default.pub").unlink()
    assert load_key().public_key == made.public_key == public_key()


def test_without_a_variable_the_keys_are_in_the_home_folder() -> None:
    assert keys_folder({}) == Path.home() / ".config" / "lamina" / "keys"
    assert keys_folder({VARIABLE: "/x"}) == Path("/x")


def test_the_same_manifest_and_key_give_the_same_signature(folder: Path) -> None:
    made = new_key()
    assert made.sign(MANIFEST) == load_key().sign(MANIFEST) != made.sign(MANIFEST + b" ")


def test_a_bundle_signed_by_a_trusted_key_is_taken(folder: Path) -> None:
    made = new_key()
    said = users_trust().check(DIGEST, made.sign(MANIFEST))
    assert said == f"signed by key {fingerprint(made.public_key)} (default, a key of this machine)"


def test_an_unsigned_bundle_is_refused_unless_told_otherwise() -> None:
    with pytest.raises(SignatureError, match=r"is not signed.*lamina key sign.*--allow-unsigned"):
        Trust().check(DIGEST, None)
    assert Trust(allow_unsigned=True).check(DIGEST, None) == "not signed"


@pytest.mark.parametrize("allow_unsigned", [False, True])
def test_an_altered_manifest_or_signature_is_refused_whatever_was_told(folder: Path, allow_unsigned: bool) -> None:
    made = new_key()
    good = made.sign(MANIFEST)
    trust = users_trust(allow_unsigned)
    with pytest.raises(SignatureError, match="was altered"):
        trust.check(hash_bytes(MANIFEST + b" "), good)
    flipped = f"{int(good.signature[0], 16) ^ 1:x}{good.signature[1:]}"
    with pytest.raises(SignatureError, match="was altered"):
        trust.check(DIGEST, good.model_copy(update={"signature": flipped}))
    other = new_key("other")
    with pytest.raises(SignatureError, match="was altered"):
        trust.check(DIGEST, good.model_copy(update={"public_key": other.public_key}))


@pytest.mark.parametrize("allow_unsigned", [False, True])
def test_a_bundle_signed_by_another_key_is_refused_with_the_way_out(folder: Path, tmp_path: Path, allow_unsigned: bool) -> None:
    mine, other = new_key(), new_key("alice", tmp_path / "others")
    with pytest.raises(SignatureError) as refused:
        users_trust(allow_unsigned).check(DIGEST, other.sign(MANIFEST))
    message = refused.value.message
    assert fingerprint(other.public_key) in message and "calls itself 'alice'" in message
    assert fingerprint(mine.public_key) in message
    assert f"`lamina key trust {key_text(other.public_key)}`" in message

    trust_key(key_text(other.public_key), "alice of the lab")
    assert "(alice of the lab, by `lamina key trust`)" in users_trust().check(DIGEST, other.sign(MANIFEST))


def test_a_signature_of_something_else_by_the_same_key_does_not_count(folder: Path) -> None:
    """The signed message begins with a text that only bundles have."""
    made = new_key()
    raw = made._private.sign(bytes.fromhex(DIGEST)).hex()
    with pytest.raises(SignatureError, match="was altered"):
        users_trust().check(DIGEST, made.sign(MANIFEST).model_copy(update={"signature": raw}))


def test_a_file_that_is_no_signature_is_refused(folder: Path) -> None:
    text = new_key().sign(MANIFEST).to_json().decode()
    assert parse_signature(text, "x") == load_key().sign(MANIFEST)
    broken = [text[:-20], "", "[]", text.replace("ed25519", "rsa"), text.replace('"format": 1', '"format": 2')]
    broken += [re.sub(r'"signature": "..', '"signature": "', text), text.replace("default", "\\u001b[31m")]
    for data in broken:
        with pytest.raises(SignatureError, match="the file is not a valid Signature"):
            parse_signature(data, "the file")


def test_a_public_key_is_read_back_and_anything_else_refused(folder: Path) -> None:
    made = new_key().public_key
    assert parse_key(f" {key_text(made)}\n") == made
    neutral = "01" + "00" * 31  # of small order: under it, everything is signed
    for text in (
        made,
        "",
        key_text(made[:-1]),
        key_text(made.upper()),
        key_text(neutral),
        f"ssh-ed25519 {made}",
        key_text("zz" * 32),
    ):
        with pytest.raises(ConfigError, match=r"is no .*public key"):
            parse_key(text)


def test_fingerprints_are_short_and_differ(folder: Path) -> None:
    found = {fingerprint(new_key(f"k{index}").public_key) for index in range(20)}
    assert len(found) == 20
    assert all(re.fullmatch(r"[a-z2-7]{4}(-[a-z2-7]{4}){3}", text) for text in found)


def test_a_damaged_file_of_trusted_keys_is_refused_not_taken_for_empty(tmp_path: Path) -> None:
    path = tmp_path / "trusted.json"
    assert TrustedKeys.read(path).keys == ()
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"trusted\.json"):
        TrustedKeys.read(path)


def test_the_commands_make_show_trust_and_list_keys(lamina_key, tmp_path: Path, folder: Path) -> None:
    assert "no keys in" in lamina_key("list").stdout
    made = lamina_key("new")
    mine, other = public_key(), new_key("other", tmp_path / "others").public_key
    expected = [key_text(mine), f"fingerprint: {fingerprint(mine)}"]
    assert made.stdout.splitlines() == lamina_key("show").stdout.splitlines() == expected
    assert isinstance(lamina_key("new").exception, ConfigError)

    assert fingerprint(other) in lamina_key("trust", key_text(other), "--name", "bob").stdout
    lamina_key("trust", key_text(other), "--name", "bob of the lab")
    lines = lamina_key("list").stdout.splitlines()
    assert lines == [
        f"own      {fingerprint(mine)}  {key_text(mine)}  default",
        f"trusted  {fingerprint(other)}  {key_text(other)}  bob of the lab",
    ]
    assert isinstance(lamina_key("trust", other).exception, ConfigError)
    assert set(own_keys()) == {mine}


def test_every_command_and_option_has_help(lamina_key) -> None:
    for name in ("new", "show", "trust", "list", "sign"):
        text = lamina_key(name, "--help").output
        assert text.count("--name") == (0 if name == "list" else 1)
        assert len(text.splitlines()) > 5

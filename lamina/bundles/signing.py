"""Who made a bundle: its signature, the keys that one trusts, and the one rule by which a bundle is taken or refused.

A bundle's identity is the sha256 of its manifest's bytes, and the manifest holds the sha256 of every program and initial
weight; so one Ed25519 signature over that sha256 covers the whole bundle. `manifest.sig` beside the manifest holds it
(`lamina.wire.Signature`), and so does the coordinator's answer to a device. The signed message is

    b"lamina bundle v1\\0" + the 32 bytes of sha256(manifest.json)

The weights that a run makes are not signed: they are data, never executed, and only the coordinator knows them.
"""

from base64 import b32encode
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lamina.bundles.ed25519 import is_public_key, is_valid
from lamina.errors import ConfigError, SignatureError
from lamina.files import write_durably
from lamina.record import Record
from lamina.wire import Signature

KEY_PREFIX = "lamina-ed25519:"
"""Begins a public key wherever one is written for people; 64 hex digits follow."""
_DOMAIN = b"lamina bundle v1\0"  # so that a signature made for something else never counts for a bundle


def signed_message(digest: str) -> bytes:
    """What is signed for the manifest whose bytes have this sha256."""
    return _DOMAIN + bytes.fromhex(digest)


def parse_key(text: str) -> str:
    """The 64 hex digits of a public key as `lamina key show` prints it. Raises ConfigError for anything else."""
    digits = text.strip().removeprefix(KEY_PREFIX)
    if text.strip() == digits or len(digits) != 64 or not set(digits) <= set("0123456789abcdef"):
        raise ConfigError(f"{text[:100]!r} is no public key: it is {KEY_PREFIX} and 64 hex digits, see `lamina key show`")
    if not is_public_key(bytes.fromhex(digits)):
        raise ConfigError(f"{text[:100]!r} is no Ed25519 public key: no key pair has these digits; copy it again")
    return digits


def key_text(public_key: str) -> str:
    return KEY_PREFIX + public_key


def fingerprint(public_key: str) -> str:
    """80 bits of the key's sha256 in four groups, to compare by eye or over the telephone: abcd-efgh-ijkl-mnop."""
    text = b32encode(sha256(bytes.fromhex(public_key)).digest()[:10]).decode().lower()
    return "-".join(text[i : i + 4] for i in range(0, 16, 4))


class TrustedKey(Record):
    """A public key, and where the trust in it comes from, for the messages."""

    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    name: Annotated[str, Field(max_length=200)] = ""


class TrustedKeys(Record):
    """A file of trusted keys: of a device, of a coordinator, or of a user."""

    format: Literal[1] = 1
    keys: tuple[TrustedKey, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "TrustedKeys":
        """Empty if there is no such file. Raises ConfigError for a damaged one: no keys would mean to trust anybody."""
        return cls.from_file(path) if path.exists() else cls()

    def write(self, path: Path) -> None:
        if not path.exists() or path.read_bytes() != self.to_json():
            write_durably(path, self.to_json())

    @classmethod
    def given(cls, texts: Iterable[str], name: str) -> "TrustedKeys":
        """Keys as they stand on a command line. Raises ConfigError."""
        return cls(keys=tuple(TrustedKey(key=key, name=name) for key in dict.fromkeys(map(parse_key, texts))))

    @property
    def names(self) -> dict[str, str]:
        return {key.key: key.name for key in self.keys}


@dataclass(frozen=True)
class Trust:
    """What a machine accepts: bundles signed by these keys (key -> its name), and unsigned ones if told so.

    `way_out` ends a refusal for a key that is not among them: how this machine is told to trust it.
    """

    keys: dict[str, str] = field(default_factory=dict)
    allow_unsigned: bool = False
    way_out: str = "if you know it to be the exporter's, run `lamina key trust {key}`"

    def check(self, digest: str, signature: Signature | None) -> str:
        """Who signed the manifest with this sha256, in words. Raises SignatureError if it is not to be used.

        `allow_unsigned` lets a manifest without a signature pass, never one whose signature is wrong.
        """
        if signature is None:
            if not self.allow_unsigned:
                raise SignatureError(
                    f"manifest {digest[:12]} is not signed: anybody may have written its programs. Sign it where it was "
                    "exported (`lamina key sign`) and publish it again, or say --allow-unsigned if you know where it comes from"
                )
            return "not signed"
        check_signature(digest, signature)
        if signature.public_key not in self.keys:
            known = ", ".join(f"{fingerprint(key)} ({name})" for key, name in self.keys.items()) or "none"
            raise SignatureError(
                f"manifest {digest[:12]} is signed by key {described(signature)}, which is not trusted here; trusted: {known}. "
                f"Ask who exported it to compare the fingerprint; {self.way_out.format(key=key_text(signature.public_key))}"
            )
        return f"signed by key {fingerprint(signature.public_key)} ({self.keys[signature.public_key]})"


def check_signature(digest: str, signature: Signature) -> None:
    """Raises SignatureError unless the key named in the signature signed the manifest with this sha256."""
    if not is_valid(bytes.fromhex(signature.public_key), signed_message(digest), bytes.fromhex(signature.signature)):
        raise SignatureError(
            f"the signature by key {described(signature)} is not one of manifest {digest[:12]}: the manifest or the signature "
            "was altered. Fetch the bundle again, or export it again"
        )


def described(signature: Signature) -> str:
    """The key's fingerprint, and what the signer calls it, which proves nothing."""
    return fingerprint(signature.public_key) + (f" (calls itself {signature.key_name!r})" if signature.key_name else "")


def parse_signature(data: bytes | str, source: str) -> Signature:
    """Raises SignatureError for bytes that are no signature, or of an algorithm that is not known here."""
    try:
        return Signature.from_json(data, source)
    except ConfigError as error:
        raise SignatureError(f"{error.message}. Sign the bundle again where it was exported (`lamina key sign`)") from error

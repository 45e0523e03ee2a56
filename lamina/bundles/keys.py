"""The keys of this machine: those that sign bundles, and those of other exporters that its user trusts.

    $LAMINA_KEYS or ~/.config/lamina/keys
        NAME.key        an own key, private: PKCS #8 in PEM, as openssl reads it, with mode 0600
        NAME.pub        its public half, one line, to hand out
        trusted.json    public keys of others

Signing needs `cryptography`, which comes with the extra `export`; everything else here does without.
"""

import os
import re
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lamina.bundles.signing import Trust, TrustedKey, TrustedKeys, key_text, parse_key, signed_message
from lamina.encoding.tensors import hash_bytes
from lamina.errors import ConfigError
from lamina.files import PRIVATE, write_durably
from lamina.wire import Signature

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

DEFAULT = "default"
"""Name of the key that `lamina export` signs with."""
TRUSTED = "trusted.json"
VARIABLE = "LAMINA_KEYS"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class SigningKey:
    """A private key in use. Neither its text nor a pickle of it holds the secret."""

    def __init__(self, name: str, private: "Ed25519PrivateKey") -> None:
        self.name = name
        self.public_key = private.public_key().public_bytes_raw().hex()
        self._private = private

    def sign(self, manifest: bytes) -> Signature:
        """The signature of a manifest's bytes; the same bytes give the same signature."""
        message = signed_message(hash_bytes(manifest))
        return Signature(public_key=self.public_key, signature=self._private.sign(message).hex(), key_name=self.name)

    def __repr__(self) -> str:
        return f"SigningKey({self.name!r}, {key_text(self.public_key)}, private=***)"

    def __reduce__(self) -> str:
        raise TypeError("a signing key is not to be copied into a file or another process")


def keys_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Raises ConfigError where the user has no home folder and LAMINA_KEYS is not set, as in some containers."""
    if given := environment.get(VARIABLE):
        return Path(given)
    try:
        return Path.home() / ".config" / "lamina" / "keys"
    except RuntimeError as error:
        raise ConfigError(f"this user has no home folder for keys; set {VARIABLE} to a folder") from error


def new_key(name: str = DEFAULT, folder: Path | None = None) -> SigningKey:
    """Makes a key. Raises ConfigError, and leaves what is there, if a key of that name exists."""
    path = _path(name, folder)
    private = _library().generate()
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f".{name}.{os.urandom(8).hex()}.partial")
    try:
        write_durably(partial, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), PRIVATE)
        # A link, unlike a rename, never replaces: of two processes that make this key at once, one wins.
        os.link(partial, path)
    except FileExistsError as error:
        raise ConfigError(
            f"{path} exists and is never overwritten; give another name, or move it away if nobody needs its signatures"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    key = SigningKey(name, private)
    write_durably(path.with_suffix(".pub"), f"{key_text(key.public_key)}\n".encode())
    return key


def load_key(name: str = DEFAULT, folder: Path | None = None) -> SigningKey:
    """Raises ConfigError if there is no such key, if others can read it, or if the file holds something else."""
    path = _path(name, folder)
    kind = _library()
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ConfigError(
                    f"key {path} has mode {mode:04o}, so other users may have read it; run `chmod 600 {path}`, or make a new "
                    "key if they may have"
                )
            data = file.read()
    except OSError as error:
        raise ConfigError(f"key {path} cannot be read: {error.strerror}; `lamina key new` makes one") from error
    try:
        private = load_pem_private_key(data, None)
    except (ValueError, TypeError) as error:  # never with the library's words, which might quote the file
        raise ConfigError(f"{path} is no private key in PEM without a password") from error
    if not isinstance(private, kind):
        raise ConfigError(f"{path} holds a key of another kind than Ed25519; `lamina key new` makes one")
    key = SigningKey(name, private)
    if not path.with_suffix(".pub").exists():  # the process that made it was interrupted, or somebody tidied up
        write_durably(path.with_suffix(".pub"), f"{key_text(key.public_key)}\n".encode())
    return key


def own_key(folder: Path | None = None, tell: Callable[[str], None] | None = None) -> SigningKey:
    """This machine's key for bundles; the first time, a new one, with one line that says so (default: to stderr)."""
    if not _path(DEFAULT, folder).exists():
        try:
            key = new_key(DEFAULT, folder)
        except ConfigError:  # another process was quicker
            return load_key(DEFAULT, folder)
        (tell or _to_stderr)(
            f"made a key that signs this machine's bundles: {_path(DEFAULT, folder)} "
            f"(keep it secret; its public half: {key_text(key.public_key)})"
        )
        return key
    return load_key(DEFAULT, folder)


def public_key(name: str = DEFAULT, folder: Path | None = None) -> str:
    """The public half of an own key, without touching the private one. Raises ConfigError if there is none."""
    path = _path(name, folder).with_suffix(".pub")
    try:
        return parse_key(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; `lamina key new` makes a key") from error


def own_keys(folder: Path | None = None) -> dict[str, str]:
    """Public key -> name, of all keys of this machine."""
    return {
        public_key(path.stem, folder): path.stem
        for path in sorted((folder or keys_folder()).glob("*.pub"))
        if path.with_suffix(".key").exists()
    }


def trusted_keys(folder: Path | None = None) -> TrustedKeys:
    return TrustedKeys.read((folder or keys_folder()) / TRUSTED)


def trust_key(text: str, name: str = "", folder: Path | None = None) -> TrustedKey:
    """Trusts a public key from now on; a key that was trusted gets the new name. Raises ConfigError if it is none."""
    added = TrustedKey(key=parse_key(text), name=name)
    others = tuple(key for key in trusted_keys(folder).keys if key.key != added.key)
    TrustedKeys(keys=(*others, added)).write((folder or keys_folder()) / TRUSTED)
    return added


def users_trust(allow_unsigned: bool = False, folder: Path | None = None) -> Trust:
    """What the user of this machine trusts: own keys, and those added with `lamina key trust`."""
    others = {key: f"{name or 'no name'}, by `lamina key trust`" for key, name in trusted_keys(folder).names.items()}
    own = {key: f"{name}, a key of this machine" for key, name in own_keys(folder).items()}
    return Trust(others | own, allow_unsigned)


def _path(name: str, folder: Path | None) -> Path:
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise ConfigError(f"{name!r} is no name for a key: 1 to 64 letters, digits, '.', '_', '-', not beginning with '.'")
    return (folder or keys_folder()) / f"{name}.key"


def _library() -> "type[Ed25519PrivateKey]":
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError as error:
        raise ConfigError("signing needs the package cryptography: pip install 'lamina[export]'") from error
    return Ed25519PrivateKey


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")

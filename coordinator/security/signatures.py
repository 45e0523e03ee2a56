"""Signatures of published manifests: whose are accepted, and where they lie for the devices that ask.

They are files beside the blobs, not blobs: the same manifest may be signed anew by another key, and the newest counts.
"""

import re
from pathlib import Path

from coordinator.settings import Settings
from lamina.bundles.keys import users_trust
from lamina.bundles.signing import Trust, TrustedKeys
from lamina.errors import UnknownNameError
from lamina.files import write_durably
from lamina.wire import Signature

_ADDRESS = re.compile(r"[0-9a-f]{64}")


def publishers_trust(settings: Settings) -> Trust:
    """The keys that may publish here, as the files say now: a key trusted meanwhile needs no restart.

    Raises ConfigError for a damaged file of keys.
    """
    return Trust(
        users_trust().keys | TrustedKeys.read(settings.trusted).names,
        settings.allow_unsigned,
        "if you know it to be the exporter's, run `lamina key trust {key}` on the coordinator's machine and publish again",
    )


def keep_signature(settings: Settings, digest: str, signature: Signature) -> None:
    """Durably, and before the run begins. Raises DiskFullError."""
    write_durably(_path(settings, digest), signature.to_json())


def get_signature(settings: Settings, digest: str) -> Signature:
    """The signature of a manifest. Raises UnknownNameError if it was published without one, or not at all."""
    if not _ADDRESS.fullmatch(digest) or not (path := _path(settings, digest)).is_file():
        raise UnknownNameError(f"there is no signature of a manifest {digest[:80]!r} here; publish the signed bundle again")
    return Signature.from_file(path)


def _path(settings: Settings, digest: str) -> Path:
    return settings.signatures / f"{digest}.json"

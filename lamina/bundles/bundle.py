"""A bundle on disk: `manifest.json`, `manifest.sig` and `blobs/<sha256>`. Reading verifies every byte, and who made it,
before anything is used."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from lamina.bundles.keys import SigningKey, users_trust
from lamina.bundles.manifest import Manifest
from lamina.bundles.signing import Trust, parse_signature
from lamina.encoding.tensors import hash_bytes
from lamina.errors import BundleError, HashMismatchError
from lamina.files import write_durably
from lamina.wire import Signature

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
BLOBS = "blobs"


def read_bundle(
    folder: Path,
    on_blob: Callable[[int, int], None] = lambda done, total: None,
    *,
    trust: Trust | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """The manifest of a bundle that a trusted key signed, and whose blobs are all there and unaltered.

    `trust` is by default that of this machine's user. `tell` is called with who signed; `on_blob(done, total)` after each
    verified blob. Raises SignatureError for a bundle that is unsigned (unless `trust` allows that), altered, or signed by
    another key; BundleError for a missing blob or a wrong size, and HashMismatchError for altered content, naming the file.
    """
    data = manifest_bytes(folder)
    tell(f"{folder}: {(trust or users_trust()).check(hash_bytes(data), read_signature(folder))}")
    manifest = Manifest.from_json(data, str(folder / MANIFEST))
    read_blobs(folder, manifest, on_blob)
    return manifest


def read_blobs(folder: Path, manifest: Manifest, on_blob: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Verifies that the blobs of a manifest are all there and unaltered; raises as `read_bundle` does."""
    for done, (digest, size) in enumerate(manifest.blobs.items(), start=1):
        path = blob_path(folder, digest)
        if not path.is_file():
            raise BundleError(f"blob {digest} is missing from {path.parent}; export the bundle again")
        check_blob(path, digest, size)
        on_blob(done, len(manifest.blobs))


def manifest_bytes(folder: Path) -> bytes:
    """The bytes that are signed, and whose sha256 is the bundle's identity. Raises BundleError if there are none."""
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; make one with `lamina export`")
    return (folder / MANIFEST).read_bytes()


def bundle_digest(folder: Path) -> str:
    """The identity of a bundle: the sha256 of its manifest's bytes as they lie there. Raises BundleError if there are none."""
    return hash_bytes(manifest_bytes(folder))


def read_signature(folder: Path) -> Signature | None:
    """The bundle's signature, not verified; None if it has none. Raises SignatureError if the file holds something else."""
    path = folder / SIGNATURE
    return parse_signature(path.read_bytes(), str(path)) if path.exists() else None


def sign_bundle(folder: Path, key: SigningKey, manifest: bytes | None = None) -> Signature:
    """Writes `manifest.sig` for the manifest of a bundle, or for one that is about to be written there."""
    signature = key.sign(manifest_bytes(folder) if manifest is None else manifest)
    write_durably(folder / SIGNATURE, signature.to_json())
    return signature


def blob_path(folder: Path, digest: str) -> Path:
    return folder / BLOBS / digest


def check_blob(path: Path, digest: str, size: int | None = None) -> None:
    """Raises HashMismatchError unless the file's size and sha256 are the promised ones."""
    actual_size = path.stat().st_size
    if size is not None and actual_size != size:
        raise HashMismatchError(f"{path} has {actual_size} bytes, the manifest says {size}; fetch or export it again")
    actual = hash_file(path)
    if actual != digest:
        raise HashMismatchError(f"{path} has sha256 {actual}, expected {digest}; it was altered: fetch or export it again")


def hash_file(path: Path) -> str:
    """sha256 of a file, read in pieces of 1 MiB."""
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()

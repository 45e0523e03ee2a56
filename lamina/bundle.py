"""A bundle on disk: `manifest.json` and `blobs/<sha256>`. Reading verifies every byte before anything is used."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from lamina.errors import BundleError, HashMismatchError
from lamina.manifest import Manifest

MANIFEST = "manifest.json"
BLOBS = "blobs"


def read_bundle(folder: Path, on_blob: Callable[[int, int], None] = lambda done, total: None) -> Manifest:
    """The manifest of a bundle whose blobs are all there and unaltered.

    `on_blob(done, total)` is called after each verified blob. Raises BundleError for a missing blob or a wrong size and
    HashMismatchError for altered content, naming the file.
    """
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; make one with `lamina export`")
    manifest = Manifest.from_file(folder / MANIFEST)
    for done, (digest, size) in enumerate(manifest.blobs.items(), start=1):
        path = blob_path(folder, digest)
        if not path.is_file():
            raise BundleError(f"blob {digest} is missing from {path.parent}; export the bundle again")
        check_blob(path, digest, size)
        on_blob(done, len(manifest.blobs))
    return manifest


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

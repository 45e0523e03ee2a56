"""Fashion-MNIST: grey images (1, 28, 28) of clothes, 10 classes, 60,000 for training and 10,000 for test.

It ships in the Debian package dataset-fashion-mnist, which `apt-get download` fetches without installing it; it is checked by
sha256 and read as the archive that it is, on any system. One modality, so it is for layer-wise training of an image encoder
alone, supervised or self-supervised.
"""

import gzip
import io
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.fetch import cache_folder
from lamina.bundles.bundle import hash_file
from lamina.errors import ConfigError, DataError

PACKAGE = (
    "dataset-fashion-mnist=0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
CLASSES, SIDE = 10, 28
_FOLDER = "usr/share/datasets/fashion-mnist"
_IMAGES_MAGIC, _LABELS_MAGIC = 2051, 2049


@dataclass(frozen=True)
class Images:
    """image (n, 1, 28, 28) float32 in [0, 1], label (n,) int64."""

    image: NDArray[np.float32]
    label: NDArray[np.int64]

    def take(self, rows: NDArray[np.intp]) -> "Images":
        return Images(self.image[rows], self.label[rows])


def load_fashion(seed: int, train_examples: int = 60_000, test_examples: int = 10_000) -> tuple[Images, Images]:
    """(train, test): so many examples of each of the data set's own parts, equally many of each class, in random order.

    The same seed gives the same examples. Raises ConfigError if there are not that many, or the classes would differ in size,
    and DataError if the package cannot be had or has another hash.
    """
    arrays = _read_arrays(cache_folder() / "data")
    rng = np.random.default_rng([seed, 5])
    parts = []
    for split, count in (("train", train_examples), ("test", test_examples)):
        label = arrays[f"{split}_label"]
        if count % CLASSES or not 0 < count <= len(label):
            raise ConfigError(f"{split}_examples must be a multiple of {CLASSES}, at most {len(label)}, given {count}")
        rows = rng.permutation(np.concatenate([each[: count // CLASSES] for each in _shuffled_classes(label, rng)]))
        parts.append(_images(arrays, split, rows))
    return parts[0], parts[1]


def load_held_out(seed: int, train_examples: int, examples: int) -> Images:
    """So many images of the training part that `load_fashion(seed, train_examples)` leaves out, equally many of each class: to
    choose settings by. Raises as it does."""
    arrays = _read_arrays(cache_folder() / "data")
    label = arrays["train_label"]
    left = len(label) - train_examples
    if examples % CLASSES or train_examples % CLASSES or not 0 < examples <= left:
        raise ConfigError(f"examples must be a multiple of {CLASSES}, at most the {left} that are left, given {examples}")
    first, last = train_examples // CLASSES, (train_examples + examples) // CLASSES
    shuffled = _shuffled_classes(label, np.random.default_rng([seed, 5]))
    return _images(arrays, "train", np.concatenate([each[first:last] for each in shuffled]))


def _shuffled_classes(label: NDArray[np.uint8], rng: np.random.Generator) -> list[NDArray[np.intp]]:
    """The rows of each class, in random order."""
    return [rng.permutation(np.flatnonzero(label == value)) for value in range(CLASSES)]


def _images(arrays: dict[str, NDArray[np.uint8]], split: str, rows: NDArray[np.intp]) -> Images:
    image, label = arrays[f"{split}_image"][rows], arrays[f"{split}_label"][rows]
    return Images((image.astype(np.float32) / 255)[:, None], label.astype(np.int64))


def fetch_debian(requirement: str, sha256: str, folder: Path) -> Path:
    """The verified .deb of the Debian package `requirement` ("name=version"), downloaded if it is not in `folder` yet.

    Raises DataError that names the package if it cannot be had or has another hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (found := _find(folder, sha256)) is not None:
        return found
    by_hand = f"put the package's .deb with sha256 {sha256} into {folder}"
    try:
        command = ["apt-get", "download", "-q", requirement]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise DataError(
            f"the data package {requirement} is fetched with apt-get, which is not installed here: {by_hand}"
        ) from error
    if (found := _find(folder, sha256)) is not None:
        return found
    errors = [line for line in result.stderr.splitlines() if line.startswith("E:")]
    reason = errors[:1] or ["the downloaded file has another sha256"]
    raise DataError(
        f"the data package {requirement} could not be fetched: {reason[0]}. Run `apt-get update` on Debian, or {by_hand}"
    )


def read_debian_member(package: Path, member: str) -> bytes:
    """The bytes of one file inside a .deb: an ar archive whose part `data.tar.*` has the files.

    Raises DataError if it is none, or lacks the file.
    """
    with package.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise DataError(f"{package} is no Debian package")
        while len(header := file.read(60)) == 60:
            name, size = header[:16].decode("ascii", "replace").rstrip(" /"), int(header[48:58])
            if name.startswith("data.tar"):
                with tarfile.open(fileobj=io.BytesIO(file.read(size))) as archive:
                    try:
                        found = archive.extractfile(f"./{member}")
                    except KeyError as error:
                        raise DataError(f"{package} has no file {member}") from error
                    assert found is not None, member
                    return found.read()
            file.seek(size + size % 2, io.SEEK_CUR)
    raise DataError(f"{package} has no part data.tar; it is not complete")


def parse_idx(data: bytes) -> NDArray[np.uint8]:
    """The array of an idx file of images (n, 28, 28) or labels (n,). Raises DataError for anything else."""
    magic, count = (int(value) for value in np.frombuffer(data[:8].ljust(8, b"\0"), ">u4"))
    shape = {_IMAGES_MAGIC: (count, SIDE, SIDE), _LABELS_MAGIC: (count,)}.get(magic)
    if shape is None:
        raise DataError(f"an idx file begins with {_IMAGES_MAGIC} or {_LABELS_MAGIC}, this one with {magic}")
    start = 16 if magic == _IMAGES_MAGIC else 8
    if len(data) != start + int(np.prod(shape)):
        raise DataError(f"an idx file of shape {shape} has {start + int(np.prod(shape))} bytes, this one has {len(data)}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _read_arrays(folder: Path) -> dict[str, NDArray[np.uint8]]:
    """{train,test}_{image,label}; prepared once, then cached."""
    cached = folder / "fashion-mnist-v1-20200523.npz"
    if not cached.exists():
        package = fetch_debian(*PACKAGE, folder)
        arrays = {}
        for split, prefix in (("train", "train"), ("test", "t10k")):
            for name, kind in (("image", "images-idx3"), ("label", "labels-idx1")):
                member = f"{_FOLDER}/{prefix}-{kind}-ubyte.gz"
                arrays[f"{split}_{name}"] = parse_idx(gzip.decompress(read_debian_member(package, member)))
        partial = folder / f".{cached.name}.partial.npz"
        np.savez(partial, **arrays)
        partial.replace(cached)
    with np.load(cached) as data:
        return {name: data[name] for name in data.files}


def _find(folder: Path, sha256: str) -> Path | None:
    return next((path for path in folder.glob("*.deb") if hash_file(path) == sha256), None)

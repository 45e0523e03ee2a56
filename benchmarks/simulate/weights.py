"""The weights of a simulated run (`benchmarks.simulate.simulation`): the newest of each segment, in every encoding that is
asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lamina.bundles.bundle import blob_path
from lamina.bundles.manifest import Manifest
from lamina.encoding.compression import Compression, compress
from lamina.encoding.tensors import Encoding, Float32, decode_file, encode, hash_bytes
from lamina.plans.segments import TensorSpec


class SimulatedWeights:
    """`blobs` are the sha256 of the newest float32 weights by segment; `teacher` those that stay for the stage."""

    def __init__(self, manifest: Manifest, bundle: Path, folder: Path) -> None:
        self._manifest, self._bundle, self._folder = manifest, bundle, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.blobs = dict(manifest.initial_weights)
        self.teacher: dict[str, str] = {}
        self._variants: dict[tuple[str, Encoding, Compression], str] = {}

    def path(self, digest: str) -> Path:
        """A blob's file: of the bundle, or of what was aggregated."""
        return blob_path(self._bundle, digest) if digest in self._manifest.blobs else self._folder / digest

    def tensors(self, name: str) -> dict[str, Float32]:
        return decode_file(str(self.path(self.blobs[name])), self._manifest.segment(name).tensors)

    def frozen(self, name: str) -> dict[str, Float32]:
        """The tensors of a segment that are never trained."""
        digest = self._manifest.frozen_tensors.get(name)
        return decode_file(str(self.path(digest)), self._manifest.segment(name).frozen) if digest else {}

    def vector(self, names: Sequence[str]) -> dict[str, Float32]:
        """The tensors of these segments, named `segment/tensor`."""
        return {f"{name}/{key}": value for name in names for key, value in self.tensors(name).items()}

    def replace(self, names: Sequence[str], vector: Mapping[str, Float32]) -> None:
        """Stores new weights of these segments; what is not current any more is deleted."""
        for name in names:
            specs: Sequence[TensorSpec] = self._manifest.segment(name).tensors
            self.blobs[name] = self._put(encode({spec.name: vector[f"{name}/{spec.name}"] for spec in specs}))
        current = {*self.blobs.values()}
        self._variants = {key: blob for key, blob in self._variants.items() if key[0] in current}
        current |= {*self._variants.values(), *self.teacher.values()}
        for path in self._folder.iterdir():
            if path.name not in current:
                path.unlink()

    def variant(self, name: str, encoding: Encoding, compression: Compression) -> str:
        """The blob of a segment's newest weights in an encoding, compressed if that is smaller
        (`coordinator.store.variants`)."""
        master = self.blobs[name]
        if (encoding, compression) == ("fp32", "none"):
            return master
        key = (master, encoding, compression)
        if key not in self._variants:
            if compression == "none":
                self._variants[key] = self._put(encode(self.tensors(name), encoding))
            else:
                plain = self.variant(name, encoding, "none")
                data = self.path(plain).read_bytes()
                packed = compress(data, compression)
                self._variants[key] = self._put(packed) if len(packed) < len(data) else plain
        return self._variants[key]

    def _put(self, data: bytes) -> str:
        digest = hash_bytes(data)
        if digest not in self._manifest.blobs:
            (self._folder / digest).write_bytes(data)
        return digest

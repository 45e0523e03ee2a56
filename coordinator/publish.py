"""Publishing: the admin sends the blobs, then the manifest; a new run begins."""

import logging

from coordinator.house import House
from coordinator.tables import RunRow, WeightRow
from lamina.compression import available_compressions
from lamina.errors import BundleError, ConfigError, TensorFileError
from lamina.manifest import Manifest
from lamina.tensors import decode_one_by_one, file_encoding
from lamina.wire import Published

log = logging.getLogger("lamina.coordinator")


def publish(house: House, manifest: Manifest) -> Published:
    """A new run of the manifest's plan; publishing the same manifest again makes another run.

    Raises ConfigError if the plan wants a compression that is not installed here, BundleError for a blob that is missing
    or has another size, TensorFileError for initial weights that are not the tensors of their segment in fp32,
    DiskFullError.
    """
    compression = manifest.plan.training.compression
    if compression not in available_compressions():
        raise ConfigError(f"the plan wants {compression}, which this coordinator lacks: pip install 'lamina[coordinator]'")
    check_blobs(house, manifest)
    digest = house.blobs.put(manifest.to_json())
    with house.database.write() as session:
        run = RunRow(name=manifest.plan.name, manifest=digest, since_unix_seconds=house.clock())
        session.add(run)
        session.flush()
        for segment, blob in manifest.initial_weights.items():
            session.add(WeightRow(run_number=run.number, segment=segment, blob=blob))
        published = Published(run=run.id)
    log.info("%s is published: plan %r, manifest %s", published.run, manifest.plan.name, digest)
    return published


def check_blobs(house: House, manifest: Manifest) -> None:
    """Everything that a device will be sent for is here, and the weights are the tensors that the plan says."""
    for digest, size in manifest.blobs.items():
        found = house.blobs.size_bytes(digest)
        if found is None:
            raise BundleError(f"blob {digest} of the manifest is not here; send it before the manifest")
        if found != size:
            raise BundleError(f"blob {digest} has {found} bytes, the manifest says {size}; export the bundle again")
    for segment in manifest.segments:
        path = house.blobs.path(manifest.initial_weights[segment.name])
        try:
            if (encoding := file_encoding(str(path))) != "fp32":
                raise TensorFileError(f"encoded as {encoding}; they must be fp32, and devices get them as the plan says")
            for _ in decode_one_by_one(str(path), segment.tensors):
                pass
        except TensorFileError as error:
            raise TensorFileError(f"initial weights of segment {segment.name}: {error.message}") from error

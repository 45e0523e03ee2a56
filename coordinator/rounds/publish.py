"""Publishing: the admin sends the blobs, then the manifest with its signature; a new run begins."""

import logging
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from coordinator.aggregation.calibration import has_programs
from coordinator.house import House
from coordinator.security.signatures import keep_signature, publishers_trust
from coordinator.store.tables import RunRow, WeightRow
from lamina.bundles.manifest import Manifest
from lamina.bundles.signing import parse_signature
from lamina.encoding.compression import available_compressions
from lamina.encoding.tensors import decode_one_by_one, file_encoding, hash_bytes
from lamina.errors import BundleError, ConfigError, TensorFileError
from lamina.plans.segments import TensorSpec
from lamina.wire import SIGNATURE_HEADER, Published

log = logging.getLogger("lamina.coordinator")


_one_at_a_time = Lock()  # a manifest takes many times its size while it is read


def publish_file(house: House, path: Path, signature_text: str | None) -> Published:
    """`publish` of the manifest in a file."""
    with _one_at_a_time:
        return publish(house, path.read_bytes(), signature_text)


def publish(house: House, body: bytes, signature_text: str | None) -> Published:
    """A new run of the plan of a manifest, given as its bytes; publishing the same manifest again makes another run.

    Raises SignatureError unless a trusted key signed these bytes (or none had to), ConfigError if they are no manifest or
    the plan wants a compression that is not installed here, BundleError for programs that the plan needs and the bundle
    lacks, and for a blob that is missing or has another size, TensorFileError for initial weights that are not the tensors
    of their segment in fp32, DiskFullError.
    """
    signature = None if signature_text is None else parse_signature(signature_text, f"the {SIGNATURE_HEADER} header")
    signer = publishers_trust(house.settings).check(hash_bytes(body), signature)
    manifest = Manifest.from_json(body, "the manifest")
    compression = manifest.plan.training.compression
    if compression not in available_compressions():
        raise ConfigError(f"the plan wants {compression}, which this coordinator lacks: pip install 'lamina[coordinator]'")
    check_programs(manifest)
    check_blobs(house, manifest)
    digest = house.blobs.put(body)  # as it came: devices verify the signature of these bytes
    if signature is not None:
        keep_signature(house.settings, digest, signature)
    with house.database.write() as session:
        run = RunRow(name=manifest.plan.name, manifest=digest, since_unix_seconds=house.clock())
        session.add(run)
        session.flush()
        for segment, blob in manifest.initial_weights.items():
            session.add(WeightRow(run_number=run.number, segment=segment, blob=blob))
        published = Published(run=run.id)
    log.info("%s is published: plan %r, manifest %s, %s", published.run, manifest.plan.name, digest, signer)
    return published


def check_programs(manifest: Manifest) -> None:
    """There are programs for whatever the plan lets devices do; they would find out after their download otherwise."""
    plan = manifest.plan
    for stage, programs in zip(plan.stages, manifest.stages, strict=True):
        for subset in plan.device_modalities if stage.rounds else ():
            if not any(part.modalities == subset for part in programs.partial):
                raise BundleError(
                    f"device_modalities of the plan has {list(subset)}, and the bundle has no programs of stage {stage.index} "
                    "for it; export the bundle again"
                )
    if plan.calibration and not any(has_programs(manifest, engine) for engine in manifest.engines):
        raise BundleError("the plan wants calibration, and the bundle has no programs for it; export the bundle again")


def check_blobs(house: House, manifest: Manifest) -> None:
    """Everything that a device will be sent for is here, and the weights are the tensors that the plan says."""
    for digest, size in manifest.blobs.items():
        found = house.blobs.size_bytes(digest)
        if found is None:
            raise BundleError(f"blob {digest} of the manifest is not here; send it before the manifest")
        if found != size:
            raise BundleError(f"blob {digest} has {found} bytes, the manifest says {size}; export the bundle again")
    for segment in manifest.segments:
        name = segment.name
        _check_file(house, manifest.initial_weights[name], segment.tensors, f"initial weights of segment {name}")
        if segment.frozen:
            _check_file(house, manifest.frozen_tensors[name], segment.frozen, f"frozen tensors of segment {name}")


def _check_file(house: House, digest: str, specs: Sequence[TensorSpec], what: str) -> None:
    path = str(house.blobs.path(digest))
    try:
        if (encoding := file_encoding(path)) != "fp32":
            raise TensorFileError(f"encoded as {encoding}; they must be fp32")
        for _ in decode_one_by_one(path, specs):
            pass
    except TensorFileError as error:
        raise TensorFileError(f"{what}: {error.message}") from error

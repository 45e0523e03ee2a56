"""A user's update: what of it is refused before it counts."""

from dataclasses import dataclass

from coordinator.slots import MAX_DIFFERENCE
from lamina.errors import UpdateRejectedError
from lamina.split_bodies import unpack
from lamina.split_manifest import SplitManifest
from lamina.split_wire import SplitReport
from lamina.tensors import Float32


@dataclass(frozen=True)
class Update:
    """`digest` is the sha256 of its body; `differences` are by `part/tensor`."""

    digest: str
    report: SplitReport
    differences: dict[str, Float32]


def read_update(manifest: SplitManifest, fused: bool, digest: str, body: bytes, report: SplitReport) -> Update:
    """Raises UpdateRejectedError for a report of other modalities or of a training that diverged, TensorFileError."""
    plan = manifest.plan
    if set(report.loss) != set(plan.modalities):
        raise UpdateRejectedError(f"the report has losses of {sorted(report.loss)}, not of {list(plan.modalities)}")
    if max(abs(value) for value in (report.fused_loss, *report.loss.values())) > MAX_DIFFERENCE:
        raise UpdateRejectedError(f"the report has a loss above {MAX_DIFFERENCE:g}: the training diverged")
    found = unpack(body, manifest.specs(plan.sent(fused)), plan.traffic.updates, plan.traffic.compression)
    for name, value in found.items():
        if value.size and float(abs(value).max()) > MAX_DIFFERENCE:
            raise UpdateRejectedError(f"tensor {name!r} moved by more than {MAX_DIFFERENCE:g}: the training diverged")
    return Update(digest, report, found)

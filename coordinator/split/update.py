"""A user's update: what of it is refused before it counts."""

from dataclasses import dataclass

from coordinator.rounds.slots import MAX_DIFFERENCE
from lamina.encoding.tensors import Float32
from lamina.errors import UpdateRejectedError
from lamina.split.bodies import unpack
from lamina.split.manifest import SplitManifest
from lamina.split.wire import SplitReport

MAX_LOSS = 1e30
"""A mean of losses of so much is still finite."""


@dataclass(frozen=True)
class Update:
    """`modalities` are the user's if it has not all; `digest` is the sha256 of its body; `differences` are by `part/tensor`."""

    modalities: tuple[str, ...]
    digest: str
    report: SplitReport
    differences: dict[str, Float32]


def read_update(
    manifest: SplitManifest, fused: bool, modalities: tuple[str, ...], digest: str, body: bytes, report: SplitReport
) -> Update:
    """Raises UpdateRejectedError for a report of other modalities or of a training that diverged, TensorFileError."""
    plan = manifest.plan
    trained = modalities or plan.modalities
    if set(report.loss) != set(trained):
        raise UpdateRejectedError(f"the report has losses of {sorted(report.loss)}, not of {list(trained)}")
    if (report.fused_loss is None) != bool(modalities):
        raise UpdateRejectedError("a report has a fused loss if and only if its user has all modalities")
    if max(abs(value) for value in (report.fused_loss or 0.0, *report.loss.values())) > MAX_LOSS:
        raise UpdateRejectedError(f"the report has a loss above {MAX_LOSS:g}: the training diverged")
    found = unpack(body, manifest.specs(plan.sent(fused, modalities)), plan.traffic.updates, plan.traffic.compression)
    for name, value in found.items():
        if value.size and float(abs(value).max()) > MAX_DIFFERENCE:
            raise UpdateRejectedError(f"tensor {name!r} moved by more than {MAX_DIFFERENCE:g}: the training diverged")
    return Update(modalities, digest, report, found)

"""What an assignment and a manifest must agree on before this device acts on them: a coordinator is not believed."""

from collections.abc import Sequence

from lamina.bundles.manifest import Manifest
from lamina.encoding.compression import available_compressions
from lamina.errors import ProtocolError
from lamina.wire import Assignment


def check_assignment(work: Assignment, manifest: Manifest, own_modalities: Sequence[str]) -> None:
    """Raises ProtocolError for work that the manifest does not have, or that was never for this device's modalities."""
    plan, where = manifest.plan, f"the assignment of stage {work.stage}, round {work.round}"
    if work.stage >= len(plan.stages):
        raise ProtocolError(f"{where} names a stage that run {work.run} does not have; its last one is {len(plan.stages) - 1}")
    stage = plan.stages[work.stage]
    if work.round >= max(stage.rounds, 1):
        raise ProtocolError(f"{where} names a round that the stage does not have; it has {stage.rounds}")
    attached = {*stage.active, *stage.frozen}
    for what, names in (("weights", work.weights), ("teacher_weights", work.teacher_weights)):
        strangers = sorted(set(names) - attached)
        if strangers:
            raise ProtocolError(f"{where} has {what} of {strangers[0]}, which is no segment of that stage")
    strangers = sorted(set(work.compressed_weights) - set(work.weights))
    if strangers:
        raise ProtocolError(f"{where} has compressed weights of {strangers[0]} and no plain ones")
    for compression in {work.upload_compression, work.download_compression} - set(available_compressions()):
        raise ProtocolError(f"{where} asks for {compression}, which this device did not offer")
    model = plan.model
    in_order = tuple(name for name in model.modalities if name in work.modalities)
    if work.modalities != in_order:
        raise ProtocolError(f"{where} is for {list(work.modalities)}, the model has {list(model.modalities)} in this order")
    lacking = [name for name in work.modalities if name not in own_modalities]
    if lacking:
        raise ProtocolError(f"{where} is for {lacking[0]}, and this device has {list(own_modalities)}")


def check_manifest(manifest: Manifest) -> None:
    """Raises ProtocolError for a manifest that contradicts itself: hashes that stand for programs and are none, references to
    weights that a program does not take, tensors that need more bytes than the file of their values has."""
    by_engine = [
        *manifest.frozen_programs.items(),
        *((engine, {"loss": blob}) for engine, blob in manifest.loss_programs.items()),
    ]
    by_engine += [(engine, {"loss": blob}) for engine, blob in manifest.view_loss_programs.items()]
    for stage in manifest.stages:
        for roles in (stage.train, stage.eval, stage.calibrate, *(each for p in stage.partial for each in (p.train, p.eval))):
            by_engine += [(engine, {f"stage {stage.index}": blob}) for engine, blob in roles.items()]
    for engine, blobs in by_engine:
        for what, blob in blobs.items():
            if blob not in manifest.programs or manifest.programs[blob].engine != engine:
                raise ProtocolError(f"the manifest says that {what} has a program for {engine}, and has none; {_NOT_OURS}")
    for program in manifest.programs.values():
        if any(place >= len(program.weights) for reference in program.references for place in reference.tensors):
            raise ProtocolError(f"the manifest has a program that refers to weights that it does not take; {_NOT_OURS}")
    for segment in manifest.segments:
        size = manifest.blobs[manifest.initial_weights[segment.name]]
        if segment.parameters > size:
            raise ProtocolError(
                f"the manifest says that {segment.name} has {segment.parameters} values in a file of {size} bytes; {_NOT_OURS}"
            )


_NOT_OURS = "it was not made by `lamina export`"

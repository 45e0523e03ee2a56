"""What a plan does that its reader should know before the first round, as sentences for the manifest."""

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from export.models.parameters import frozen
from lamina.plans.model import Contrastive, ModuleEncoder, SelfSupervised
from lamina.plans.plan import Plan
from lamina.plans.segments import prefix_chain


def notes_of(plan: Plan, zeroed: Sequence[str]) -> list[str]:
    """Notes of an export; `zeroed` are the layers that start as the identity."""
    return [*_zero_init(zeroed), *_untrained(plan, zeroed), *_reconstructions(plan), *_views_for_pairs(plan)]


def frozen_notes(segments: Mapping[str, nn.Module]) -> list[str]:
    """What stays as it is because the model's author froze it, by modality."""
    found: dict[str, dict[str, int]] = {}
    for name, module in segments.items():
        if tensors := frozen(module):
            counts = found.setdefault(name.split(".", maxsplit=1)[0], {})
            counts[name] = sum(value.numel() for value in tensors.values())
    return [
        f"{owner}: {sum(counts.values()):,} numbers with requires_grad=False, in {_listed(list(counts))}, are never trained"
        for owner, counts in found.items()
    ]


def _zero_init(zeroed: Sequence[str]) -> Iterator[str]:
    if zeroed:
        yield f"zero_init: {_listed(zeroed)} start as the identity, so the model is the same before and after they are attached"


def _untrained(plan: Plan, zeroed: Sequence[str]) -> Iterator[str]:
    """Parts of the encoders that are attached and never trained: well with trained weights, but noise with random ones."""
    trained = {name for stage in plan.stages if stage.rounds for name in stage.active}
    last = plan.stages[-1]
    for encoder in plan.model.encoders:
        chain = [n for n in prefix_chain(plan.model, encoder.modality) if n in (*last.active, *last.frozen)]
        never = [name for name in chain if name not in trained and name not in zeroed]
        if never:
            start = "unless its factory gives trained weights, they" if isinstance(encoder, ModuleEncoder) else "they"
            yield (
                f"{_listed(never)} are attached and never trained: {start} stay random; give their stages rounds, or "
                "start from trained weights"
            )


def _reconstructions(plan: Plan) -> Iterator[str]:
    """Options whose published description is not known in full (methods, section 2.2)."""
    what = "is our reconstruction of LW-FedSSL v1 to v3: its equations are not published"
    if plan.calibration:
        yield f"calibration {what}"
    if isinstance(plan.model.objective, SelfSupervised) and plan.model.objective.align:
        yield f"align {what}"


def _views_for_pairs(plan: Plan) -> Iterator[str]:
    if isinstance(plan.model.objective, Contrastive) and plan.device_modalities:
        yield (
            "devices with one modality have no pairs: they train it on two views of each example (SimCLR), which is our own "
            "choice and no published method"
        )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} segments)"

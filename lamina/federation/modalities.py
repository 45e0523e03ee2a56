"""Which modalities a device takes part with: all of the model, or a set that the plan has programs for.

In rows and messages, no names at all stand for all modalities.
"""

from collections.abc import Iterable

from lamina.plans.plan import Plan


def largest_set(plan: Plan, available: Iterable[str]) -> tuple[str, ...] | None:
    """What a device with data for these modalities takes part with; None if it has too few.

    Of several sets of the same size, it is the first of the plan.
    """
    has = set(available)
    if has.issuperset(plan.model.modalities):
        return ()
    fitting = [subset for subset in plan.device_modalities if has.issuperset(subset)]
    return max(fitting, key=len, default=None)


def is_measured_alike(plan: Plan, modalities: tuple[str, ...]) -> bool:
    """Whether the loss and the hits of a device with these modalities may be averaged with those of devices that have all.

    With a contrastive objective, a device with one modality finds the other view of an example, not the other half of a pair:
    other chances and another scale. A mean of both would move with who happens to take part.
    """
    return not modalities or plan.model.of_device(modalities) is plan.model


def to_text(modalities: tuple[str, ...]) -> str:
    return ",".join(modalities)


def from_text(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()

"""Strategies: the rules that make the stages of a plan.

    layerwise    LW-FedMML: stage s trains the layers attached at s, the final norms and the heads (stem in stage 0 only);
                 everything below is frozen.
    progressive  Prog-FedMML: stage s trains all that is attached so far.
    end_to_end   FedMML: one stage trains the whole model.

The three share `attached layers per stage`; they differ only in what is frozen (arXiv 2407.15426).
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile

from lamina.errors import ConfigError
from lamina.plans.model import ModelDescription
from lamina.plans.plan import Plan, Stage, StrategyName
from lamina.plans.segments import HEAD, heads_of, layer, norm, segment_names, stem


def make_stages(
    model: ModelDescription,
    strategy: StrategyName,
    rounds: int | Sequence[int],
    learning_rate: float | Sequence[float],
    layers_per_stage: int | Mapping[str, int] = 1,
    freeze_stems: bool = False,
    rate_scales: Mapping[str, float] | None = None,
    fixed: Collection[str] = (),
) -> tuple[Stage, ...]:
    """Stages of a strategy.

    `rounds` is the number of rounds of each stage, or the total, which is spread evenly with the remainder on the last
    stages. `learning_rate` is one value, or one for each stage. `layers_per_stage` may differ by modality. `freeze_stems`
    leaves the stems as they start, in every stage: a pretrained embedding table is large, and rarely worth training.
    `rate_scales` are those of every stage (`lamina.plans.plan.Stage`). `fixed` are stems and layers of which nothing can be
    trained: a layer of them counts for none of `layers_per_stage` and is attached with the next one that can be, and what no
    trained segment comes before is frozen from the start.
    Raises ConfigError if the lists do not have one entry for each stage.
    """
    if strategy == "end_to_end":
        layers = {modality: model.encoder(modality).layers for modality in model.modalities}
    elif isinstance(layers_per_stage, int):
        layers = {modality: layers_per_stage for modality in model.modalities}
    else:
        layers = dict(layers_per_stage)
    if set(layers) != set(model.modalities) or any(count < 1 for count in layers.values()):
        raise ConfigError(f"layers_per_stage must give at least 1 for each of {list(model.modalities)}, given {layers}")
    ends = {modality: _ends(model, modality, layers[modality], fixed) for modality in model.modalities}
    num_stages = max(map(len, ends.values()))
    rounds_of = _spread(rounds, num_stages) if isinstance(rounds, int) else list(rounds)
    rates = [learning_rate] * num_stages if isinstance(learning_rate, int | float) else list(learning_rate)
    for name, values in (("rounds", rounds_of), ("learning_rate", rates)):
        if len(values) != num_stages:
            raise ConfigError(
                f"{name} has {len(values)} entries, but strategy {strategy!r} makes {num_stages} stages of this model"
            )
    if any(count < 0 for count in rounds_of):
        raise ConfigError(f"rounds must not be negative, given {rounds_of}")

    order = segment_names(model)
    stages = []
    for index in range(num_stages):
        active: set[str] = {HEAD}
        frozen: set[str] = set()
        for modality in model.modalities:
            reached = [0, *ends[modality], *[model.encoder(modality).layers] * num_stages]
            first, end = reached[index : index + 2]
            attached = [layer(modality, i) for i in range(end)]
            active |= {norm(modality), *heads_of(model, modality)}
            is_layerwise = strategy == "layerwise" and index > 0
            frozen |= set(attached[:first]) if is_layerwise else set()
            active |= set(attached[first:]) if is_layerwise else set(attached)
            (frozen if is_layerwise or freeze_stems else active).add(stem(modality))
        stages.append(
            Stage(
                index=index,
                active=tuple(name for name in order if name in active),
                frozen=tuple(name for name in order if name in frozen),
                rounds=rounds_of[index],
                learning_rate=rates[index],
                rate_scales=dict(rate_scales or {}),
            )
        )
    return tuple(_with_fixed(stage, model, fixed) for stage in stages)


def freeze_fixed(plan: Plan, fixed: Collection[str]) -> Plan:
    """The plan, where `fixed` segments that no trained one comes before are frozen instead of active, in every stage.

    They would stay as they are in either case; but in front of what is trained they belong to the frozen prefix, whose
    features are stored, and which no gradient has to pass.
    """
    stages = tuple(_with_fixed(stage, plan.model, fixed) for stage in plan.stages)
    if stages == plan.stages:
        return plan
    return Plan.from_json(plan.model_copy(update={"stages": stages}).to_json(), "the plan with what the model has frozen")


def _with_fixed(stage: Stage, model: ModelDescription, fixed: Collection[str]) -> Stage:
    first = {
        name
        for modality in model.modalities
        for name in takewhile(lambda name: name in fixed, stage.active_chain(model, modality))
    }
    if not first:
        return stage
    return stage.model_copy(
        update={
            "active": tuple(name for name in stage.active if name not in first),
            "frozen": tuple(name for name in segment_names(model) if name in first or name in stage.frozen),
        }
    )


def _ends(model: ModelDescription, modality: str, layers_per_stage: int, fixed: Collection[str]) -> list[int]:
    """How many layers are attached in each stage, until all are."""
    count = model.encoder(modality).layers
    trained = [index for index in range(count) if layer(modality, index) not in fixed]
    last = [index + 1 for index in trained[layers_per_stage - 1 :: layers_per_stage]]
    if not last or len(trained) % layers_per_stage:
        last.append(count)
    return [*last[:-1], count]


def _spread(total: int, parts: int) -> list[int]:
    """`total` rounds over `parts` stages, as even as possible, the remainder on the last ones."""
    if total < 0:
        raise ConfigError(f"rounds must not be negative, given {total}")
    base, extra = divmod(total, parts)
    return [base + (1 if index >= parts - extra else 0) for index in range(parts)]

"""FLOPs of a run, counted by hand: one forward pass of each segment costs a power of ten of its own."""

import pytest

from benchmarks.methods.costs import macs_per_sample, step_macs
from lamina.plans.model import Contrastive, Encoder, ModelDescription, Projection, SelfSupervised, SensorWindows, Supervised
from lamina.plans.plan import Augmentation, DepthDropout, FeatureStore, Plan, Training
from lamina.plans.segments import segment_names
from lamina.plans.strategies import make_stages

STEM, LAYER, NORM, PROJECTION, PREDICTOR, HEAD = (10**power for power in range(6))


def encoder(modality, layers):
    return Encoder(modality=modality, input=SensorWindows(channels=2, samples=8, patch=4), width=8, heads=2, layers=layers)


def plan_of(objective, rounds, modalities=("a",), strategy="layerwise", **training):
    encoders = tuple(encoder(modality, len(rounds)) for modality in modalities)
    model = ModelDescription(name="m", encoders=encoders, projection=Projection(hidden=8, output=8), objective=objective)
    if objective.kind == "self_supervised":
        training = {"augmentation": {"a": Augmentation(noise=0.1)}, "features": FeatureStore(views=8)} | training
    stages = make_stages(model, strategy, list(rounds) if strategy == "layerwise" else [sum(rounds)], 0.1)
    return Plan(name="m", model=model, strategy=strategy, stages=stages, training=Training(batch_size=8, **training))


def macs_of(plan):
    kinds = {"stem": STEM, "norm": NORM, "projection": PROJECTION, "predictor": PREDICTOR, "head": HEAD}
    return {name: kinds.get(name.rpartition(".")[2], LAYER) for name in segment_names(plan.model)}


def counted(plan):
    rounds = [stage.index for stage in plan.stages for _ in range(stage.rounds)]
    return macs_per_sample(plan, macs_of(plan), rounds)


HEADS = NORM + PROJECTION


def test_trained_segments_count_three_times_in_every_epoch_and_a_frozen_one_once():
    plan = plan_of(Supervised(classes=3), (2, 3), local_epochs=2)
    assert counted(plan) == 2 * 2 * 3 * (STEM + LAYER + HEADS + HEAD) + 3 * 2 * 3 * (LAYER + HEADS + HEAD) + STEM + LAYER
    whole = plan_of(Supervised(classes=3), (2, 3), strategy="end_to_end", local_epochs=2)
    assert counted(whole) == 5 * 2 * 3 * (STEM + 2 * LAYER + HEADS + HEAD)


def test_micro_batches_of_a_loss_that_compares_samples_cost_a_further_forward_pass():
    steps = {}
    for objective in (Contrastive(), Supervised(classes=3)):
        for size in (8, 2):
            plan = plan_of(objective, (1, 1), ("a", "b"), micro_batch=size)
            steps[objective.kind, size] = step_macs(plan, plan.stages[1], macs_of(plan))
    both = 2 * (LAYER + HEADS)
    assert steps == {
        ("contrastive", 8): 3 * both,
        ("contrastive", 2): 4 * both,
        ("supervised", 8): 3 * (both + HEAD),
        ("supervised", 2): 3 * (both + HEAD),
    }


def test_both_views_count_and_so_do_the_copies_of_the_model():
    steps = {}
    for objective in (SelfSupervised(), SelfSupervised(method="moco"), SelfSupervised(method="moco", moon=0.5)):
        plan = plan_of(objective, (1, 1))
        steps[objective.method, objective.moon] = step_macs(plan, plan.stages[1], macs_of(plan))
    trained = LAYER + HEADS + PREDICTOR
    assert steps == {
        ("simclr", 0): 2 * 3 * (LAYER + HEADS),
        ("moco", 0): 2 * (3 * trained + LAYER + HEADS),
        ("moco", 0.5): 2 * (3 * trained + 3 * (LAYER + HEADS)),  # momentum, start and previous
    }


@pytest.mark.parametrize(
    ("keep", "rounds", "passes"),
    [
        ("stage", 1, 2),  # one epoch takes versions 0 and 1
        ("stage", 3, 6),
        ("stage", 9, 8),  # then all of them are there
        ("round", 9, 18),
        ("none", 9, 18),
    ],
)
def test_a_frozen_segment_runs_once_for_each_version_that_is_taken(keep, rounds, passes):
    plan = plan_of(SelfSupervised(), (1, rounds), features=FeatureStore(views=8, keep=keep))
    trained = 2 * 3 * (STEM + LAYER + HEADS) + rounds * 2 * 3 * (LAYER + HEADS)
    assert counted(plan) == trained + passes * (STEM + LAYER)


def test_where_nothing_is_stored_every_epoch_runs_the_prefix():
    plan = plan_of(Supervised(classes=3), (1, 2), local_epochs=3, features=FeatureStore(keep="none"))
    trained = 3 * 3 * (STEM + 3 * LAYER + 3 * (HEADS + HEAD))
    assert counted(plan) == trained + 2 * 3 * (STEM + LAYER)


def test_layers_that_were_not_drawn_cost_nothing():
    rounds = (0, 0, 0, 0, 2)
    plans = [
        plan_of(Supervised(classes=3), rounds, features=FeatureStore(keep="round"), depth_dropout=dropout)
        for dropout in (None, DepthDropout(budget=3))
    ]
    whole, drawn = map(counted, plans)
    assert whole - drawn == 2 * 2 * LAYER  # in each round two of four frozen layers, the first always

"""What goes over the wire adds up to the unsplit model: five rounds with both phases, against eager torch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from export.split.modules import HighEnd, LowPrefix
from export.split.split import make_parts
from lamina.encoding.tensors import decode_file
from lamina.plans.plan import SGD
from lamina.plans.segments import classifier, layer, norm, stem
from lamina.split.manifest import SplitManifest
from lamina.split.plan import FUSION, SplitPlan, modality_adapter, task_adapter
from tests.split.house import loopback, varied, write_data

RATE, FUSION_RATE = 0.05, 0.02


def _released_loss(features: Tensor, logits: Tensor, f: Tensor, fused_logits: Tensor, label: Tensor) -> Tensor:
    """The loss after the switch, written down from the method, not from our module."""
    uni, mm = F.cross_entropy(logits, label), F.cross_entropy(fused_logits, label)
    p = torch.softmax(logits, -1)
    kl = (p * (torch.log_softmax(logits, -1) - torch.log_softmax(fused_logits, -1))).sum()
    return 0.6 * (uni + mm / 2) + 0.2 * kl / (uni + mm) + 0.2 * (1 - F.cosine_similarity(features, f, dim=-1).mean())


def _unsplit(plan: SplitPlan, start: dict[str, dict[str, np.ndarray]], arrays: dict[str, np.ndarray], switch_at: int) -> dict:
    """Plain gradient steps of the whole model, one batch a round."""
    parts = make_parts(plan)
    for name, tensors in start.items():
        parts[name].load_state_dict({key: torch.from_numpy(value.copy()) for key, value in tensors.items()})
    frozen = {name: [value.clone() for value in parts[name].parameters()] for name in plan.frozen}
    label = torch.from_numpy(arrays["train_label"])
    for number in range(plan.rounds):
        features = {}
        for m in plan.modalities:
            base, branch = LowPrefix(parts[stem(m)], parts[layer(m, 0)], plan.adapter)(torch.from_numpy(arrays[f"train_{m}"]))
            blocks = [parts[layer(m, i)] for i in range(1, plan.encoder(m).layers)]
            high = HighEnd(parts[task_adapter(m)], blocks, parts[norm(m)])
            features[m] = high(base + parts[modality_adapter(m)](branch))
        f, fused_logits = parts[FUSION](*(value.detach() for value in features.values()))
        total = torch.zeros(())
        for m, value in features.items():
            logits = parts[classifier(m)](value)
            if number < switch_at:
                total = total + F.cross_entropy(logits, label)
            else:
                total = total + _released_loss(value, logits, f.detach(), fused_logits.detach(), label)
        if number < switch_at:
            total = total + F.cross_entropy(fused_logits, label)
        for part in parts.values():
            part.zero_grad()
        total.backward()
        with torch.no_grad():
            for name in plan.trained:
                for value in parts[name].parameters():
                    if value.grad is not None:
                        value -= (FUSION_RATE if name == FUSION else RATE) * value.grad
            adapters = [parts[task_adapter(m)].middle for m in plan.modalities]
            for key in ("weight", "bias"):
                mean = torch.stack([getattr(adapter, key) for adapter in adapters]).mean(0)
                for adapter in adapters:
                    getattr(adapter, key).copy_(mean)
    for name, before in frozen.items():
        assert all(torch.equal(a, b) for a, b in zip(before, parts[name].parameters(), strict=True))
    return {name: dict(parts[name].state_dict()) for name in plan.trained}


@pytest.fixture(scope="module")
def both(server_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SplitManifest, dict, dict, dict]:
    folder = tmp_path_factory.mktemp("math")
    changes = {
        "rounds": 5,
        "switch": {"window": 2, "threshold": 1e6},
        "users": {"size": 1, "evaluate_every": 0},
        "training": {"batch_size": 8, "learning_rate": RATE, "optimizer": SGD().model_dump()},
        "fusion": {"heads": 2, "head_width": 8, "learning_rate": FUSION_RATE},
    }
    bundle, manifest = varied(server_bundle, folder / "bundle", seed=11, **changes)
    file = write_data(folder / "0.npz", seed=0, train=8, test=0)
    with loopback(folder) as house:
        run = house.publish(bundle, manifest)
        house.join([file])
        status = house.status(run)
        assert [row.fused for row in status.rounds] == [False] * 3 + [True] * 2
        start = {
            part: decode_file(str(bundle / "blobs" / manifest.initial_weights[part]), manifest.part(part).tensors)
            for part in manifest.plan.trained
        }
        split = {part: house.weights(status, manifest, part) for part in manifest.plan.trained}
    with np.load(file) as arrays:
        unsplit = _unsplit(manifest.plan, start, dict(arrays), switch_at=3)
    return manifest, start, split, unsplit


def test_rounds_over_http_equal_those_of_the_unsplit_model(both: tuple) -> None:
    _, _, split, unsplit = both
    for part, tensors in unsplit.items():
        for name, expected in tensors.items():
            assert np.abs(split[part][name] - expected.numpy()).max() < 1e-5, f"{part}/{name}"


def test_every_gradient_path_is_alive(both: tuple) -> None:
    """Each tensor of each trained part has moved further than the rounding of its steps."""
    _, start, split, _ = both
    for part, tensors in split.items():
        for name, value in tensors.items():
            if part == FUSION and name == "key.bias":
                continue  # adding the same to all keys changes no softmax
            assert np.abs(value - start[part][name]).max() > 1e-5, f"{part}/{name}"

"""The same steps in eager PyTorch, as a reference: on the CPU with one thread, or on a GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.device.case import MOMENTUM, RATE, Batch, Reporter, take_steps, tensor_of
from benchmarks.device.kernel import rss_bytes
from export.graphs.cut import cut_stage
from export.models.models import build_model
from export.objectives.objectives import ContrastiveLoss
from lamina.plans.model import Contrastive, ModelDescription
from lamina.plans.plan import Stage


def run_eager(case: dict[str, Any], reporter: Reporter) -> None:
    """Everything trained (full), all but the active segments flagged frozen (flagged), or those segments alone (cut)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if case["is_cuda"] else "cpu")
    reporter.say("memory", at="engine", bytes=rss_bytes())
    description = ModelDescription.model_validate(case["model"])
    stage = Stage.model_validate(case["stage"])
    # Micro-batches of a contrastive loss need the embeddings of all of them first.
    is_contrastive = isinstance(description.objective, Contrastive)
    loss_of_batch = ContrastiveLoss(description.objective) if is_contrastive and case["micro_batch"] else None
    # Built without memory, then filled where it is needed: so that nothing of the whole model was ever held for a part of it.
    with torch.device("meta"):
        segments = build_model(description, 0).segments()
        cut = cut_stage(segments, description, stage, until_embeddings=loss_of_batch is not None)
    module = cut.module.to_empty(device=device)
    for spec, parameter in zip(cut.weights, module.parameters(), strict=True):
        nn.init.normal_(parameter, std=0.05)
        parameter.requires_grad_(spec.name.split("/")[0] in case["active"])
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if case["optimizer"] == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=RATE)
    else:
        optimizer = torch.optim.SGD(trained, lr=RATE, momentum=MOMENTUM)
    inputs = [tensor_of(spec) for spec in case["inputs"]]
    batch = Batch(inputs, case["batch"], case["micro_batch"] or case["batch"], Path(case["scratch"]))
    batch.make(np.random.default_rng(0), case["on_disk"])
    reporter.say("memory", at="loaded", bytes=rss_bytes())

    def step() -> None:
        optimizer.zero_grad()
        if loss_of_batch is not None:
            contrastive_gradient(module, loss_of_batch, batch, device)
        else:
            for _, arrays in batch.pieces():
                loss, _ = module(*(torch.from_numpy(array).to(device) for array in arrays))
                (loss * (batch.micro_batch / batch.batch)).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    take_steps(step, case["steps"], case["window_seconds"], reporter)


def contrastive_gradient(module: nn.Module, loss_of_batch: nn.Module, batch: Batch, device: torch.device) -> None:
    """The exact gradient of a loss over the whole batch: embed, differentiate the loss alone, send that back."""

    def embed(arrays: list[np.ndarray[Any, Any]]) -> tuple[Tensor, ...]:
        return tuple(module(*(torch.from_numpy(array).to(device) for array in arrays)))

    with torch.no_grad():
        pieces = [embed(arrays) for _, arrays in batch.pieces()]
    whole = [torch.cat(parts).requires_grad_() for parts in zip(*pieces, strict=True)]
    loss, _ = loss_of_batch(*whole)
    loss.backward()
    for first, arrays in batch.pieces():
        rows = slice(first, first + batch.micro_batch)
        torch.autograd.backward(embed(arrays), [value.grad[rows] for value in whole])

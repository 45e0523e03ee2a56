"""Layers of a menu, right and wrong ones, and models made of them: to ask whether the doctor and the export agree."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from lamina.plans.model import Values

TOKENS, WIDTH = 4, 8
Call = Callable[[Any, Tensor], Any]


class Written(nn.Module):
    """A layer with one Linear, whose forward() is a function of it and the features."""

    def __init__(self, call: Call, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.call = call
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def _in_place(m: Any, x: Tensor) -> Tensor:
    x += 1
    return m.linear(x)


def _in_place_of_a_view(m: Any, x: Tensor) -> Tensor:
    x[:, 0].mul_(0.5)
    return x + m.linear(x)


def _counts(m: Any, x: Tensor) -> Tensor:
    m.steps += 1
    return m.linear(x)


def _no_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.linear(x)


def _rotated(m: Any, x: Tensor) -> Tensor:
    half = x.reshape(-1, TOKENS, WIDTH // 2, 2)
    turned = torch.view_as_real(torch.view_as_complex(half.contiguous()) * torch.polar(torch.ones(4), torch.arange(4.0)))
    return m.linear(turned.flatten(2))


def _two_names(m: Any, x: Tensor) -> Tensor:
    return m.linear(F.linear(x, m.again))


def two_names() -> nn.Module:
    layer = Written(_two_names)
    layer.again = layer.linear.weight
    return layer


def half_as_views() -> nn.Module:
    layer = Written(lambda m, x: F.linear(m.linear(x), m.again))
    layer.again = nn.Parameter(layer.linear.weight.data)
    return layer


class Batch(nn.Module):
    """Batch norm over features (batch, tokens, width), as a convolution's channels."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(TOKENS, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cells = kind(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x, x, x)[0]


def _up(x: Tensor, mode: str) -> Tensor:
    return F.interpolate(x.transpose(1, 2), scale_factor=2.0, mode=mode).transpose(1, 2)


MENU: dict[str, Callable[[], nn.Module]] = {
    # right, or made right
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "residual": lambda: Written(lambda m, x: x + torch.tanh(m.linear(x))),
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)),
    "attention": Attention,
    "dropout": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)),
    "in place": lambda: Written(_in_place),
    "in place of a view": lambda: Written(_in_place_of_a_view),
    "relu in place": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)),
    "mask": lambda: Written(lambda m, x: x + m.mask @ m.linear(x), mask=torch.tril(torch.ones(TOKENS, TOKENS) / TOKENS)),
    "where": lambda: Written(lambda m, x: torch.where(m.keep, m.linear(x), x), keep=torch.ones(TOKENS, WIDTH).tril().bool()),
    "positions": lambda: Written(lambda m, x: m.linear(x[:, m.order]), order=torch.arange(TOKENS).flip(0)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "batch norm": Batch,
    "two names": two_names,
    "fewer tokens": lambda: Written(lambda m, x: m.linear(x[:, : max(1, x.shape[1] // 2)])),
    "more tokens": lambda: Written(lambda m, x: m.linear(x.repeat_interleave(2, 1))),
    "double inside": lambda: Written(lambda m, x: m.linear(x.double().mul(2).float())),
    "detached input": lambda: Written(lambda m, x: m.linear(x.detach())),
    "nothing to train": lambda: nn.ReLU(),
    # right on some engines
    "cumulated": lambda: Written(lambda m, x: m.linear(x).cumsum(1)),
    "sorted": lambda: Written(lambda m, x: m.linear(x).sort(-1).values),
    "fourier": lambda: Written(lambda m, x: torch.fft.fft(m.linear(x)).real),
    "singular values": lambda: Written(lambda m, x: x + torch.linalg.svdvals(m.linear(x)).sum(-1, keepdim=True)[..., None]),
    "rotated": lambda: Written(_rotated),
    "bilinear": lambda: Written(lambda m, x: m.linear(_up(x, "linear"))),
    "nearest": lambda: Written(lambda m, x: m.linear(_up(x, "nearest"))),
    # wrong
    "wider": lambda: nn.Linear(WIDTH, WIDTH + 1),
    "tuple": lambda: Written(lambda m, x: (m.linear(x), x)),
    "integers": lambda: Written(lambda m, x: m.linear(x).argmax(-1, keepdim=True)),
    "complex": lambda: Written(lambda m, x: torch.fft.fft(m.linear(x))),
    "sparse": lambda: Written(lambda m, x: m.linear(x).to_sparse()),
    "half": lambda: nn.Linear(WIDTH, WIDTH).half(),
    "raises": lambda: Written(lambda m, x: m.nothing),
    "branch": lambda: Written(lambda m, x: m.linear(x) if x.sum() > 0 else x),
    "item": lambda: Written(lambda m, x: m.linear(x) * x.max().item()),
    "nonzero": lambda: Written(lambda m, x: m.linear(x) + x[x > 0].mean()),
    "numpy": lambda: Written(lambda m, x: m.linear(torch.from_numpy(x.detach().numpy()))),
    "noise": lambda: Written(lambda m, x: m.linear(x) + torch.rand_like(x)),
    "noise of numpy": lambda: Written(lambda m, x: m.linear(x) + float(np.random.rand())),
    "dropout that stays": lambda: Written(lambda m, x: F.dropout(m.linear(x), 0.5, training=True)),
    "fixed batch": lambda: Written(lambda m, x: m.linear(x.reshape(2, -1, WIDTH))),
    "across the batch": lambda: Written(lambda m, x: m.linear(x - x.mean(0))),
    "loop over the batch": lambda: Written(lambda m, x: torch.stack([m.linear(sample) for sample in x])),
    "no gradient": lambda: Written(_no_gradient),
    "unused": lambda: Written(lambda m, x: m.linear(x), spare=nn.Linear(2, 2)),
    "counts": lambda: Written(_counts, steps=torch.zeros(())),
    "nan": lambda: Written(lambda m, x: m.linear(x).sqrt()),
    "infinite gradient": lambda: Written(lambda m, x: (m.linear(x) * 0).square().sqrt() + m.linear(x)),
    "gru": lambda: Recurrent(nn.GRU),
    "lstm": lambda: Recurrent(nn.LSTM),
    "rnn": lambda: Recurrent(nn.RNN),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "older spectral norm": lambda: spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "older weight norm": lambda: weight_norm(nn.Linear(WIDTH, WIDTH)),
    "batch statistics": lambda: Batch(track_running_stats=False),
    "constant that is no buffer": lambda: Written(lambda m, x: m.linear(x) + torch.arange(32.0).reshape(TOKENS, WIDTH) + TABLE),
    "views": half_as_views,
    "huge buffer": lambda: Written(lambda m, x: m.linear(x) + m.table.mean(), table=torch.ones(600, 600)),
    "complex buffer": lambda: Written(lambda m, x: m.linear(x) * m.turn.real, turn=torch.ones(WIDTH, dtype=torch.complex64)),
    "double buffer": lambda: Written(lambda m, x: m.linear(x) * m.scale, scale=torch.ones(WIDTH, dtype=torch.float64)),
}
TABLE = torch.ones(TOKENS, WIDTH)

STEMS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, WIDTH),
    "sigmoid": lambda: nn.Sequential(nn.Linear(3, WIDTH), nn.Sigmoid()),  # its backward pass needs what it gave
    "nothing to train": lambda: Padded(),
}


class Padded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, WIDTH - x.shape[-1]))


class Model(nn.Module):
    def __init__(self, stem: nn.Module, layers: list[nn.Module]) -> None:
        super().__init__()
        self.input = Values(shape=(TOKENS, 3))
        self.stem = stem
        self.layers = nn.ModuleList(layers)


def make(stem: str, layers: list[str], is_shared: bool = False) -> nn.Module:
    """A factory: layers by their names; `is_shared` makes equal names one layer."""
    made = {name: MENU[name]() for name in layers}
    return Model(STEMS[stem](), [made[name] if is_shared else MENU[name]() for name in layers])

"""transformers audio encoders: AST (spectrogram), Whisper's encoder (mel spectrogram), Wav2Vec2 (waveform)."""

from typing import Any

import torch
from torch import Tensor, nn

from export.models.adapters.common import MeanOf, Unmasked, check_pool, check_trunk, left_out, working_copy
from export.trunk import FirstToken, MeanTokens, Trunk
from lamina.errors import ConfigError, CutError
from lamina.plans.model import Values

_SECOND = 16_000  # samples: the rate that all published Wav2Vec2 models take


def adapt_ast(module: nn.Module, *, pool: str = "first") -> Trunk:
    """Input: (frames, mel bins). `pool`: "first" (default) is the mean of the class and the distillation token, as AST has
    it; "mean" is over the patches."""
    name = f"transformers {type(module).__name__}"
    check_pool(pool, name)
    whole = working_copy(module)
    copy = whole.base_model
    shape = (copy.config.max_length, copy.config.num_mel_bins)
    example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    tokens = MeanOf(0, 2) if pool == "first" else MeanOf(2)
    with torch.no_grad():
        expected = tokens(copy(example).last_hidden_state)
    trunk = Trunk(
        stem=copy.embeddings,
        layers=tuple(copy.layers),
        norm=copy.layernorm,
        pool=tokens,
        input=Values(shape=shape),
        notes=left_out(whole, copy),
    )
    return check_trunk(trunk, example, expected, name)


def adapt_whisper(module: nn.Module, *, pool: str = "mean") -> Trunk:
    """Input: (mel bins, frames), as the library's feature extractor gives it. `pool`: "mean" (default) over time."""
    name = f"transformers {type(module).__name__}"
    check_pool(pool, name)
    whole = working_copy(module)
    copy = _whisper_encoder(whole)
    if copy is None:
        raise CutError(f"{name} has no encoder; give the WhisperModel, or its encoder")
    frames = copy.config.max_source_positions * copy.conv1.stride[0] * copy.conv2.stride[0]
    shape = (copy.config.num_mel_bins, frames)
    example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    tokens = FirstToken() if pool == "first" else MeanTokens()
    with torch.no_grad():
        expected = tokens(copy(example).last_hidden_state)
    dropped = () if whole is copy else ("Left out: all but Whisper's encoder.",)
    trunk = Trunk(
        stem=WhisperStem(copy),
        layers=tuple(Unmasked(layer) for layer in copy.layers),
        norm=copy.layer_norm,
        pool=tokens,
        input=Values(shape=shape),
        notes=(*dropped, "Whisper's fixed sinusoidal positions are a parameter of the stem, trained where the stem is."),
    )
    return check_trunk(trunk, example, expected, name)


def _whisper_encoder(whole: Any) -> Any:
    for owner in (whole, getattr(whole, "model", None)):
        if hasattr(owner, "conv1"):
            return owner
        if hasattr(getattr(owner, "encoder", None), "conv1"):
            return owner.encoder
    return None


class WhisperStem(nn.Module):
    """(batch, mel bins, frames) -> (batch, positions, width): two convolutions, and the positions."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = encoder.conv1, encoder.conv2
        self.embed_positions = encoder.embed_positions

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.conv2(nn.functional.gelu(self.conv1(x))))
        return x.transpose(1, 2) + self.embed_positions.weight


def adapt_wav2vec2(module: nn.Module, *, pool: str = "mean", samples: int = _SECOND) -> Trunk:
    """Input: a waveform (samples,), by default one second at 16 kHz, normalised as the library's feature extractor does.

    `pool`: "mean" (default) over time. Shorter sounds are padded with zeros and read to the end, without a mask.
    """
    name = f"transformers {type(module).__name__}"
    check_pool(pool, name)
    whole = working_copy(module)
    copy = whole.base_model
    config = copy.config
    if copy.adapter is not None:
        raise CutError(f"{name} has add_adapter=True: convolutions after the last layer have no place in a trunk")
    least = _receptive_samples(config)
    if samples < least:
        raise ConfigError(f"{name}: samples={samples} are too few for its convolutions, which read {least} for one frame")
    example = torch.randn(1, samples, generator=torch.Generator().manual_seed(0))
    tokens = FirstToken() if pool == "first" else MeanTokens()
    with torch.no_grad():
        expected = tokens(copy(example).last_hidden_state)
    notes = left_out(whole, copy)
    if hasattr(copy, "masked_spec_embed"):
        notes += ("Left out: masked_spec_embed, which replaces frames in the library's own training.",)
    is_pre_norm = config.do_stable_layer_norm
    trunk = Trunk(
        stem=WaveformStem(copy, norm=nn.Identity() if is_pre_norm else copy.encoder.layer_norm),
        layers=tuple(copy.encoder.layers),
        norm=copy.encoder.layer_norm if is_pre_norm else nn.Identity(),
        pool=tokens,
        input=Values(shape=(samples,)),
        notes=notes,
    )
    return check_trunk(trunk, example, expected, name)


class WaveformStem(nn.Module):
    """(batch, samples) -> (batch, frames, width): convolutions, projection, convolutional positions, perhaps a norm."""

    def __init__(self, model: Any, norm: nn.Module) -> None:
        super().__init__()
        self.conv_layers = model.feature_extractor.conv_layers
        self.feature_projection = model.feature_projection
        self.pos_conv_embed = PositionalConvolution(model.encoder.pos_conv_embed)
        self.layer_norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        for convolution in self.conv_layers:
            x = convolution(x)
        x, _ = self.feature_projection(x.transpose(1, 2))
        return self.layer_norm(x + self.pos_conv_embed(x))


class PositionalConvolution(nn.Module):
    """(batch, frames, width) -> the same: the library's, with its weight norm written out in operations that export."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.conv, self.activation = embedding.conv, embedding.activation
        self.surplus = embedding.padding.num_pad_remove
        parametrizations = getattr(self.conv, "parametrizations", None)
        if parametrizations is None or "weight" not in parametrizations:
            raise CutError(
                "Wav2Vec2's positional convolution has no weight norm of torch.nn.utils.parametrizations; load it with "
                "transformers 4.38 or later"
            )

    def forward(self, x: Tensor) -> Tensor:
        length, direction = self.conv.parametrizations.weight.original0, self.conv.parametrizations.weight.original1
        weight = direction * (length * torch.rsqrt((direction * direction).sum(dim=(0, 1), keepdim=True)))
        x = nn.functional.conv1d(x.transpose(1, 2), weight, self.conv.bias, padding=self.conv.padding, groups=self.conv.groups)
        return self.activation(x[:, :, : x.shape[2] - self.surplus]).transpose(1, 2)


def _receptive_samples(config: Any) -> int:
    """How many samples one frame depends on."""
    samples = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples

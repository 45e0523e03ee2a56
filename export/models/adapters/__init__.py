"""Adapters: a model of a common library, or of the user's own, becomes a `Trunk`.

`adapt` knows a library's model by the names of its classes, so this package imports none of the libraries. The layers stay
the library's own modules with the library's parameter names; only what stands between them is written anew, because a
segment takes one tensor and gives one. Each adapter runs the library's model once beside its trunk, and refuses a
difference: a subclass or another version of the library may compute something else.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from export.models.adapters.cnn import NETWORKS, adapt_cnn
from export.models.adapters.common import release_shared, segments_of
from export.models.adapters.gated import Gated
from export.models.adapters.hf_audio import adapt_ast, adapt_wav2vec2, adapt_whisper
from export.models.adapters.hf_bert import adapt_bert, adapt_distilbert
from export.models.adapters.hf_clip import adapt_clip
from export.models.adapters.hf_vit import adapt_vit
from export.models.adapters.own import EXAMPLE, adapt_own, has_protocol
from export.models.adapters.timm_vit import adapt_timm_vit
from export.trunk import Trunk
from lamina.errors import ConfigError, CutError

Adapter = Callable[..., Trunk]

_ADAPTERS: tuple[tuple[str, str, Adapter], ...] = (
    ("timm.models.vision_transformer", "VisionTransformer", adapt_timm_vit),
    ("transformers.models.vit.", "ViTPreTrainedModel", adapt_vit),
    ("transformers.models.deit.", "DeiTPreTrainedModel", adapt_vit),
    ("transformers.models.bert.", "BertPreTrainedModel", adapt_bert),
    ("transformers.models.distilbert.", "DistilBertPreTrainedModel", adapt_distilbert),
    ("transformers.models.clip.", "CLIPPreTrainedModel", adapt_clip),
    ("transformers.models.audio_spectrogram_transformer.", "ASTPreTrainedModel", adapt_ast),
    ("transformers.models.whisper.", "WhisperPreTrainedModel", adapt_whisper),
    ("transformers.models.wav2vec2.", "Wav2Vec2PreTrainedModel", adapt_wav2vec2),
    *((start, name, adapt_cnn) for start, name in NETWORKS),
)
"""(start of the module's name, class, adapter): the class itself or one that the model inherits from."""

SUPPORTED = (
    "timm VisionTransformer (ViT, DeiT and distilled DeiT), ResNet, EfficientNet and MobileNetV3; torchvision ResNet",
    "transformers ViT, DeiT, BERT (MiniLM), DistilBERT, CLIP (part='vision' or 'text'), AST, the Whisper encoder, Wav2Vec2",
)

_REASONS: tuple[tuple[str, str, str], ...] = (
    ("timm.", "Swin", "its stages merge patches between layers and add relative position tables that are indexed by buffers"),
    ("transformers.", "Swin", "its stages merge patches between layers and add relative position tables"),
    ("timm.", "VisionTransformerRelPos", "its relative position bias is indexed by a buffer"),
    ("timm.", "Beit", "its relative position bias is indexed by a buffer"),
    ("transformers.", "Beit", "its relative position bias is indexed by a buffer"),
    ("transformers.", "Albert", "all its layers are one layer with one set of weights, so it cannot be trained layer by layer"),
    ("transformers.", "Deberta", "its relative position embeddings are one parameter that all layers share"),
    ("transformers.", "T5", "its relative position bias belongs to the first layer and all layers use it"),
)
"""(start of the module's name, start of a class name, why it does not fit)"""


def adapt(module: object, *, gated: bool = False, copy_shared: bool = False, **options: Any) -> Trunk:
    """The trunk of a model, in evaluation mode; the model itself stays as it is.

    A `Trunk` is given back as it is. A module with the attributes of `export.trunk` becomes one. The models of `SUPPORTED`
    are known. Options, where they apply:

        pool      "first" or "mean": what becomes of the tokens; each adapter says its default
        tokens    length of a text input in tokens; default 128, or the model's greatest if that is less
        samples   length of a waveform
        size      side of a square image, for a convolutional network
        part      "vision" or "text": the tower of a CLIPModel

    Of any model, `gated` lets all layers but the first begin as the identity (`export.models.adapters.gated`), and
    `copy_shared` makes copies of what segments share, which are trained apart; without it, an export refuses such a model.

    Raises CutError for a model that does not fit, with the reason, and ConfigError for an option that it does not take.
    """
    for name, value in (("gated", gated), ("copy_shared", copy_shared)):
        if not isinstance(value, bool):
            raise ConfigError(f"option {name!r} is true or false, given {value!r}")
    if isinstance(module, Trunk):
        _check_options("a Trunk", lambda module: None, options)
        trunk = _with_gates(module) if gated else module
        return release_shared(trunk) if copy_shared else trunk
    if not isinstance(module, nn.Module):
        raise CutError(
            f"a {type(module).__name__} is no model: the factory must return a torch.nn.Module or an export.trunk.Trunk"
        )
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    adapter = _find(module)
    if adapter is None:
        raise CutError(_unknown(module, name))
    _check_options(name, adapter, options)
    trunk = adapter(module, **options)
    if not trunk.layers:
        raise CutError(f"{name} has no layers: a strategy needs at least one to train")
    trunk = _with_gates(trunk) if gated else trunk
    trunk = release_shared(trunk) if copy_shared else trunk
    for part in (*segments_of(trunk), trunk.pool, *([trunk.projection] if trunk.projection else [])):
        part.eval()  # wrappers are new, and a new module is in training mode
    return trunk


def _with_gates(trunk: Trunk) -> Trunk:
    return replace(trunk, layers=(*trunk.layers[:1], *(Gated(layer) for layer in trunk.layers[1:])))


def _find(module: nn.Module) -> Adapter | None:
    # The user's attributes come first: who gives a library's model a protocol of its own means that one.
    if has_protocol(module):
        return adapt_own
    for cls in type(module).__mro__:
        for start, name, adapter in _ADAPTERS:
            if cls.__name__ == name and cls.__module__.startswith(start):
                return adapter
    return None


def _unknown(module: nn.Module, name: str) -> str:
    reason = next(
        (
            f": {why}"
            for cls in type(module).__mro__
            for start, prefix, why in _REASONS
            if cls.__module__.startswith(start) and cls.__name__.startswith(prefix)
        ),
        "",
    )
    return (
        f"there is no adapter for {name}{reason}. Known are {'; '.join(SUPPORTED)}. Any other module is taken if it has the "
        f"attributes `stem`, `layers` and `input`, for example\n\n{EXAMPLE}\nsee docs/export.md"
    )


def _check_options(name: str, adapter: Adapter, options: dict[str, Any]) -> None:
    known = list(_names_of_options(adapter))
    for option in options:
        if option not in known:
            raise ConfigError(f"{name} has no option {option!r}; it takes {', '.join((*known, 'gated', 'copy_shared'))}")


def _names_of_options(adapter: Adapter) -> Iterator[str]:
    return (key for key, value in inspect.signature(adapter).parameters.items() if value.kind is value.KEYWORD_ONLY)

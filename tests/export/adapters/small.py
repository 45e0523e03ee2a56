"""Small models of the real library classes, with random weights, and what each library itself makes of an input."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.export.adapters.timm_beside_cpu_torch import import_timm, import_transformers

WIDTH, HEADS, LAYERS, VOCABULARY, PAD, TOKENS = 16, 2, 2, 40, 3, 9
SIZES = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "intermediate_size": 32}
IMAGE = {"image_size": 16, "patch_size": 8}
CLIP_END = 30


@dataclass(frozen=True)
class Case:
    """`expected(model, x)` is (batch, width) by the library's own forward pass; `draw()` makes raw inputs."""

    build: Callable[[], nn.Module]
    draw: Callable[[], Tensor]
    expected: Callable[[Any, Tensor], Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def timm_vit(**options: Any) -> nn.Module:
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"embed_dim": WIDTH, "num_heads": HEADS, "depth": LAYERS, "img_size": 16, "patch_size": 8, "num_classes": 5}
    return noisy(VisionTransformer(**(sizes | options)))


def timm_distilled() -> nn.Module:
    import_timm()
    from timm.models.deit import VisionTransformerDistilled

    return noisy(
        VisionTransformerDistilled(embed_dim=WIDTH, num_heads=HEADS, depth=LAYERS, img_size=16, patch_size=8, num_classes=5)
    )


def transformers(class_name: str, config_name: str, *, config: dict[str, Any]) -> nn.Module:
    library = import_transformers()
    return noisy(getattr(library, class_name)(getattr(library, config_name)(**config)))


def vit(class_name: str = "ViTModel", **config: Any) -> nn.Module:
    kind = "DeiT" if class_name.startswith("DeiT") else "ViT"
    return transformers(class_name, f"{kind}Config", config=SIZES | IMAGE | config)


def bert(class_name: str = "BertModel", **config: Any) -> nn.Module:
    own = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "max_position_embeddings": 12}
    return transformers(class_name, "BertConfig", config=SIZES | own | config)


def distilbert(class_name: str = "DistilBertModel", **config: Any) -> nn.Module:
    own = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "max_position_embeddings": 12}
    sizes = {"dim": WIDTH, "hidden_dim": 32, "n_heads": HEADS, "n_layers": LAYERS}
    return transformers(class_name, "DistilBertConfig", config=sizes | own | config)


TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 12, "eos_token_id": CLIP_END, "pad_token_id": 1}


def clip(**text: Any) -> nn.Module:
    sizes = SIZES | {"projection_dim": 6}
    config = {"text_config": sizes | TEXT | text, "vision_config": sizes | IMAGE, "projection_dim": 6}
    return transformers("CLIPModel", "CLIPConfig", config=config)


def clip_tower(class_name: str) -> nn.Module:
    kind = "Text" if "Text" in class_name else "Vision"
    own = TEXT if kind == "Text" else IMAGE
    return transformers(class_name, f"CLIP{kind}Config", config=SIZES | {"projection_dim": 6} | own)


def ast(class_name: str = "ASTModel") -> nn.Module:
    own = {"patch_size": 4, "frequency_stride": 3, "time_stride": 3, "max_length": 14, "num_mel_bins": 8}
    return transformers(class_name, "ASTConfig", config=SIZES | own)


def whisper(class_name: str = "WhisperModel") -> nn.Module:
    config = {
        "d_model": WIDTH,
        "encoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "encoder_ffn_dim": 32,
        "decoder_layers": 1,
        "decoder_attention_heads": HEADS,
        "decoder_ffn_dim": 32,
        "num_mel_bins": 8,
        "max_source_positions": 7,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    return transformers(class_name, "WhisperConfig", config=config)


def wav2vec2(class_name: str = "Wav2Vec2Model", **config: Any) -> nn.Module:
    own = {
        "conv_dim": (8, 8),
        "conv_kernel": (10, 3),
        "conv_stride": (5, 2),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "vocab_size": VOCABULARY,
    }
    return transformers(class_name, "Wav2Vec2Config", config=SIZES | own | config)


def noisy(model: nn.Module) -> nn.Module:
    """Random values in every parameter: zeros and ones of a fresh model would hide what is left out."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.3 * torch.randn(value.shape, generator=generator)
    return model


def images() -> Tensor:
    return torch.randn(3, 3, 16, 16)


def texts() -> Tensor:
    """The second is padded with PAD, the third is all but one token of it."""
    ids = torch.randint(PAD + 1, VOCABULARY, (3, TOKENS))
    ids[1, 5:], ids[2, 1:] = PAD, PAD
    return ids


def clip_texts() -> Tensor:
    """They end at different places; the third has no end, the second is padded with ends."""
    ids = torch.randint(4, CLIP_END, (3, TOKENS))
    ids[0, 6], ids[1, 4:] = CLIP_END, CLIP_END
    return ids


def hidden(model: Any, x: Tensor) -> Tensor:
    return model.base_model(x).last_hidden_state


def text_hidden(model: Any, ids: Tensor) -> Tensor:
    return model.base_model(ids, attention_mask=(ids != PAD).long()).last_hidden_state


def mean_of_real(model: Any, ids: Tensor) -> Tensor:
    return torch.stack([row[real].mean(0) for row, real in zip(text_hidden(model, ids), ids != PAD, strict=True)])


def pre_logits(model: Any, x: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(x), pre_logits=True)


CASES: dict[str, Case] = {
    "timm vit": Case(timm_vit, images, pre_logits),
    "timm vit, mean": Case(lambda: timm_vit(global_pool="avg", reg_tokens=2, init_values=0.1), images, pre_logits),
    "timm vit, positions on patches only": Case(lambda: timm_vit(no_embed_class=True, qk_norm=True), images, pre_logits),
    "timm vit, norms before and after": Case(lambda: timm_vit(fc_norm=True, pre_norm=True), images, pre_logits),
    "timm vit, no class token": Case(lambda: timm_vit(class_token=False, global_pool="avg", fc_norm=False), images, pre_logits),
    "timm vit, dynamic size": Case(lambda: timm_vit(dynamic_img_size=True), images, pre_logits),
    "timm distilled": Case(timm_distilled, images, pre_logits),
    "vit": Case(vit, images, lambda m, x: hidden(m, x)[:, 0]),
    "vit, mean": Case(vit, images, lambda m, x: hidden(m, x)[:, 1:].mean(1), {"pool": "mean"}),
    "vit classifier": Case(lambda: vit("ViTForImageClassification"), images, lambda m, x: hidden(m, x)[:, 0]),
    "vit masked": Case(lambda: vit("ViTForMaskedImageModeling", encoder_stride=8), images, lambda m, x: hidden(m, x)[:, 0]),
    "deit": Case(lambda: vit("DeiTModel"), images, lambda m, x: hidden(m, x)[:, 0]),
    "deit, mean": Case(
        lambda: vit("DeiTForImageClassification"), images, lambda m, x: hidden(m, x)[:, 2:].mean(1), {"pool": "mean"}
    ),
    "bert": Case(bert, texts, mean_of_real, {"tokens": TOKENS}),
    "bert, first": Case(bert, texts, lambda m, x: text_hidden(m, x)[:, 0], {"tokens": TOKENS, "pool": "first"}),
    "bert classifier": Case(lambda: bert("BertForSequenceClassification"), texts, mean_of_real, {"tokens": TOKENS}),
    "distilbert": Case(distilbert, texts, mean_of_real, {"tokens": TOKENS}),
    "distilbert, first": Case(distilbert, texts, lambda m, x: text_hidden(m, x)[:, 0], {"tokens": TOKENS, "pool": "first"}),
    "clip vision": Case(clip, images, lambda m, x: m.vision_model(x).pooler_output, {"part": "vision"}),
    "clip text": Case(clip, clip_texts, lambda m, x: m.text_model(x).pooler_output, {"part": "text", "tokens": TOKENS}),
    "clip text, old end": Case(
        lambda: clip(eos_token_id=2), clip_texts, lambda m, x: m.text_model(x).pooler_output, {"part": "text", "tokens": TOKENS}
    ),
    "clip vision alone": Case(lambda: clip_tower("CLIPVisionModel"), images, lambda m, x: m(x).pooler_output),
    "clip text alone": Case(
        lambda: clip_tower("CLIPTextModelWithProjection"),
        clip_texts,
        lambda m, x: m.text_model(x).pooler_output,
        {"tokens": TOKENS},
    ),
    "ast": Case(ast, lambda: torch.randn(3, 14, 8), lambda m, x: m(x).pooler_output),
    "ast, mean": Case(
        lambda: ast("ASTForAudioClassification"),
        lambda: torch.randn(3, 14, 8),
        lambda m, x: hidden(m, x)[:, 2:].mean(1),
        {"pool": "mean"},
    ),
    "whisper": Case(whisper, lambda: torch.randn(3, 8, 14), lambda m, x: m.encoder(x).last_hidden_state.mean(1)),
    "whisper generator": Case(
        lambda: whisper("WhisperForConditionalGeneration"),
        lambda: torch.randn(3, 8, 14),
        lambda m, x: m.model.encoder(x).last_hidden_state.mean(1),
    ),
    "wav2vec2": Case(wav2vec2, lambda: torch.randn(3, 100), lambda m, x: hidden(m, x).mean(1), {"samples": 100}),
    "wav2vec2, norm first": Case(
        lambda: wav2vec2("Wav2Vec2ForCTC", do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True),
        lambda: torch.randn(3, 100),
        lambda m, x: hidden(m, x).mean(1),
        {"samples": 100},
    ),
}

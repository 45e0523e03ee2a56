"""Small models of the libraries' own classes, one factory for each adapter, and three modules as a user might write them.

They have random weights and few layers, so that every program of each can be lowered in minutes. Their layers are the
libraries' code, which is what an engine has to compute; a published model has more of the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cpu_torchvision import make_torchvision_importable
from export.models.adapters import adapt
from export.models.adapters.cnn import MeanPixels
from export.trunk import Trunk
from lamina.plans.model import Image, TextTokens

WIDTH, HEADS, INNER, LAYERS = 48, 3, 96, 2
SIDE, PATCH = 32, 8  # pixels
VOCABULARY, TOKENS, PAD = 60, 16, 3
MELS, FRAMES, SAMPLES = 16, 32, 800

_SIZES = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "intermediate_size": INNER}
_IMAGE = {"image_size": SIDE, "patch_size": PATCH}
_TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": TOKENS, "pad_token_id": PAD}


def timm_vit() -> nn.Module:
    """timm VisionTransformer"""
    make_torchvision_importable()
    from timm.models.vision_transformer import VisionTransformer

    return _disturbed(VisionTransformer(**_timm_sizes()))


def timm_deit_distilled() -> nn.Module:
    """timm VisionTransformerDistilled (DeiT)"""
    make_torchvision_importable()
    from timm.models.deit import VisionTransformerDistilled

    return _disturbed(VisionTransformerDistilled(**_timm_sizes()))


def timm_resnet() -> Trunk:
    """timm ResNet, four BasicBlocks"""
    make_torchvision_importable()
    from timm.models.resnet import BasicBlock, ResNet

    return _convolutional(ResNet(BasicBlock, [1, 1, 1, 1], channels=(8, 16, 24, 32), stem_width=8, num_classes=3))


def timm_mobilenetv3() -> Trunk:
    """timm MobileNetV3, three blocks"""
    make_torchvision_importable()
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.mobilenetv3 import MobileNetV3

    blocks = [["ds_r1_k3_s2_e1_c16_se0.25_nre"], ["ir_r1_k3_s2_e4_c24_nre"], ["ir_r1_k5_s1_e3_c24_se0.25"]]
    return _convolutional(MobileNetV3(decode_arch_def(blocks), stem_size=16, num_classes=3, act_layer=nn.Hardswish))


def timm_efficientnet() -> Trunk:
    """timm EfficientNet, two blocks"""
    make_torchvision_importable()
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    blocks = [["ds_r1_k3_s1_e1_c16_se0.25"], ["ir_r1_k5_s2_e4_c24_se0.25"]]
    return _convolutional(
        EfficientNet(decode_arch_def(blocks), stem_size=16, num_features=48, num_classes=3, act_layer=nn.SiLU)
    )


def torchvision_resnet() -> Trunk:
    """torchvision ResNet, four BasicBlocks"""
    make_torchvision_importable()
    from torchvision.models.resnet import BasicBlock, ResNet

    return _convolutional(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3))


def vit() -> nn.Module:
    """transformers ViTModel"""
    return _transformers("ViTModel", "ViTConfig", **_SIZES, **_IMAGE)


def deit() -> nn.Module:
    """transformers DeiTModel"""
    return _transformers("DeiTModel", "DeiTConfig", **_SIZES, **_IMAGE)


def bert() -> nn.Module:
    """transformers BertModel (MiniLM)"""
    return _transformers("BertModel", "BertConfig", **_SIZES, **_TEXT)


def distilbert() -> nn.Module:
    """transformers DistilBertModel"""
    sizes = {"dim": WIDTH, "hidden_dim": INNER, "n_heads": HEADS, "n_layers": LAYERS}
    return _transformers("DistilBertModel", "DistilBertConfig", **sizes, **_TEXT)


def clip_vision() -> nn.Module:
    """transformers CLIPVisionModel"""
    return _transformers("CLIPVisionModel", "CLIPVisionConfig", **_SIZES, **_IMAGE)


def clip_text() -> nn.Module:
    """transformers CLIPTextModel"""
    return _transformers(
        "CLIPTextModel", "CLIPTextConfig", **_SIZES, **(_TEXT | {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 50})
    )


def ast() -> nn.Module:
    """transformers ASTModel"""
    own = {"patch_size": 8, "frequency_stride": 6, "time_stride": 6, "max_length": FRAMES, "num_mel_bins": MELS}
    return _transformers("ASTModel", "ASTConfig", **_SIZES, **own)


def whisper() -> nn.Module:
    """transformers WhisperModel, its encoder"""
    encoder = {"encoder_layers": LAYERS, "encoder_attention_heads": HEADS, "encoder_ffn_dim": INNER}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": HEADS, "decoder_ffn_dim": INNER, "vocab_size": VOCABULARY}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    own = {"d_model": WIDTH, "num_mel_bins": MELS, "max_source_positions": FRAMES // 2}
    return _transformers("WhisperModel", "WhisperConfig", **encoder, **decoder, **ids, **own)


def wav2vec2() -> Trunk:
    """transformers Wav2Vec2Model"""
    convolutions = {"conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "num_feat_extract_layers": 3}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = _transformers("Wav2Vec2Model", "Wav2Vec2Config", **_SIZES, **convolutions, **positions, vocab_size=VOCABULARY)
    return adapt(model, samples=SAMPLES)


class FusedAttention(nn.Module):
    """A transformer layer that calls torch's fused attention. (batch, tokens, width) -> the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(x)


class CausalText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input = TextTokens(vocabulary=VOCABULARY, length=TOKENS)
        self.stem = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(FusedAttention(WIDTH, HEADS) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)


class Residual(nn.Module):
    """Two 3x3 convolutions with group norms around a shortcut, at half the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, 2, 1, bias=False), nn.GroupNorm(4, channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.GroupNorm(4, channels)
        self.shortcut = nn.Conv2d(channels, channels, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class GroupNormNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input = Image(channels=3, height=SIDE, width=SIDE)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.GroupNorm(4, 16), nn.ReLU())
        self.layers = nn.ModuleList(Residual(16) for _ in range(LAYERS))
        self.pool = MeanPixels(16)


def own_fused_attention() -> nn.Module:
    """own module, scaled_dot_product_attention"""
    return _disturbed(CausalText())


def own_group_norm() -> nn.Module:
    """own module, residual network with GroupNorm"""
    return _disturbed(GroupNormNetwork())


def own_pair() -> dict[str, nn.Module]:
    """own modules, image and text, contrastive with micro-batches"""
    return {"image": own_group_norm(), "text": own_fused_attention()}


FACTORIES: Sequence[Callable[[], Any]] = (
    timm_vit,
    timm_deit_distilled,
    vit,
    deit,
    bert,
    distilbert,
    clip_vision,
    clip_text,
    ast,
    whisper,
    wav2vec2,
    own_fused_attention,
    own_group_norm,
    own_pair,
    timm_resnet,
    timm_mobilenetv3,
    timm_efficientnet,
    torchvision_resnet,
)
CONTRASTIVE = ("own_pair",)


def _timm_sizes() -> dict[str, int]:
    return {"embed_dim": WIDTH, "num_heads": HEADS, "depth": LAYERS, "img_size": SIDE, "patch_size": PATCH, "num_classes": 3}


def _transformers(class_name: str, config_name: str, **config: Any) -> nn.Module:
    make_torchvision_importable()
    import transformers

    return _disturbed(getattr(transformers, class_name)(getattr(transformers, config_name)(**config)))


def _convolutional(model: nn.Module) -> Trunk:
    """The trunk of a network whose batch norms have measured something: fresh ones would fold to nothing."""
    _disturbed(model).train()
    with torch.no_grad():
        for _ in range(8):
            model(torch.randn(8, 3, SIDE, SIDE) + 0.5)
    return adapt(model.eval(), size=SIDE)


def _disturbed(model: nn.Module) -> nn.Module:
    """Noise on every parameter: the zeros and ones of a fresh model would hide what is left out."""
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * torch.randn_like(value)
    return model

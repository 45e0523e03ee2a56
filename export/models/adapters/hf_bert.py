"""transformers BERT (MiniLM is one) and DistilBERT, alone or under a head. Padding is marked in an extra column."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from export.models.adapters.columns import (
    FirstOfColumns,
    MaskedLayer,
    MeanOfMarked,
    example_texts,
    text_length,
    with_column,
)
from export.models.adapters.common import check_pool, check_trunk, left_out, working_copy
from export.trunk import Trunk
from lamina.errors import CutError
from lamina.plans.model import TextTokens


def adapt_bert(module: nn.Module, *, pool: str = "mean", tokens: int | None = None) -> Trunk:
    """`pool`: "mean" (default) over the tokens that are not padding, as sentence embeddings are made; or "first".

    BERT's pooler (a dense layer on the first token) is left out.
    """
    name = f"transformers {type(module).__name__}"
    config = module.config  # type: ignore[union-attr]
    for flag in ("is_decoder", "add_cross_attention"):
        if getattr(config, flag, False):
            raise CutError(f"{name} has {flag}=True; a trunk is an encoder: build it from a config with {flag}=False")
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        raise CutError(f"{name} has position_embedding_type={positions!r}; only 'absolute' can be cut into layers")
    whole = working_copy(module)
    copy = whole.base_model
    return _trunk(whole, copy, copy.encoder.layer, ("pooler",), pool, tokens, name)


def adapt_distilbert(module: nn.Module, *, pool: str = "mean", tokens: int | None = None) -> Trunk:
    """`pool`: "mean" (default) over the tokens that are not padding, or "first"."""
    whole = working_copy(module)
    copy = whole.base_model
    return _trunk(whole, copy, copy.transformer.layer, (), pool, tokens, f"transformers {type(module).__name__}")


def _trunk(
    whole: Any, copy: Any, layers: Iterable[nn.Module], parts: tuple[str, ...], pool: str, tokens: int | None, name: str
) -> Trunk:
    check_pool(pool, name)
    config, embeddings = copy.config, copy.embeddings
    length = text_length(tokens, embeddings.position_embeddings.num_embeddings, name)
    pad = config.pad_token_id
    pooled: nn.Module = MeanOfMarked() if pool == "mean" else FirstOfColumns()
    example = example_texts(length, config.vocab_size, pad)
    real = torch.ones_like(example) if pad is None else (example != pad).long()
    with torch.no_grad():
        hidden = copy(example, attention_mask=real).last_hidden_state
        expected = pooled(with_column(hidden, real.unsqueeze(-1).float()))
    trunk = Trunk(
        stem=Stem(embeddings, pad, length),
        layers=tuple(MaskedLayer(layer) for layer in layers),
        norm=nn.Identity(),
        pool=pooled,
        input=TextTokens(vocabulary=config.vocab_size, length=length),
        notes=(
            *left_out(whole, copy),
            *(f"Left out: {part}." for part in parts if getattr(copy, part, None) is not None),
            f"Texts are {length} tokens long; shorter ones are padded with id {pad}."
            if pad is not None
            else f"Texts are {length} tokens long; the model has no padding id, so all of them are read.",
        ),
    )
    return check_trunk(trunk, example, expected, name)


class Stem(nn.Module):
    """(batch, tokens) int64 -> (batch, tokens, width + 1): embeddings, and a column with 1 for each token but padding.

    The parts and their names are the library's; its positions and token types come from buffers, here from a slice.
    """

    def __init__(self, embeddings: Any, pad: int | None, tokens: int) -> None:
        super().__init__()
        self.pad, self.tokens = pad, tokens
        self.word_embeddings = embeddings.word_embeddings
        self.position_embeddings = embeddings.position_embeddings
        if hasattr(embeddings, "token_type_embeddings"):
            self.token_type_embeddings = embeddings.token_type_embeddings
        self.LayerNorm = embeddings.LayerNorm
        # The library gives the padding token no gradient. It has none here either: nothing attends to it.
        self.word_embeddings.padding_idx = None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.word_embeddings(ids)
        if hasattr(self, "token_type_embeddings"):
            x = x + self.token_type_embeddings.weight[0]
        x = self.LayerNorm(x + self.position_embeddings.weight[: self.tokens])
        real = torch.ones_like(ids) if self.pad is None else ids != self.pad
        return with_column(x, real.to(x.dtype).unsqueeze(-1))

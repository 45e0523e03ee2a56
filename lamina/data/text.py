"""Texts as token ids: by a tokenizer file, or by one of two built-in rules that need no file and no package.

    words    NFC, case folded; runs of letters and digits, and every other sign that is no blank;
             id = 1 + crc32(word) mod (vocabulary - 1)
    bytes    UTF-8; id = 1 + byte; needs a vocabulary of at least 257

Both are the same on every machine and never give 0, the padding. `words` knows no words: different ones may share an id, the
more the smaller the vocabulary is.
"""

import re
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.data.card import MAX_TOKENS
from lamina.encoding.tensors import hash_bytes
from lamina.errors import ConfigError
from lamina.printable import printable

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Tokenizer:
    """Calling it gives the ids of a text. `name` is words, bytes, or `sha256:` and the hash of a tokenizer file.

    `size` is how many tokens it has, `first` are some of them.
    """

    name: str
    size: int
    tokenize: Tokenize
    first: tuple[str, ...] = ()

    def __call__(self, text: str) -> list[int]:
        return self.tokenize(text)


_WORD = re.compile(r"\w+|[^\w\s]")
_PADDING = ("[PAD]", "<pad>", "<|pad|>")


def open_tokenizer(name: str, vocabulary: int) -> Tokenizer:
    """`name` is words, bytes, or a tokenizer.json of Hugging Face. Raises ConfigError if it does not fit the vocabulary."""
    if name == "words":
        if vocabulary < 2:
            raise ConfigError(f"a vocabulary of {vocabulary} has no room beside the padding, id 0")
        return Tokenizer(name, vocabulary, lambda text: [1 + zlib.crc32(w.encode()) % (vocabulary - 1) for w in words(text)])
    if name == "bytes":
        if vocabulary < 257:
            raise ConfigError(f"the tokenizer bytes needs a vocabulary of at least 257, the model has {vocabulary}")
        return Tokenizer(name, 257, lambda text: [1 + byte for byte in text.encode()])
    return _from_file(Path(name), vocabulary)


def words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold())


def _from_file(path: Path, vocabulary: int) -> Tokenizer:
    if not path.is_file():
        raise ConfigError(f"the tokenizer file {path} does not exist; --tokenizer takes a tokenizer.json, words or bytes")
    try:
        from tokenizers import Tokenizer as File
    except ImportError as error:
        raise ConfigError(
            f"{path.name} needs tokenizers, which is not installed: pip install 'lamina[data]', or --tokenizer words"
        ) from error
    try:
        tokenizer: Any = File.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a file that it cannot read
        raise ConfigError(f"{path} is no tokenizer file: {error}") from error
    numbers = tokenizer.get_vocab(with_added_tokens=True)
    size = 1 + max(numbers.values(), default=0)
    if size > vocabulary:
        raise ConfigError(
            f"{path} has {size} tokens, the model a vocabulary of {vocabulary}: change the plan, or the tokenizer"
        )
    padding = {name: tokenizer.token_to_id(name) for name in _PADDING}
    wrong = {name: number for name, number in padding.items() if number}
    if wrong:
        raise ConfigError(f"{path} pads with {wrong}, the model with id 0: use a tokenizer whose padding is 0")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    first = tuple(printable(token, 40) for token in sorted(numbers, key=lambda token: int(numbers[token]))[:MAX_TOKENS])
    return Tokenizer(f"sha256:{hash_bytes(path.read_bytes())}", size, lambda text: list(tokenizer.encode(text).ids), first)

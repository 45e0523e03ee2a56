"""How a device's weights and updates travel: the smallest that plan and device both allow, and never without a word."""

from dataclasses import dataclass

from lamina.encoding.compression import Compression
from lamina.encoding.tensors import ENCODINGS, Encoding
from lamina.plans.plan import Training
from lamina.wire import CheckIn


@dataclass(frozen=True)
class Terms:
    download_encoding: Encoding
    upload_encoding: Encoding
    compression: Compression


def agree(training: Training, facts: CheckIn) -> Terms:
    """What one device is given and asked for."""
    return Terms(
        download_encoding=_smallest(training.download_encoding, facts.encodings),
        upload_encoding=_smallest(training.upload_encoding, facts.encodings),
        compression=training.compression if training.compression in facts.compressions else "none",
    )


def shortfall(training: Training, terms: Terms) -> str:
    """What is larger than the plan allows, because the device cannot do better; empty if nothing is."""
    parts = []
    if terms.download_encoding != training.download_encoding:
        parts.append(f"weights in {terms.download_encoding} instead of {training.download_encoding}")
    if terms.upload_encoding != training.upload_encoding:
        parts.append(f"updates in {terms.upload_encoding} instead of {training.upload_encoding}")
    if terms.compression != training.compression:
        parts.append(f"no {training.compression}")
    return ", ".join(parts)


def _smallest(allowed: Encoding, known: tuple[Encoding, ...]) -> Encoding:
    """The smallest encoding that is not smaller than `allowed` and that the device knows; everybody knows fp32."""
    for encoding in reversed(ENCODINGS[: ENCODINGS.index(allowed) + 1]):
        if encoding in known:
            return encoding
    return "fp32"

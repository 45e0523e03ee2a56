"""What programs take: names, shapes and types of their inputs without the batch axis, and random examples of them."""

import torch
from torch import Tensor

from lamina.bundles.manifest import LABEL
from lamina.plans.model import Encoder, Input, ModelDescription, ModuleEncoder, TextTokens
from lamina.plans.segments import TensorSpec, prefix_chain

AnyEncoder = Encoder | ModuleEncoder
LABELS = TensorSpec(name=LABEL, shape=(), dtype="int64")


def raw_input(encoder: AnyEncoder) -> TensorSpec:
    """What the stem takes."""
    is_text = encoder.input.kind == "text_tokens"
    return TensorSpec(name=encoder.modality, shape=encoder.input.shape, dtype="int64" if is_text else "float32")


def features(encoder: AnyEncoder, depth: int) -> TensorSpec:
    """What the stem (depth 0) or layer `depth - 1` gives."""
    return TensorSpec(name=encoder.modality, shape=encoder.feature_shape(depth))


def segment_input(description: ModelDescription, name: str) -> TensorSpec:
    """What a stem or a layer takes."""
    encoder = description.encoder(name.split(".", maxsplit=1)[0])
    place = prefix_chain(description, encoder.modality).index(name)
    return features(encoder, place - 1) if place else raw_input(encoder)


def embedding(description: ModelDescription, name: str) -> TensorSpec:
    """What the projection gives, under a name; it is not normalised, the contrastive loss does that."""
    return TensorSpec(name=name, shape=(description.projection.output,))


def example_inputs(
    description: ModelDescription, specs: tuple[TensorSpec, ...], batch: int, seed: int = 0
) -> tuple[Tensor, ...]:
    """Random legal inputs: normal values, token ids below the vocabulary, labels below the number of classes."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for spec in specs:
        shape = (batch, *spec.shape)
        if spec.dtype == "float32":
            found.append(torch.randn(shape, generator=generator))
        else:
            found.append(torch.randint(_bound(description, spec.name), shape, generator=generator))
    return tuple(found)


def random_input(given: Input, batch: int = 2) -> Tensor:
    """Random raw input of one encoder."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(given, TextTokens):
        return torch.randint(given.vocabulary, (batch, *given.shape), generator=generator)
    return torch.randn(batch, *given.shape, generator=generator)


def _bound(description: ModelDescription, name: str) -> int:
    """Exclusive upper bound of an int64 input."""
    if name == LABEL and description.labels is not None:
        return description.labels
    # A second view, and an input that is named for none, are of the only modality that there is.
    spec = (description.encoders[0] if len(description.encoders) == 1 else description.encoder(name)).input
    assert spec.kind == "text_tokens"
    return spec.vocabulary

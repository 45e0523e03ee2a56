"""The user's own module: `stem`, `layers`, `input`, and perhaps `norm` and `pool` (`export.trunk`)."""

from torch import nn

from export.models.adapters.common import working_copy
from export.trunk import MeanTokens, Trunk
from lamina.errors import CutError
from lamina.plans.model import AudioFrames, Image, ImagePatches, SensorWindows, TextTokens, Values

EXAMPLE = """\
    class Mine(nn.Module):
        input = lamina.plans.model.Image(channels=3, height=32, width=32)
        def __init__(self):
            super().__init__()
            self.stem = ...                        # raw input -> features
            self.layers = nn.ModuleList([...])     # features -> features
            self.norm = nn.LayerNorm(64)           # optional
            self.pool = ...                        # optional, without parameters: features -> (batch, width)
"""
_INPUTS = (AudioFrames, Image, ImagePatches, SensorWindows, TextTokens, Values)


def has_protocol(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("stem", "layers", "input"))


def adapt_own(module: nn.Module) -> Trunk:
    """A trunk of copies of the module's parts. Raises CutError for an attribute of another type."""
    name = type(module).__qualname__
    _expect(module, name, "stem", nn.Module, "an nn.Module")
    _expect(module, name, "layers", (nn.ModuleList, nn.Sequential), "an nn.ModuleList")
    _expect(module, name, "input", _INPUTS, "a lamina.plans.model.Image, Values or TextTokens")
    for optional in ("norm", "pool"):
        if getattr(module, optional, None) is not None:
            _expect(module, name, optional, nn.Module, "an nn.Module")
    copy = working_copy(module)
    return Trunk(
        stem=copy.stem,
        layers=tuple(copy.layers),
        norm=getattr(copy, "norm", None) or nn.Identity(),
        pool=getattr(copy, "pool", None) or MeanTokens(),
        input=copy.input,
    )


def _expect(module: nn.Module, owner: str, attribute: str, types: type | tuple[type, ...], words: str) -> None:
    value = getattr(module, attribute)
    if not isinstance(value, types):
        raise CutError(f"{owner}.{attribute} is a {type(value).__name__}; it must be {words}, for example\n\n{EXAMPLE}")

"""Copies of a user's modules: lamina changes no module that it was given."""

from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from lamina.errors import CutError


def copied(module: nn.Module) -> Any:
    """A deep copy. Raises CutError that names the part that cannot be copied, with the way out."""
    try:
        return deepcopy(module)
    except Exception as error:  # a user's module may hold anything
        for name, part in module.named_modules():
            for key, value in vars(part).items():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    raise CutError(
                        f"{name or 'the model'}: its tensor {key!r} is computed from others, as the older weight_norm and "
                        "spectral_norm of torch.nn.utils leave it, so the layer cannot be copied; use "
                        "torch.nn.utils.parametrizations.weight_norm, or torch.nn.utils.remove_weight_norm(layer) before the "
                        "export"
                    ) from error
        raise CutError(
            f"a {type(module).__name__} cannot be copied: {type(error).__name__}: {error}; keep files, locks and other "
            "handles out of the model"
        ) from error

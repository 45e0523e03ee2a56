"""What of a module is trained. A user's `requires_grad=False` is law: such a tensor is a constant of the run, in no gradient,
no optimiser state, no update and no count of what is trained.

Programs take a module's tensors in one order: those that are trained, then those that are not, each in the order of
`named_parameters()`.
"""

from collections.abc import Mapping

from torch import nn

from lamina.plans.model import ModelDescription
from lamina.plans.segments import prefix_chain


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def frozen(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that stay as they are, by name."""
    return {name: value for name, value in module.named_parameters() if not value.requires_grad}


def in_order(module: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters, by name, in the order in which a program takes them."""
    return trained(module) | frozen(module)


def fixed_segments(segments: Mapping[str, nn.Module], description: ModelDescription) -> set[str]:
    """Stems and layers of which nothing can be trained, because all their parameters are frozen."""
    chains = [{name: segments[name] for name in prefix_chain(description, m)} for m in description.modalities]
    return {name for chain in chains for name in fixed_in(chain)}


def fixed_in(chain: Mapping[str, nn.Module]) -> set[str]:
    """The same for one modality, given stem and layers in order.

    A segment without any parameter counts where it only leads to a fixed one: features pass both on the same way.
    """
    found: set[str] = set()
    leading: list[str] | None = []
    for name, module in chain.items():
        if trained(module):
            leading = None
        elif frozen(module):
            found |= {name, *(leading or ())}
        elif leading is not None:
            leading.append(name)
    return found

"""What torch says when a layer cannot be traced, in the words of the one who wrote the layer: (reason, remedy)."""

import contextlib
import re
import traceback
from pathlib import Path

import torch

from lamina.errors import ExportError

_TORCH = Path(torch.__file__).parent
_OURS = Path(__file__).parents[1]
_PYTHON = Path(contextlib.__file__).parent
_BY_VALUES = "use torch.where, masks and fixed sizes: no `if` on a tensor, no .item(), nonzero() or boolean index"

ONE_BATCH = (
    "it works for one batch size only",
    "take the batch size from x.shape[0], write -1 or a range for that axis, and compare it with nothing",
)

# (what its text or type says, reason, remedy); the first that is found counts
_KNOWN: tuple[tuple[str, str, str], ...] = (
    (
        r"GuardOnDataDependent|data-dependent|DataDependentOutput|DynamicOutputShape",
        "which code runs, or a size, depends on the values of its input",
        _BY_VALUES,
    ),
    (
        r"sizes that vary",
        "it has a size or a number of its own that is only known from the values of its input, or from the batch",
        _BY_VALUES,
    ),
    (
        r"specialized it to be a constant|Constraints violated|Not all values of batch",
        *ONE_BATCH,
    ),
    (
        r"does not require grad and does not have a grad_fn",
        "its output has no gradient to its weights: something in it ends the gradient",
        "remove torch.no_grad(), .detach() and integer results from forward()",
    ),
    (
        r"does not depend on its input",
        "its output has no gradient to its input, so no segment below it can be trained with it",
        "remove .detach(), torch.no_grad() and integer results from forward(), or train it in a stage of its own",
    ),
    (
        r"\.numpy\(\)|tensor subclasses|tolist\(\)",
        "it leaves torch on the way, for NumPy or plain numbers",
        "compute with torch operations all the way",
    ),
    (
        r"[Dd]erivative .* (is )?not implemented|not implemented the derivative|no autograd formula|register_autograd",
        "an operator of it has no gradient in torch",
        "replace the operator, or freeze this layer in every stage",
    ),
    (
        r"modified by an inplace operation|a leaf Variable that requires grad",
        "it changes a tensor in place that the backward pass needs",
        "write y = x + 1 instead of x += 1",
    ),
)


# (what an operator that torch counts among the random ones is called, what it is, remedy); the first that is found counts
_OPAQUE: tuple[tuple[str, str, str], ...] = (
    (
        r"lstm|gru|rnn",
        "is a recurrent layer in one operator, which no engine can train here",
        "use a convolution over time or attention, or write the steps as a loop over a fixed number of them with nn.Linear",
    ),
    (
        r"attention|flash|efficient",
        "is attention in one fused kernel, which no engine can train",
        "write attention as softmax(q @ k.transpose(-2, -1)) @ v",
    ),
    (r"dropout", "drops values at random, also in evaluation mode", "use nn.Dropout, which lamina turns off"),
)


def opaque(operator: str) -> tuple[str, str]:
    """(reason, remedy) of an operator that torch marks as one with random numbers, such as `aten.gru.input`."""
    for pattern, what, remedy in _OPAQUE:
        if re.search(pattern, operator):
            return f"{operator} {what}", remedy
    return (
        f"it draws random numbers ({operator}), so engines would disagree",
        "remove it from forward(): noise belongs to the data, and dropout to nn.Dropout, which lamina turns off",
    )


def explain(error: BaseException) -> tuple[str, str]:
    """(reason, remedy) of an error that came out of tracing; with the line of the user's code where one is known."""
    kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
    text = str(error)
    for pattern, reason, remedy in _KNOWN:
        if re.search(pattern, f"{kinds}\n{text}"):
            return reason + where(error), remedy
    if isinstance(error, ExportError):
        return _split(error.message)
    first = (text.strip().splitlines() or [""])[0][:200]
    return (
        f"tracing it raised {type(error).__name__}: {first}{where(error)}",
        "write that line in plain tensor operations; torch.export.export of the layer alone shows the whole message",
    )


def where(error: BaseException) -> str:
    """` (file.py, line 7, in forward)`: the innermost line of other code than torch's, Python's and ours; may be empty."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and path.parent != _PYTHON and not {_TORCH, _OURS} & set(path.parents):
            return f" ({path.name}, line {frame.lineno}, in {frame.name})"
    return ""


def _split(message: str) -> tuple[str, str]:
    """Our own messages end with the way out, after the last colon or semicolon."""
    for separator in (": ", "; "):
        reason, found, remedy = message.rpartition(separator)
        if found:
            return reason, remedy
    return message, "see export/graphs/cut.py for the shape that a model must have"

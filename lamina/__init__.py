"""lamina: train models on small devices one layer at a time, federated over many of them.

    import lamina
    result = lamina.simulate("plan.toml", [{"train_image": ..., "train_label": ..., ...}, ...])

Names are loaded when they are first used: importing this package costs nothing, and a device never loads what exports.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.api import assemble, export, join, publish, pull, simulate, status
    from lamina.errors import (
        BundleError,
        BusyError,
        ConfigError,
        CutError,
        DataError,
        DiskFullError,
        EngineError,
        EngineMissingError,
        ExportError,
        HashMismatchError,
        LaminaError,
        NonFiniteError,
        NotEnrolledError,
        ParityError,
        PortInUseError,
        ProtocolError,
        RoundClosedError,
        SignatureError,
        StoreError,
        TensorFileError,
        TlsError,
        TooLargeError,
        UnknownNameError,
        UnreachableError,
        UpdateRejectedError,
    )
    from lamina.plans.plan import Plan

__version__ = "0.1.0"
__all__ = [
    "BundleError",
    "BusyError",
    "ConfigError",
    "CutError",
    "DataError",
    "DiskFullError",
    "EngineError",
    "EngineMissingError",
    "ExportError",
    "HashMismatchError",
    "LaminaError",
    "NonFiniteError",
    "NotEnrolledError",
    "ParityError",
    "Plan",
    "PortInUseError",
    "ProtocolError",
    "RoundClosedError",
    "SignatureError",
    "StoreError",
    "TensorFileError",
    "TlsError",
    "TooLargeError",
    "UnknownNameError",
    "UnreachableError",
    "UpdateRejectedError",
    "assemble",
    "export",
    "join",
    "publish",
    "pull",
    "simulate",
    "status",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lamina' has no attribute {name!r}; it has {', '.join(__all__)}")
    homes = {"Plan": "lamina.plans.plan"} | {error: "lamina.errors" for error in __all__ if error.endswith("Error")}
    module = homes.get(name, "lamina.api")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

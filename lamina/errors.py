"""Every error that lamina raises on purpose.

    LaminaError              what happened, with which value, and what to do next
      ConfigError            a plan, an option or a folder cannot work; nothing has been started
        PortInUseError       the address to listen on is taken
        DataError            a device's data is missing, of the wrong shape, or holds a value that is not legal
      ExportError            the model cannot be turned into programs
        CutError             the model cannot be cut into segments
        ParityError          a program does not compute what eager PyTorch computes
      BundleError            a file does not hold what its manifest says
        HashMismatchError    the bytes have another sha256 than promised
        TensorFileError      a tensor file is damaged, or holds other tensors than expected
        SignatureError       a bundle is unsigned, altered after signing, or signed by a key that is not trusted here
      ProtocolError          the coordinator refuses a request
        NotEnrolledError     the token is missing, wrong or revoked
        UnknownNameError     no such device, run, stage, round or blob
        RoundClosedError     the round no longer takes this message
        UpdateRejectedError  an update is not one that this round can count
        TooLargeError        a body is larger than any legal one
        BusyError            too much at once; the same request may pass a little later
      EngineError            the runtime on the device failed
        EngineMissingError   the engine is not installed here
        NonFiniteError       a loss or a gradient is NaN or infinite
      StoreError             the disk or the database failed
        DiskFullError        no space left
      UnreachableError       the coordinator does not answer
        TlsError             no secure connection comes about, and trying again would not help

Each class has a stable `code` that also stands in the problem document sent over HTTP and as a heading in `docs/errors.md`.
A message names the thing, the value, the bound and the way out. It never contains a token.
"""

from typing import ClassVar

from lamina.printable import printable


class LaminaError(Exception):
    """Base of all errors that a user can act on."""

    code: ClassVar[str] = "lamina"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(LaminaError):
    code = "config"


class PortInUseError(ConfigError):
    code = "port-in-use"


class DataError(ConfigError):
    code = "data"


class ExportError(LaminaError):
    code = "export"


class CutError(ExportError):
    code = "cut"


class ParityError(ExportError):
    code = "parity"


class BundleError(LaminaError):
    code = "bundle"


class HashMismatchError(BundleError):
    code = "hash-mismatch"


class TensorFileError(BundleError):
    code = "tensor-file"


class SignatureError(BundleError):
    code = "signature"


class ProtocolError(LaminaError):
    code = "protocol"


class NotEnrolledError(ProtocolError):
    code = "not-enrolled"


class UnknownNameError(ProtocolError):
    code = "unknown-name"


class RoundClosedError(ProtocolError):
    code = "round-closed"


class UpdateRejectedError(ProtocolError):
    code = "update-rejected"


class TooLargeError(ProtocolError):
    code = "too-large"


class BusyError(ProtocolError):
    """`retry_after_seconds`: when the same request may pass."""

    code = "busy"

    def __init__(self, message: str, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class EngineError(LaminaError):
    code = "engine"


class EngineMissingError(EngineError):
    code = "engine-missing"


class NonFiniteError(EngineError):
    code = "non-finite"


class StoreError(LaminaError):
    code = "store"


class DiskFullError(StoreError):
    code = "disk-full"


class UnreachableError(LaminaError):
    code = "unreachable"


class TlsError(UnreachableError):
    code = "tls"


def all_errors() -> dict[str, type[LaminaError]]:
    """code -> class, for every class of the tree."""
    found: dict[str, type[LaminaError]] = {}
    queue: list[type[LaminaError]] = [LaminaError]
    while queue:
        error = queue.pop()
        found[error.code] = error
        queue.extend(error.__subclasses__())
    return found


def shown(error: LaminaError) -> str:
    """What a command prints when it ends with this error. Its message may quote another machine or somebody's file."""
    message = printable(error.message, 4000, keeps_lines=True)
    return f"error [{error.code}]: {message}\n(what this means and how to mend it: docs/errors.md, {error.code!r})\n"

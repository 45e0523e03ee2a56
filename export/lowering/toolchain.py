"""What every export shares: the tools that write an engine's programs, and the folder that a bundle is written to."""

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from export.lowering import lower_executorch, lower_onnx, lower_torch
from lamina.bundles.bundle import BLOBS, MANIFEST, SIGNATURE, blob_path, sign_bundle
from lamina.bundles.keys import SigningKey
from lamina.bundles.manifest import EngineName
from lamina.errors import ConfigError, ExportError
from lamina.files import write_durably

FORMATS: dict[EngineName, int] = {
    "executorch": lower_executorch.FORMAT,
    "onnxruntime": lower_onnx.FORMAT,
    "torch": lower_torch.FORMAT,
}
"""Of our own lowering: a change of it makes other programs of the same graph."""
# What the bytes of a program depend on, besides the graph and our own lowering.
_PACKAGES: dict[EngineName, tuple[str, ...]] = {
    "executorch": ("torch", "executorch"),
    "onnxruntime": ("torch", "onnx", "onnxscript"),
    "torch": ("torch",),
}


def tool_versions(engine: EngineName) -> dict[str, str]:
    """Versions of the packages that write programs of this engine. Raises ExportError where one is missing."""
    try:
        return {package: version(package) for package in _PACKAGES[engine]}
    except PackageNotFoundError as error:
        raise ExportError(f"{engine} cannot be exported here: {error}; pip install 'lamina[export,{engine}]'") from error


def check_folder(folder: Path, other_plan: Callable[[Path], str | None]) -> None:
    """The folder must be empty, or hold this very bundle, whole or begun. Raises ConfigError.

    `other_plan` is given the manifest that the folder holds: the name of its plan if it is of another bundle, else None.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder for the bundle")
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in (MANIFEST, SIGNATURE, BLOBS))
    if strangers:
        raise ConfigError(f"{folder} holds other files ({', '.join(strangers[:3])}); give an empty folder for the bundle")
    if (folder / MANIFEST).exists() and (name := other_plan(folder / MANIFEST)) is not None:
        raise ConfigError(f"{folder} holds the bundle of another plan ({name!r}); give an empty folder")


def write_bundle(folder: Path, manifest: bytes, blobs: Mapping[str, bytes], signer: SigningKey) -> None:
    """Blobs first, the manifest last: a folder with a manifest is whole. Blobs of an earlier export are removed."""
    for digest, data in blobs.items():
        write_durably(blob_path(folder, digest), data)
    sign_bundle(folder, signer, manifest)
    write_durably(folder / MANIFEST, manifest)
    for path in (folder / BLOBS).iterdir():
        if path.name not in blobs:
            path.unlink()

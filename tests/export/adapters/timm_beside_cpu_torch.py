"""timm and transformers for tests: importable beside a torch for the CPU, or a skipped test where they are not installed."""

from types import ModuleType

import pytest

from benchmarks.cpu_torchvision import make_torchvision_importable


def import_timm() -> ModuleType:
    make_torchvision_importable()
    return pytest.importorskip("timm")


def import_transformers() -> ModuleType:
    make_torchvision_importable()
    return pytest.importorskip("transformers")

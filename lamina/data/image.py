"""Image files, and images of pillow, as float32 in [0, 1] of the model's size. pillow is imported with the first image."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lamina.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Fit = Literal["stretch", "crop"]
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_MOST_STRETCHED = 100


def is_image(value: Any) -> bool:
    """Whether it is an image of pillow; if pillow was never imported, nothing is."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def read_image(path: Path, shape: tuple[int, ...], fit: Fit) -> NDArray[np.float32]:
    """(channels, height, width). Raises DataError for what pillow cannot read."""
    pillow = _pillow()
    try:
        with pillow.open(path) as image:
            # A large JPEG is decoded at a fraction of its size, at least 3 times the wanted one: 36 MiB of pixels become 1.
            image.draft(None, (3 * max(shape[1:]), 3 * max(shape[1:])))
            return image_values(image, shape, fit)
    except DataError:
        raise
    except Exception as error:  # a damaged file makes a decoder raise nearly anything; it is this file's fault, whatever it is
        raise DataError(f"is no readable image: {error}") from error


def image_values(image: "Image", shape: tuple[int, ...], fit: Fit) -> NDArray[np.float32]:
    """(channels, height, width): turned as its EXIF note says, grey or RGB (transparency is dropped), bilinear."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    channels, height, width = shape
    if channels not in _MODES:
        raise DataError(f"an image has 1, 3 or 4 channels, the model takes {channels}; make arrays of it yourself")
    if max(image.size) > _MOST_STRETCHED * min(image.size):
        raise DataError(
            f"has {image.size[0]} x {image.size[1]} pixels; one side is more than {_MOST_STRETCHED} times the other"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise DataError(f"has pixels of mode {image.mode!r}, whose range is not known; save 8 or 16 bits for each channel")
    if image.mode.startswith("I;16"):
        return _deep_grey(image, shape, fit)
    if image.mode == "P":
        image = image.convert("RGBA")
    image = image.convert(_MODES[channels])
    box = _box(image.size, (width, height), fit)
    if image.size != (width, height):
        image = image.resize((width, height), Resampling.BILINEAR, box)
    values = np.asarray(image, np.float32).reshape(height, width, channels)
    return np.ascontiguousarray(values.transpose(2, 0, 1)) / np.float32(255)


def _deep_grey(image: "Image", shape: tuple[int, ...], fit: Fit) -> NDArray[np.float32]:
    """16 bits of grey, which pillow would clip to 8."""
    from PIL.Image import Resampling

    channels, height, width = shape
    if channels == 4:
        raise DataError("is grey with 16 bits; the model takes 4 channels")
    grey = _pillow().fromarray(np.asarray(image).astype(np.float32) / np.float32(65535))
    if grey.size != (width, height):
        grey = grey.resize((width, height), Resampling.BILINEAR, _box(grey.size, (width, height), fit))
    return np.repeat(np.asarray(grey, np.float32)[None], channels, axis=0)


def _box(size: tuple[int, int], wanted: tuple[int, int], fit: Fit) -> tuple[float, float, float, float]:
    """The part of the image that is used: all of it, or the largest central one of the wanted proportions."""
    width, height = size
    if fit == "stretch":
        return (0, 0, width, height)
    scale = min(width / wanted[0], height / wanted[1])
    left, top = (width - scale * wanted[0]) / 2, (height - scale * wanted[1]) / 2
    return (left, top, width - left, height - top)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("reading images needs pillow, which is not installed: pip install 'lamina[data]'") from error
    return Image

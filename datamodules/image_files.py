"""One image: from the bytes of a file to pixels, and back.

Legend: H rows, W columns, C channels: 1 of grey, or 3 of red, green and blue.
"""

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Endings of files that are images, in any case of letters."""
MEMBERS = ("png", "jpg", "jpeg", "webp", "bmp", "npy")
"""Extensions of members of a shard that are images."""
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
FORMATS = {"png": "png", "jpeg": "jpg", "raw": "npy"}
"""What images are stored as -> extension of the member."""

_DECODERS = ("PNG", "JPEG", "WEBP", "BMP")
_MODES = {1: "L", 3: "RGB"}
_GREY_MODES = ("1", "L", "LA")
_DEEP_MODES = ("I", "F")  # and those that begin with `I;`: more than 8 bits a channel
_BOMBS = (Image.DecompressionBombWarning, Image.DecompressionBombError)
_DAMAGES = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class SourceImage:
    """An image of a source, not decoded.

    Attributes:
        content: bytes of a file or member, or pixels, uint8 [H, W] or [H, W, C].
        is_array: whether the bytes are those of a `.npy` file.
        label: number of its class; None where it has none.
        place: where it is, for messages.
    """

    content: bytes | Pixels
    is_array: bool
    label: int | None
    place: str

    @property
    def identity(self) -> bytes:
        """Bytes that equal images have in common."""
        return self.content if isinstance(self.content, bytes) else self.content.tobytes()


@dataclass(frozen=True)
class ImageForm:
    """What images are stored as.

    Attributes:
        resolution: H and W, of the central square; None leaves sizes as they are.
        resize: filter, one of `FILTERS`.
        channels: C; None takes 1 of grey files and 3 of others.
        format: one of `FORMATS`.
        jpeg_quality: 1 to 100, of images that are encoded as JPEG.
    """

    resolution: int | None
    resize: str
    channels: int | None
    format: str
    jpeg_quality: int

    def make(self, image: SourceImage) -> tuple[bytes | Pixels, tuple[int, int, int]]:
        """Give what is stored, and its H, W and C.

        A PNG or JPEG in which nothing is to be changed stays as it is, byte for byte.

        Raises:
            ValueError: the image cannot be read; the message says why.
        """
        if image.is_array or not isinstance(image.content, bytes):
            stored, pixels = None, _as_array(image.content)
            pixels = _to_channels(_as_image(pixels), self.channels)
        else:
            opened = open_image(image.content)
            if opened.format == "PNG":
                _check_png(image.content)
            pixels = _to_channels(opened, self.channels)
            stored = image.content if self._has_form(opened, pixels) else None
        if self.resolution is not None and pixels.size != (self.resolution, self.resolution):
            pixels, stored = _fit(pixels, self.resolution, self.resize), None
        shape = (pixels.height, pixels.width, len(pixels.getbands()))
        return self._encode(pixels) if stored is None else stored, shape

    def _has_form(self, opened: Image.Image, converted: Image.Image) -> bool:
        return opened is converted and opened.format == self.format.upper()

    def _encode(self, image: Image.Image) -> bytes | Pixels:
        if self.format == "raw":
            return np.asarray(image).reshape(image.height, image.width, -1)
        file = io.BytesIO()
        options = {"quality": self.jpeg_quality} if self.format == "jpeg" else {}
        image.save(file, self.format, **options)
        return file.getvalue()


def open_image(content: bytes | memoryview) -> Image.Image:
    """Decode a PNG, JPEG, WebP or BMP file; of several frames the first.

    Orientations in EXIF are not applied.

    Raises:
        ValueError: it is none of them, damaged, cut short, or has more pixels than Pillow takes
            for safe (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    try:
        image = Image.open(io.BytesIO(content), formats=_DECODERS)
        # Pillow warns, and raises at twice as many; filters of warnings are of all threads.
        if (limit := Image.MAX_IMAGE_PIXELS) and image.width * image.height > limit:
            raise Image.DecompressionBombError(
                f"{image.height} x {image.width}, and Pillow's limit is {limit} pixels"
            )
        image.load()
    except _BOMBS as err:
        raise ValueError(f"it has too many pixels: {err}") from err
    except Image.UnidentifiedImageError as err:
        raise ValueError(f"it is no whole file of {', '.join(_DECODERS)}") from err
    except _DAMAGES as err:
        raise ValueError(f"it is damaged or cut short ({err})") from err
    return image


def read_pixels(content: memoryview, channels: int, *, is_array: bool) -> Pixels:
    """Decode a member of a shard; uint8 [H, W, C].

    Args:
        content: of the member.
        channels: C. Grey is the luma of ITU-R 601-2, transparency is left out.
        is_array: whether it is a `.npy` file.

    Raises:
        ValueError: it cannot be decoded; the message says why.
    """
    if is_array:
        array = _as_array(content)
        if array.shape[2] == channels:
            return array
        image = _as_image(array)
    else:
        image = open_image(content)
    image = _to_channels(image, channels)
    return np.asarray(image).reshape(image.height, image.width, channels)


def fit_pixels(pixels: Pixels, resolution: int, resize: str) -> Pixels:
    """Resize the central square of an image [H, W, C] to so many rows and columns.

    Shrinking averages over all that becomes a pixel, as Pillow does (no aliasing).
    """
    fitted = _fit(_as_image(pixels), resolution, resize)
    return np.asarray(fitted).reshape(resolution, resolution, pixels.shape[2])


def describe(content: bytes) -> str:
    """Say what size and kind an image file has; nothing of what is none."""
    try:
        image = open_image(content)
    except ValueError:
        return ""
    return f"{image.height} x {image.width} {image.mode}"


def _fit(image: Image.Image, resolution: int, resize: str) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((resolution, resolution), FILTERS[resize])


def _to_channels(image: Image.Image, channels: int | None) -> Image.Image:
    if image.mode in _DEEP_MODES or image.mode.startswith("I;"):
        raise ValueError(f"it has more than 8 bits a channel (Pillow's mode {image.mode})")
    if channels is None:
        channels = 1 if image.mode in _GREY_MODES else 3
    if image.mode == _MODES[channels]:
        return image
    if "transparency" in image.info:  # Pillow would warn of what is meant here
        image = image.convert("RGBA")
    return image.convert(_MODES[channels])


def _as_array(content: Any) -> Pixels:
    """Read pixels [H, W] or [H, W, C] out of a `.npy` file, or take them; uint8 [H, W, C]."""
    array = content
    if not isinstance(content, np.ndarray):
        array = _read_npy(bytes(content))
    if array.ndim == 2:
        array = array[:, :, None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in _MODES:
        raise ValueError(
            f"it is an array {array.dtype}{_show(array.shape)}, and images are uint8[H, W], "
            "[H, W, 1] or [H, W, 3]"
        )
    if not array.size:
        raise ValueError(f"it has no pixels ({_show(array.shape)})")
    return array


def _read_npy(content: bytes) -> Pixels:
    try:
        if content[6:8] != b"\x01\x00":  # a version that few write
            return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        start = 10 + int.from_bytes(content[8:10], "little")  # of the elements
        shape, is_transposed, dtype = _npy_header(content[:start])
        pixels = np.frombuffer(content, dtype, offset=start)
        return pixels.reshape(shape, order="F" if is_transposed else "C")
    except Exception as err:  # a header is read as Python, and raises what that leads to
        raise ValueError(f"it is damaged or cut short ({err})") from err


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Parse the header of a `.npy` file; images of a shard share a few, and it takes 50 us."""
    file = io.BytesIO(header)
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)


def _show(shape: Sequence[int]) -> str:
    return str(list(shape))


def _as_image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _check_png(content: bytes) -> None:
    """Check the sums of all parts of a PNG, which decoding does not."""
    try:
        Image.open(io.BytesIO(content), formats=("PNG",)).verify()
    except _DAMAGES as err:
        raise ValueError(f"it is damaged ({err})") from err

"""One value of a source at a time: checked, and brought to the form the canonical data set keeps."""

import base64
import binascii
import io
import json
import math
import warnings
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from attribution_core.errors import InvalidInputError
from attribution_core.spec import DatasetSpec

MAX_IMAGE_PIXELS = 64_000_000
MAX_TEXT_CHARACTERS = 10_000_000
MAX_TOKEN = 2**31 - 1


def as_text(value: Any) -> str:
    """Return a text without NUL characters or lone surrogates.

    Raises:
        InvalidInputError: if it is anything else.
    """
    if not isinstance(value, str):
        raise InvalidInputError(f"expected text, got {_kind(value)}")
    if "\x00" in value:
        raise InvalidInputError("text with a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidInputError("text with a lone surrogate, which is not valid Unicode") from None
    if len(value) > MAX_TEXT_CHARACTERS:
        raise InvalidInputError(f"text of {len(value):,} characters; at most {MAX_TEXT_CHARACTERS:,}")
    return value


def as_array(value: Any) -> np.ndarray:
    """Return finite numbers as float32, from (nested) lists, an array, or JSON text; a boolean is 0 or 1.

    Raises:
        InvalidInputError: if it is not a regular array of finite numbers.
    """
    value = _from_json(value)
    try:
        array = np.asarray(value)
    except ValueError:
        raise InvalidInputError("lists of different lengths inside one value") from None
    if array.dtype.kind not in "biuf":
        raise InvalidInputError(f"expected numbers, got {_kind(value)}")
    if array.size == 0:
        raise InvalidInputError("an empty list of numbers")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise InvalidInputError("NaN, infinity, or a number too large for float32")
    return array


def as_tokens(value: Any) -> np.ndarray:
    """Return token ids as int32.

    Raises:
        InvalidInputError: if it is not a list of whole numbers from 0 to 2³¹ - 1.
    """
    value = _from_json(value)
    try:
        array = np.asarray(value) if isinstance(value, list | tuple | np.ndarray) else None
    except ValueError:  # of lists of different lengths
        array = None
    if array is None or array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidInputError("expected a list of whole numbers as tokens")
    if array.size == 0:
        raise InvalidInputError("no tokens")
    if array.min() < 0 or array.max() > MAX_TOKEN:
        raise InvalidInputError("a token outside 0 … 2147483647")
    return array.astype(np.int32)


def as_png(value: Any, spec: DatasetSpec) -> bytes:
    """Return an image as PNG bytes, from PNG or JPEG bytes, base64 of them, or a uint8 array.

    Raises:
        InvalidInputError: if it cannot be decoded, is no image, or is far too large.
    """
    if isinstance(value, str):
        try:
            value = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise InvalidInputError("an image given as text must be base64 of PNG or JPEG bytes") from None
    image = _opened(value) if isinstance(value, bytes) else _from_pixels(value, spec)
    with io.BytesIO() as out:
        image.save(out, "PNG")
        return out.getvalue()


def as_scalar(value: Any) -> str | int | float | bool | None:
    """Return a metadata value.

    Raises:
        InvalidInputError: if it is not text, a finite number, a boolean or null.
    """
    value = _python(value)
    if isinstance(value, str):
        return as_text(value)
    if isinstance(value, float):
        if math.isnan(value) or math.isinf(value):
            raise InvalidInputError("NaN or infinity")
        return value
    if isinstance(value, bool | None):
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise InvalidInputError("a whole number outside 64 bits")
        return value
    raise InvalidInputError(f"expected text, a number or a boolean, got {_kind(value)}")


def as_target(value: Any) -> int | float | list[float]:
    """Return a class number, a real value, or a list of real values.

    Raises:
        InvalidInputError: if it is missing or not a finite number.
    """
    if value is None:
        raise InvalidInputError("no target")
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0):
        array = np.asarray(as_array(value), np.float64)
        if array.ndim != 1:
            raise InvalidInputError("a target may be a number or a flat list of numbers")
        return [float(number) for number in array]
    value = _python(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInputError(f"a target must be a number, got {_kind(value)}")
    number = as_scalar(value)
    assert isinstance(number, int | float)
    return number


def as_id(value: Any) -> str:
    """Return an id as text, at most 512 characters.

    Raises:
        InvalidInputError: if it is not text or a whole number.
    """
    value = _python(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    text = as_text(value)
    if not 1 <= len(text) <= 512:
        raise InvalidInputError("an id has 1 to 512 characters")
    return text


def _python(value: Any) -> Any:
    """Return a number or text of numpy's as Python's; times stay what they are, as some would become numbers without a unit."""
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind not in "mM":
        return value.item()
    return value


def _from_json(value: Any) -> Any:
    """Parse a list written as JSON text, as a CSV cell holds it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InvalidInputError("expected a list of numbers, got text") from None


def _opened(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=["PNG", "JPEG"])
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise InvalidInputError(f"an image of {image.width} × {image.height} pixels is too large")
            image.load()
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ):
        raise InvalidInputError("not a readable PNG or JPEG image") from None
    return _in_bytes(image)


def _in_bytes(image: Image.Image) -> Image.Image:
    """Return an image with one byte per channel: grey, RGB, or RGBA."""
    match image.mode:
        case "L" | "RGB" | "RGBA":
            return image
        case "I;16":  # Pillow's own conversion would make everything above 255 white
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        case "P" if "transparency" in image.info:
            return image.convert("RGBA")
        case "P" | "CMYK" | "YCbCr":
            return image.convert("RGB")
        case _:
            return image.convert("L")


def _from_pixels(value: Any, spec: DatasetSpec) -> Image.Image:
    try:
        pixels = np.asarray(value)
    except ValueError:
        raise InvalidInputError("rows of different lengths in an image") from None
    if pixels.dtype.kind not in "iu" or pixels.size == 0 or pixels.min() < 0 or pixels.max() > 255:
        raise InvalidInputError("an image array needs whole numbers from 0 to 255")
    if pixels.ndim == 3 and spec.channels_first:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise InvalidInputError(f"an image array of shape {list(pixels.shape)}; expected (H, W) or (H, W, 1, 3 or 4)")
    if pixels.shape[0] * pixels.shape[1] > MAX_IMAGE_PIXELS:
        raise InvalidInputError("the image is too large")
    return Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__

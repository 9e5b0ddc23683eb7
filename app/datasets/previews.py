"""An example's input as something a person can look at."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from attribution_core.data.reader import DatasetReader

_MAX_CHARACTERS = 20_000
_MAX_SIDE = 512


@dataclass(frozen=True)
class Preview:
    """A picture or a text."""

    content: bytes
    media_type: str


def preview_of(reader: DatasetReader, row: int) -> Preview:
    """Return a PNG of an image, the text itself, or the numbers of anything else."""
    value = reader.read([row]).inputs[0]
    if reader.spec.kind == "image":
        return Preview(_png(value), "image/png")
    text = value if isinstance(value, str) else np.array2string(value, threshold=2_000, max_line_width=100)
    return Preview(text[:_MAX_CHARACTERS].encode("utf-8"), "text/plain; charset=utf-8")


def _png(pixels: np.ndarray) -> bytes:
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    with io.BytesIO() as out:
        image.save(out, "PNG")
        return out.getvalue()

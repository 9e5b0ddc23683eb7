"""From text to tokens."""

from pathlib import Path
from typing import Protocol

import numpy as np

from attribution_core.errors import InvalidInputError
from attribution_core.spec import TokenizerSpec

BYTES_PAD = 256


class Tokenizer(Protocol):
    """Encodes text; `pad` fills up shorter examples and is never attended to."""

    pad: int

    def encode(self, text: str) -> np.ndarray:
        """Return token ids, (tokens,) int32."""


class BytesTokenizer:
    """The UTF-8 bytes themselves: 256 tokens, and one for padding."""

    pad = BYTES_PAD

    def encode(self, text: str) -> np.ndarray:
        """Return the text's bytes."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)


class FileTokenizer:
    """A `tokenizer.json` of the tokenizers library (extra `hf`)."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Encoder  # noqa: PLC0415, an optional extra
        except ImportError:
            raise InvalidInputError(
                "this tokenizer needs the extra `hf`: pip install headwater[hf]", "/tokenizer"
            ) from None
        try:
            self._encoder = Encoder.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise InvalidInputError(f"the tokenizer cannot be read: {error}", "/tokenizer/source") from None
        self.pad = self._encoder.token_to_id("<pad>") or 0

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, with the tokenizer's own special tokens."""
        return np.asarray(self._encoder.encode(text).ids, np.int32)


def load_tokenizer(spec: TokenizerSpec, path: Path | None = None) -> Tokenizer:
    """Return the tokenizer a spec names; `path` is its resolved source.

    Raises:
        InvalidInputError: if its file cannot be read, or its library is not installed.
    """
    if spec.type == "bytes":
        return BytesTokenizer()
    if path is None:
        raise InvalidInputError("this tokenizer needs its file", "/tokenizer/source")
    return FileTokenizer(path)

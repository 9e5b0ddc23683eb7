"""Tokenizers: raw bytes, and a tokenizer.json of the tokenizers library."""

from pathlib import Path

import pytest

from attribution_core.data.tokenizers import load_tokenizer
from attribution_core.errors import InvalidInputError
from attribution_core.spec import TokenizerSpec

FROM_FILE = TokenizerSpec(type="huggingface", source="files:tokenizer.json")


def test_bytes_are_the_texts_own() -> None:
    tokenizer = load_tokenizer(TokenizerSpec())
    assert bytes(tokenizer.encode("héllo 🦊").tolist()).decode() == "héllo 🦊"
    assert tokenizer.pad == 256


@pytest.mark.hf
def test_a_tokenizer_file_is_read(tmp_path: Path) -> None:
    import tokenizers

    words = {"<pad>": 3, "which": 0, "data": 1, "?": 2}
    encoder = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    encoder.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(FROM_FILE, tmp_path / "tokenizer.json")
    assert tokenizer.encode("which data which ?").tolist() == [0, 1, 0, 2]
    assert tokenizer.pad == 3


@pytest.mark.hf
def test_a_broken_tokenizer_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load_tokenizer(FROM_FILE, tmp_path / "tokenizer.json")

"""How a fitted index lies in its folder, and how it is recognised again.

`index.json` describes the fit and holds a checksum per file and one over itself. There is no time, path or machine in it: equal fits are
equal byte for byte.
"""

import json
from pathlib import Path
from typing import Any

from attribution_core.errors import CorruptArtifactError
from attribution_core.fingerprint import sha256_file, sha256_of

FACTORS_FILE = "factors.safetensors"
FEATURES_FOLDER = "features"
GRADIENTS_FOLDER = "gradients"
# Sums over rows added since the factors were fitted.
APPENDED_FILE = "appended.safetensors"
SEARCH_FILE = "search.faiss"
INDEX_FILE = "index.json"


def write_description(folder: Path, described: dict[str, Any]) -> None:
    """Write `index.json` with the checksums of all other files that are there now."""
    paths = [path for path in _files(folder) if path.name != INDEX_FILE]
    files = {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}
    content = {**described, "files": files}
    text = json.dumps({"content": content, "sha256": sha256_of(content)}, indent=1, sort_keys=True)
    (folder / INDEX_FILE).write_text(text)


def bytes_of(folder: Path) -> int:
    """Return the size of an artifact's files."""
    return sum(path.stat().st_size for path in _files(folder))


def _files(folder: Path) -> list[Path]:
    """Return an artifact's files in order, without what a killed process left of one that it had not finished."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def read_description(folder: Path) -> dict[str, Any]:
    """Return what `index.json` says, after checking it and every file it names.

    Raises:
        CorruptArtifactError: naming the file that is missing or damaged.
    """
    try:
        stored = json.loads((folder / INDEX_FILE).read_bytes())
        content: dict[str, Any] = stored["content"]
        intact = sha256_of(content) == stored["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtifactError(f"{INDEX_FILE} cannot be read: {error}") from error
    if not intact:
        raise CorruptArtifactError(f"{INDEX_FILE} does not match its checksum")
    for name, expected in content["files"].items():
        try:
            found = sha256_file(folder / name)
        except OSError as error:
            raise CorruptArtifactError(f"{name} cannot be read: {error.strerror}") from error
        if found != expected:
            raise CorruptArtifactError(f"{name} does not match its checksum")
    return content

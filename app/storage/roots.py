"""Files under roots that the operator configured; the only files a request can name."""

import re
from collections.abc import Mapping
from pathlib import Path

from app.errors import InvalidRequest

_SOURCE = re.compile(r"^(?P<root>[a-z0-9][a-z0-9_-]{0,31}):(?P<path>[^\x00-\x1f\\]{1,1000})$")


def resolve(roots: Mapping[str, Path], source: str, pointer: str = "/source") -> Path:
    """Return the file that `root:name/path` names.

    Raises:
        InvalidRequest: if the root is unknown, or the path leaves it, by `..`, an absolute path or a link, or is no file.
    """
    match = _SOURCE.match(source)
    root = roots.get(match["root"]) if match else None
    if match is None or root is None:
        known = ", ".join(sorted(roots)) or "none"
        raise InvalidRequest(f"A source is `root:path` with a configured root; there are: {known}.", pointer=pointer)
    path = _inside(root.resolve(), Path(match["path"]))
    if path is None:
        raise InvalidRequest("There is no such file under that root.", pointer=pointer)
    return path


def _inside(base: Path, name: Path) -> Path | None:
    try:
        path = (base / name).resolve()
        inside = path.is_relative_to(base) and not name.is_absolute() and ".." not in name.parts
        return path if inside and path.is_file() else None
    except (OSError, RuntimeError):  # a name that is too long, or links in a circle
        return None

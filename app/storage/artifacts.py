"""Published artifacts: folders that are either whole and verified by a manifest, or not there.

Publishing: files are written in a workspace → each is flushed → `manifest.json` with sizes and sha256 → the folder is renamed → its
parent is flushed. Only then does a row in the database refer to it; a folder without
a row is found again by the retried job, or removed with the thing it belongs to.
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attribution_core.durable import flush
from attribution_core.errors import CorruptArtifactError
from attribution_core.fingerprint import canonical_json, sha256_file, sha256_of

MANIFEST = "manifest.json"
_CRASH_VARIABLE = "HEADWATER_CRASH_AT"


@dataclass(frozen=True)
class Published:
    """A published artifact: its name in the store, the hash of its manifest's files, and its size."""

    name: str
    sha256: str
    bytes: int


class ArtifactStore:
    """Artifacts under `<root>/artifacts`, work in progress under `<root>/work`.

    Args:
        root: the data folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._artifacts = self.root / "artifacts"
        self._work = self.root / "work"
        self._uploads = self.root / "uploads"
        self._owner = self.root / ".owner"

    def prepare(self) -> None:
        """Create the folders."""
        for folder in (self._artifacts, self._work, self._uploads):
            folder.mkdir(parents=True, exist_ok=True)

    def workspace(self, job_id: str) -> Path:
        """Return the folder where a job keeps what is not published yet; every attempt finds the same one."""
        folder = self._work / job_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def drop_workspace(self, job_id: str) -> None:
        """Remove a job's workspace."""
        shutil.rmtree(self._work / job_id, ignore_errors=True)

    def workspaces(self) -> list[str]:
        """Return the names of the workspaces there are."""
        return sorted(path.name for path in self._work.iterdir() if path.is_dir()) if self._work.exists() else []

    def owner(self) -> str | None:
        """Return the mark of whoever removes files that are not theirs, None if nobody has left one."""
        return self._owner.read_text() if self._owner.exists() else None

    def claim(self, mark: str) -> None:
        """Leave a mark of who removes files."""
        part = self._owner.with_suffix(".part")
        part.write_text(mark)
        part.rename(self._owner)

    def drop_unfinished_before(self, moment: float) -> None:
        """Remove what was being published one by one, not by a job, when its process ended before a moment."""
        for path in _older(self._work, "ckpt_*", moment):
            shutil.rmtree(path, ignore_errors=True)

    def published_before(self, pattern: str, moment: float) -> list[str]:
        """Return the names of artifacts that match and were published before a moment, in seconds since the epoch."""
        return [self.name_of(path) for path in _older(self._artifacts, pattern, moment)]

    def uploads_before(self, moment: float) -> list[str]:
        """Return the names of uploaded files that were last written to before a moment."""
        return [path.name for path in _older(self._uploads, "*", moment)]

    def drop_upload(self, name: str) -> None:
        """Remove an uploaded file."""
        (self._uploads / name).unlink(missing_ok=True)

    def publish(self, folder: Path, name: str) -> Published:
        """Make a folder's files visible under `name`; a repeated publication of equal files changes nothing.

        Raises:
            CorruptArtifactError: if other files were published under that name.
        """
        crash_point("after-write")
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        files.pop(MANIFEST, None)
        for path in files.values():
            flush(path)
        crash_point("after-fsync")
        entries: dict[str, dict[str, Any]] = {
            key: {"sha256": sha256_file(path), "bytes": path.stat().st_size} for key, path in files.items()
        }
        (folder / MANIFEST).write_bytes(canonical_json({"version": 1, "files": entries}))
        flush(folder / MANIFEST)
        flush(folder)
        crash_point("after-manifest")
        target = self._path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        published = Published(name, sha256_of(entries), sum(int(entry["bytes"]) for entry in entries.values()))
        try:
            folder.rename(target)
        except OSError as error:  # asking first would let another worker publish it in between
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if self._manifest(target) != entries:
                raise CorruptArtifactError(f"artifact {name} exists with other content") from None
            shutil.rmtree(folder)
        flush(target.parent)
        crash_point("after-rename")
        return published

    def open(self, name: str) -> Path:
        """Return a published artifact's folder after checking that each file is there with its size.

        Raises:
            CorruptArtifactError: if it is missing or a file has another size.
        """
        folder = self._path(name)
        for key, entry in self._manifest(folder).items():
            path = folder / key
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise CorruptArtifactError(f"file {key} of {name} is missing or truncated")
        return folder

    def verify(self, name: str) -> Path:
        """Return a published artifact's folder after reading every byte of it.

        Raises:
            CorruptArtifactError: if a file does not match its checksum.
        """
        folder = self.open(name)
        for key, entry in self._manifest(folder).items():
            if sha256_file(folder / key) != entry["sha256"]:
                raise CorruptArtifactError(f"file {key} of {name} does not match its checksum")
        return folder

    def name_of(self, folder: Path) -> str:
        """Return the name of a published artifact's folder."""
        return folder.relative_to(self._artifacts).as_posix()

    def delete(self, name: str) -> None:
        """Remove an artifact; it may be gone already."""
        shutil.rmtree(self._path(name), ignore_errors=True)

    def writable(self) -> bool:
        """Return whether files can be written."""
        probe = self._work / f".probe-{secrets.token_hex(8)}"
        try:
            probe.write_bytes(b"1")
            probe.unlink()
        except OSError:
            return False
        return True

    def _path(self, name: str) -> Path:
        path = (self._artifacts / name).resolve()
        if not path.is_relative_to(self._artifacts):
            raise CorruptArtifactError("an artifact's name leaves the store")
        return path

    @staticmethod
    def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
        try:
            files: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_bytes())["files"]
        except (OSError, ValueError, KeyError) as error:
            raise CorruptArtifactError(f"the manifest of {folder.name} cannot be read") from error
        return files


def crash_point(name: str) -> None:
    """End the process here if a test asks for it, as a power cut would."""
    if os.environ.get(_CRASH_VARIABLE) == name:
        os._exit(137)


def _older(folder: Path, pattern: str, moment: float) -> list[Path]:
    """Return what matches in a folder and was not changed since a moment; others may remove some of it meanwhile."""
    found = []
    for path in sorted(folder.glob(pattern)):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < moment:
                found.append(path)
    return found

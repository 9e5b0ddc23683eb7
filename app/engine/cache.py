"""Indexes kept warm, least recently used first out, bounded by their estimated bytes."""

from collections import OrderedDict
from typing import Any

from app.storage.artifacts import ArtifactStore
from attribution_core.fit_spec import FitSpec
from attribution_core.methods.opening import AnyIndex, open_index


class IndexCache:
    """Loads indexes when they are first asked for; each file is verified against its checksum then.

    Args:
        artifacts: where they are.
        limit: bytes kept; the index in use is kept whatever its size.
        device: where models are put.
    """

    def __init__(self, artifacts: ArtifactStore, limit: int, device: str) -> None:
        self._artifacts = artifacts
        self._limit = limit
        self._device = device
        self._loaded: OrderedDict[tuple[str, str], AnyIndex] = OrderedDict()

    def get(self, artifact: str, fit: dict[str, Any]) -> AnyIndex:
        """Return a loaded index.

        Raises:
            CorruptArtifactError: if a file is missing or damaged.
            FingerprintMismatchError: if the artifact was fitted from something else.
        """
        spec = FitSpec.model_validate(fit)
        key = (artifact, spec.fingerprint())
        if key not in self._loaded:
            self._forget_deleted()
            # The index checks every file against its checksum as it loads.
            self._loaded[key] = open_index(self._artifacts.open(artifact), spec, device=self._device)
        self._loaded.move_to_end(key)
        self._evict()
        return self._loaded[key]

    def _forget_deleted(self) -> None:
        for key, index in list(self._loaded.items()):
            if not index.folder.exists():
                del self._loaded[key]

    def _evict(self) -> None:
        # Asked anew each time: an index may have grown since by what its answers needed.
        while len(self._loaded) > 1 and sum(index.bytes for index in self._loaded.values()) > self._limit:
            self._loaded.popitem(last=False)

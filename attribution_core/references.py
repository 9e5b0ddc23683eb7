"""Where checkpoints and data sets are and what they must be; free of torch."""

from pathlib import Path
from typing import Any

from pydantic import Field

from attribution_core.errors import CorruptArtifactError, FingerprintMismatchError
from attribution_core.fingerprint import sha256_file
from attribution_core.spec import DatasetSpec, Spec


class CheckpointRef(Spec):
    """Where a checkpoint's weights are and what they must be.

    Attributes:
        run: the training it was taken from.
        step: optimizer steps before it.
        learning_rate: of the last of them.
    """

    id: str
    path: Path
    sha256: str
    run: str = ""
    step: int | None = Field(default=None, ge=0)
    learning_rate: float | None = Field(default=None, ge=0)

    def verify(self) -> None:
        """Read the file and compare.

        Raises:
            CorruptArtifactError: if it is missing.
            FingerprintMismatchError: if it holds other weights.
        """
        try:
            found = sha256_file(self.path)
        except OSError as error:
            raise CorruptArtifactError(f"checkpoint {self.id} cannot be read: {error.strerror}") from error
        if found != self.sha256:
            raise FingerprintMismatchError(f"the weights of checkpoint {self.id} are not those it was registered with")


class DatasetRef(Spec):
    """Where an imported data set is and what it must be."""

    id: str
    folder: Path
    spec: DatasetSpec
    sha256: str
    num_examples: int = Field(ge=1)

    def reading(self) -> dict[str, Any]:
        """Return what decides how the stored examples are turned into inputs."""
        return self.spec.model_dump(mode="json", include={"kind", "shape", "normalize", "max_length"})

    def check_left_out(self, rows: list[int]) -> None:
        """Refuse rows that are to be left out but do not exist or do not ascend, or leave nothing.

        Raises:
            ValueError: saying so.
        """
        n = self.num_examples
        if rows != sorted(set(rows)) or (rows and not 0 <= rows[0] <= rows[-1] < n):
            raise ValueError(f"left_out must be rows below {n}, ascending")
        if len(rows) == n:
            raise ValueError("every example is left out")

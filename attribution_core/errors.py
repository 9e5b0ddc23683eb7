"""Everything the library raises on purpose; the message says what was wrong and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class AttributionError(Exception):
    """Base of the library's errors.

    Attributes:
        pointer: JSON pointer to the offending field of the caller's input, when there is one.
    """

    def __init__(self, message: str, pointer: str | None = None) -> None:
        super().__init__(message)
        self.pointer = pointer


class InvalidInputError(AttributionError):
    """The caller's data or parameters are wrong."""


@contextmanager
def located(pointer: str) -> Iterator[None]:
    """Say of wrong input that is found inside where the caller gave it, whatever place its finder supposed.

    Raises:
        InvalidInputError: with the pointer.
    """
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(str(error), pointer) from None


class CheckpointError(InvalidInputError):
    """A weights file is not valid safetensors, or does not fit its architecture."""


class UnknownArchitectureError(InvalidInputError):
    """No architecture of that name is on the allow-list."""


class ArchitectureArgumentsError(InvalidInputError):
    """The arguments do not describe a module this architecture can build."""


class SingularCurvatureError(InvalidInputError):
    """The curvature cannot be inverted without damping; use a damping above 0."""


class NotFiniteError(InvalidInputError):
    """Gradients, or what is computed from them, are too large for their type, or no numbers."""


class UnsupportedLayerError(InvalidInputError):
    """No exact gradient rule exists for what this layer does."""


class FingerprintMismatchError(AttributionError):
    """Stored results belong to other weights, data or parameters than those given."""


class ProjectionMismatchError(AttributionError):
    """This machine generates other projections than those that stored features were made with."""


class CorruptArtifactError(AttributionError):
    """A stored file is missing, truncated or does not match its checksum."""


class Cancelled(AttributionError):  # noqa: N818, named for what happened, like asyncio.CancelledError
    """The work was asked to stop; raised from a progress report."""

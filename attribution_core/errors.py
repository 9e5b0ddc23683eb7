"""Everything the library raises on purpose; the message says what was wrong and what to do."""


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


class CheckpointError(InvalidInputError):
    """A weights file is not valid safetensors, or does not fit its architecture."""


class UnknownArchitectureError(InvalidInputError):
    """No architecture of that name is on the allow-list."""


class ArchitectureArgumentsError(InvalidInputError):
    """The arguments do not describe a module this architecture can build."""


class SingularCurvatureError(InvalidInputError):
    """The curvature cannot be inverted without damping; use a damping above 0."""


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

"""Progress of a job: counted in the computing thread, written to the database by the event loop."""

import threading
import time

from attribution_core.errors import Cancelled

_SMOOTHING_SECONDS = 5.0


class JobProgress:
    """Counts finished units and carries the order to stop to the computation.

    Attributes:
        base: units finished by earlier work of the same job.
    """

    def __init__(self) -> None:
        self.base = 0
        self._done = 0
        self._stop = threading.Event()
        self._rate: float | None = None
        self._last = (time.monotonic(), 0)

    def advance(self, done: int) -> None:
        """Count `done` more units.

        Raises:
            Cancelled: if the job was told to stop, or is no longer ours.
        """
        self._done += done
        if self._stop.is_set():
            raise Cancelled("the job was stopped")

    def stop(self) -> None:
        """Make the computation stop at its next report."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """Whether the computation was told to stop."""
        return self._stop.is_set()

    def restart(self, base: int) -> None:
        """Begin a new piece of work after `base` finished units; what was finished before the first one is no work of ours."""
        if self.done == 0:
            self._last = (time.monotonic(), base)
        self.base, self._done = base, 0

    @property
    def done(self) -> int:
        """Units finished so far."""
        return self.base + self._done

    def rate(self) -> float | None:
        """Return recent units per second, smoothed; None before the first ones."""
        now, done = time.monotonic(), self.done
        seconds, more = now - self._last[0], done - self._last[1]
        if seconds >= 0.4 and more > 0:
            weight = min(1.0, seconds / _SMOOTHING_SECONDS) if self._rate is not None else 1.0
            self._rate = (1 - weight) * (self._rate or 0.0) + weight * more / seconds
            self._last = (now, done)
        return None if self._rate is None else round(self._rate, 2)

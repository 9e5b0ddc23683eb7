"""What kind of failure the database reports: that it is not there, or that rows do not allow it."""

import socket

from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

# What a database that does not answer raises; of a `DBAPIError`, `is_outage` knows more.
OUTAGE = (DBAPIError, PoolTimeout, ConnectionError, TimeoutError, socket.gaierror)
# SQLSTATE classes: connection, resources, operator intervention (shutdown, timeouts).
_OUTAGE_STATES = ("08", "53", "57")
_DUPLICATE = "23505"


def is_outage(error: BaseException) -> bool:
    """Return whether the same statement may succeed once the database is back."""
    if isinstance(error, PoolTimeout | OperationalError | InterfaceError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    return error.connection_invalidated or _state_of(error).startswith(_OUTAGE_STATES)


def is_duplicate(error: IntegrityError) -> bool:
    """Return whether a row is there already; else one that it refers to is not."""
    return _state_of(error) == _DUPLICATE


def _state_of(error: DBAPIError) -> str:
    return getattr(error.orig, "sqlstate", None) or ""

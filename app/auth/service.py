"""API keys: `hw_<26 characters of id>_<secret>`; only a hash of the secret is kept, compared in constant time.

A key that was ever made closes the service: without any, it answers this machine only.
"""

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Sequence

from fastapi import Request
from sqlalchemy.ext.asyncio import AsyncSession

from app.auth import repository
from app.auth.schemas import SCOPES, Principal, Scope
from app.db.ids import new_id
from app.db.session import SessionMaker
from app.db.tables import ApiKey
from app.errors import Forbidden, NameTaken, Unauthorized

_CACHE_SECONDS = 5.0
_LOCAL = Principal("local", "local", frozenset(SCOPES))


class KeyRing:
    """Knows the keys; answers are remembered for seconds, so a revoked key stops working that soon."""

    def __init__(self, sessions: SessionMaker) -> None:
        self._sessions = sessions
        self._known: dict[str, tuple[float, Principal | None]] = {}
        self._closed_until = 0.0

    async def needed(self) -> bool:
        """Return whether callers need a key."""
        if time.monotonic() < self._closed_until:
            return True
        async with self._sessions() as session:
            found = await repository.any_key(session)
        if found:
            self._closed_until = time.monotonic() + _CACHE_SECONDS
        return found

    async def principal(self, key: str) -> Principal | None:
        """Return who a key belongs to, None if it is not valid."""
        digest = _hashed(key)
        remembered = self._known.get(digest)
        if remembered is not None and time.monotonic() < remembered[0]:
            return remembered[1]
        found = await self._looked_up(key)
        if len(self._known) > 10_000:
            self._known.clear()
        self._known[digest] = (time.monotonic() + _CACHE_SECONDS, found)
        return found

    async def _looked_up(self, key: str) -> Principal | None:
        prefix, _, rest = key.partition("_")
        public, _, secret = rest.partition("_")
        if prefix != "hw" or not secret or not public.isalnum() or not key.isascii():
            return None
        async with self._sessions() as session:
            stored = await repository.key_by_id(session, f"key_{public}")
        if stored is None or not hmac.compare_digest(stored.secret_hash, _hashed(secret)):
            return None
        return Principal(stored.id, stored.name, frozenset(stored.scopes))


async def authenticate(keys: KeyRing, request: Request) -> Principal:
    """Return who is asking.

    Raises:
        Unauthorized: if a key is needed, and none or a wrong one was given.
        Forbidden: if there are no keys and the caller is on another machine.
    """
    if not await keys.needed():
        if request.client is None or not _is_loopback(request.client.host):
            raise Forbidden("No API keys are configured, so only this machine is answered: headwater keys create.")
        return _LOCAL
    given = request.headers.getlist("authorization")
    scheme, _, key = (given[0] if len(given) == 1 else "").partition(" ")
    principal = await keys.principal(key.strip()) if scheme.lower() == "bearer" else None
    if principal is None:
        raise Unauthorized("Send `Authorization: Bearer <key>` with a key made by `headwater keys create`.")
    return principal


async def create_key(session: AsyncSession, name: str, scopes: Sequence[Scope]) -> str:
    """Make a key and return it; it cannot be shown again.

    Raises:
        NameTaken: if a key of that name exists.
    """
    if await repository.key_by_name(session, name) is not None:
        raise NameTaken(f"There is a key {name!r} already.")
    key_id, secret = new_id("key"), secrets.token_urlsafe(32)
    session.add(ApiKey(id=key_id, name=name, secret_hash=_hashed(secret), scopes=sorted(set(scopes))))
    await session.flush()
    return f"hw_{key_id.removeprefix('key_')}_{secret}"


async def list_keys(session: AsyncSession) -> list[ApiKey]:
    """Return every key, oldest first."""
    return await repository.all_keys(session)


async def revoke_key(session: AsyncSession, name: str) -> bool:
    """Revoke a key; returns whether there was one to revoke."""
    return await repository.revoke(session, name)


async def keys_exist(session: AsyncSession) -> bool:
    """Return whether the service is closed to callers without a key."""
    return await repository.any_key(session)


def _hashed(secret: str) -> str:
    # Secrets are 256 random bits, so one fast hash is enough; there is nothing to guess.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "testclient")

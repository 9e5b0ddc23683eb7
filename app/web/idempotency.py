"""Answers that are given again to a repeated POST.

The claim of a key is a row of its own transaction; the stored answer is written in the transaction of the effect itself.
"""

import hashlib
import json
import secrets
from datetime import datetime

from fastapi import Request, Response
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.datastructures import UploadFile

from app.db.session import SessionMaker
from app.db.tables import Idempotency
from app.errors import IdempotencyInFlight, IdempotencyMismatch, InvalidRequest
from app.web.content import is_form
from app.web.uploads import parsed_form

KEPT = "24 hours"
CLAIMED = "2 minutes"
_KEPT_HEADERS = ("content-type", "location")


class IdempotencyClaim:
    """One request's hold on its key."""

    def __init__(self, sessions: SessionMaker, owner: str, key: str, request_hash: str) -> None:
        self._sessions = sessions
        self._identity = (Idempotency.owner == owner, Idempotency.key == key)
        self._values = {"owner": owner, "key": key, "request_hash": request_hash, "claim": secrets.token_hex(8)}

    async def take(self) -> Response | None:
        """Claim the key, or return the answer stored under it.

        Raises:
            IdempotencyMismatch: if the key was used with another request.
            IdempotencyInFlight: if the first request has not been answered yet.
        """
        async with self._sessions.begin() as session:
            await session.execute(delete(Idempotency).where(*self._identity, Idempotency.expires_at < func.now()))
            values = {**self._values, "expires_at": await _in_future(session, CLAIMED)}
            taken = await session.execute(
                insert(Idempotency).values(values).on_conflict_do_nothing().returning(Idempotency.key)
            )
            if taken.scalar() is not None:
                return None
            stored = (await session.execute(select(Idempotency).where(*self._identity))).scalar_one_or_none()
        if stored is None or (stored.status is None and stored.request_hash == self._values["request_hash"]):
            raise IdempotencyInFlight("The first request with this Idempotency-Key is still being answered.")
        if stored.request_hash != self._values["request_hash"]:
            raise IdempotencyMismatch("This Idempotency-Key was used with another request.")
        headers = {**(stored.headers or {}), "Idempotent-Replayed": "true"}
        return Response(stored.body, stored.status or 200, headers)

    async def keep(self, session: AsyncSession, response: Response) -> None:
        """Store the answer in the caller's transaction.

        Raises:
            IdempotencyInFlight: if the claim ran out and another request took the key meanwhile.
        """
        headers = {name: response.headers[name] for name in _KEPT_HEADERS if name in response.headers}
        kept = await session.execute(
            update(Idempotency)
            .where(*self._identity, Idempotency.claim == self._values["claim"])
            .values(
                status=response.status_code,
                headers=headers,
                body=bytes(response.body).decode(),
                expires_at=await _in_future(session, KEPT),
            )
            .returning(Idempotency.key)
        )
        if kept.scalar() is None:
            raise IdempotencyInFlight("Another request with this Idempotency-Key overtook this one.")

    async def drop(self) -> None:
        """Give the key back after a request that had no effect; an answer that is there says that it had one after all."""
        unanswered = (*self._identity, Idempotency.claim == self._values["claim"], Idempotency.status.is_(None))
        async with self._sessions.begin() as session:
            await session.execute(delete(Idempotency).where(*unanswered))


async def forget_expired(session: AsyncSession) -> None:
    """Forget answers that are not given again, and claims of processes that ended; a request may outlast its claim by a while."""
    await session.execute(delete(Idempotency).where(Idempotency.expires_at < func.now() - text("interval '1 hour'")))


async def _in_future(session: AsyncSession, interval: str) -> datetime:
    moment: datetime = (await session.execute(select(func.now() + text(f"interval '{interval}'")))).scalar_one()
    return moment


async def request_hash(request: Request) -> str:
    """Return a hash of what a request asks for; a form by its parts, because its boundary differs each time."""
    digest = hashlib.sha256(f"{request.method} {request.url.path}?{request.url.query}\n".encode())
    if is_form(request.headers):
        for name, value in (await parsed_form(request)).multi_items():
            digest.update(json.dumps([name, value if isinstance(value, str) else value.filename]).encode())
            if isinstance(value, UploadFile):
                while block := await value.read(1 << 20):
                    digest.update(block)
                await value.seek(0)
    else:
        digest.update(await request.body())
    return digest.hexdigest()


def checked_key(value: str) -> str:
    """Return a usable Idempotency-Key.

    Raises:
        InvalidRequest: if it is empty, long or not printable ASCII.
    """
    if not 1 <= len(value) <= 255 or not value.isascii() or not value.isprintable():
        raise InvalidRequest(
            "Idempotency-Key must be 1 to 255 printable ASCII characters.", pointer="/header/Idempotency-Key"
        )
    return value

"""Multipart uploads: the file spooled to disk by the parser, then moved under our own name; the JSON parts parsed strictly."""

import asyncio
import errno
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from app.errors import FieldProblem, InvalidRequest, StorageFull, UnsupportedMedia, field_problems
from app.web.content import is_form
from app.web.strict_json import parse_strictly
from attribution_core.pointers import pointer_to

_COPY_BYTES = 1 << 20
M = TypeVar("M", bound=BaseModel)


async def parsed_form(request: Request) -> FormData:
    """Return a multipart form of as many parts as any endpoint takes; the first who asks has it parsed.

    Raises:
        InvalidRequest: if it has more, or is no form.
        StorageFull: if there is no space.
    """
    with _full_storage_told():
        try:
            return await request.form(max_files=1, max_fields=4)
        except HTTPException as error:
            raise InvalidRequest(f"The form cannot be parsed: {error.detail}") from None


async def form_of(request: Request, *parts: str) -> FormData:
    """Return a multipart form that has exactly the named parts.

    Raises:
        UnsupportedMedia: if the body is not a form.
        InvalidRequest: if a part is missing, unknown or repeated.
    """
    if not is_form(request.headers):
        raise UnsupportedMedia("This endpoint takes multipart/form-data.")
    form = await parsed_form(request)
    given = [name for name, _ in form.multi_items()]
    wrong = sorted(set(given) ^ set(parts)) or [name for name in parts if given.count(name) > 1]
    if wrong:
        errors = [
            FieldProblem(pointer=pointer_to([name]), detail="missing, unknown or repeated part") for name in wrong[:10]
        ]
        raise InvalidRequest(f"The form must have exactly the parts {', '.join(parts)}.", errors)
    return form


def json_part(form: FormData, name: str, model: type[M]) -> M:
    """Return a JSON part as a model.

    Raises:
        InvalidRequest: with a pointer to each field that is wrong.
    """
    value = form[name]
    if not isinstance(value, str):
        raise InvalidRequest(f"The part {name} must be JSON text, not a file.", pointer=f"/{name}")
    return validated(model, parse_strictly(value.encode("utf-8", "surrogatepass"), (name,)), (name,))


def validated(model: type[M], value: object, at: tuple[str, ...] = ()) -> M:
    """Return a value as a model.

    Raises:
        InvalidRequest: with a pointer to each field that is wrong.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        errors = field_problems(error.errors(include_url=False, include_context=False), value, at)
        raise InvalidRequest.of_fields(errors) from None


@asynccontextmanager
async def saved_file(form: FormData, folder: Path) -> AsyncIterator[tuple[Path, str]]:
    """Write the part `file` durably into a folder; yields its path and the client's name for it.

    The file is removed at the end unless it was moved away.

    Raises:
        InvalidRequest: if the part is not a file.
        StorageFull: if there is no space.
    """
    upload = form["file"]
    if not isinstance(upload, UploadFile):
        raise InvalidRequest("The part file must be a file.", pointer="/file")
    path = folder / f"{secrets.token_hex(16)}.upload"
    try:
        with _full_storage_told():
            await asyncio.to_thread(_copy, upload, path)
            yield path, upload.filename or ""
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _full_storage_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise StorageFull("There is no space left for this upload.") from None
        raise


def _copy(upload: UploadFile, path: Path) -> None:
    upload.file.seek(0)
    with path.open("wb") as out:
        shutil.copyfileobj(upload.file, out, _COPY_BYTES)
        out.flush()
        os.fsync(out.fileno())

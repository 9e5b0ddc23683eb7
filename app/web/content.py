"""What a body is said to be, whatever the case and the parameters of its Content-Type."""

from starlette.datastructures import Headers


def is_form(headers: Headers) -> bool:
    """Return whether a body is said to be a multipart form."""
    return _media_type(headers) == "multipart/form-data"


def is_json(headers: Headers) -> bool:
    """Return whether a body is said to be JSON, of whatever kind, or said to be nothing."""
    kind = _media_type(headers)
    return kind in ("", "application/json") or (kind.startswith("application/") and kind.endswith("+json"))


def _media_type(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()

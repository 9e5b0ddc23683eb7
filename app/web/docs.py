"""Swagger UI and ReDoc, served from this package: the pages ask no other host for anything."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

STATIC = Path(__file__).parent / "static"
# Both libraries set styles from scripts and draw icons from data URLs; ReDoc searches in a worker made from a blob.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Headwater API</title>
<link rel="icon" href="data:,">
{head}
<script src="/static/docs.js" defer></script>
</head>
<body style="margin: 0"><div id="{element}"></div></body>
</html>
"""
_SWAGGER = _PAGE.format(
    head='<link rel="stylesheet" href="/static/swagger-ui.css">\n<script src="/static/swagger-ui-bundle.js" defer></script>',
    element="swagger-ui",
)
_REDOC = _PAGE.format(head='<script src="/static/redoc.standalone.js" defer></script>', element="redoc")
router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def swagger_ui() -> HTMLResponse:
    """Show the API with forms to try it."""
    return HTMLResponse(_SWAGGER, headers={"Content-Security-Policy": _POLICY})


@router.get("/redoc")
async def redoc() -> HTMLResponse:
    """Show the API for reading."""
    return HTMLResponse(_REDOC, headers={"Content-Security-Policy": _POLICY})

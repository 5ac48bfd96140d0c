"""HTML pages: /, the page to see and learn convolutions, and /docs, Swagger UI; their files, icon and /openapi.json."""

from functools import lru_cache
from pathlib import Path

import fastapi_offline
import orjson
from fastapi import APIRouter, FastAPI, Request
from starlette.responses import RedirectResponse, Response

from service.assets import respond_with_content, respond_with_file
from service.middleware.auth import DOCS_ASSETS_PATH

router = APIRouter(include_in_schema=False)

FAVICON = (Path(__file__).parent / "favicon.ico").read_bytes()

PLAYGROUND_FOLDER = Path(__file__).parents[1] / "playground" / "static"

DOCS_FOLDER = Path(__file__).parents[1] / "swagger"
"""Folder of the page /docs, which loads Swagger UI, and of the script and the style that it adds."""

SWAGGER_UI_FOLDER = Path(fastapi_offline.__file__).parent / "static"

PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    # RFC 8631: programs that request the address of the service find its description.
    "Link": '<openapi.json>; rel="service-desc", <docs>; rel="service-doc"',
}


@router.get("/")
async def playground(request: Request) -> Response:
    """Return the page, whatever the client accepts; its links are relative, so that it works below any prefix."""
    root = request.scope.get("root_path", "").encode()
    if root and request.scope.get("raw_path") == root:
        # Relative links need the slash at the end of the prefix.
        return RedirectResponse(f"{root.decode()}/")
    content = (PLAYGROUND_FOLDER / "index.html").read_bytes()
    return await respond_with_content(request, content, ".html", PAGE_HEADERS)


@router.get("/page/{name:path}")
async def playground_file(request: Request, name: str) -> Response:
    """Return a file that the page loads."""
    return await respond_with_file(request, PLAYGROUND_FOLDER, name)


@router.get("/favicon.ico")
async def favicon() -> Response:
    """Return the icon that browsers show next to the title of a page."""
    return Response(FAVICON, media_type="image/x-icon", headers={"Cache-Control": "max-age=86400"})


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Return Swagger UI; its links are relative."""
    return await respond_with_content(request, (DOCS_FOLDER / "docs.html").read_bytes(), ".html", PAGE_HEADERS)


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """Return the OpenAPI description; FastAPI's own route encodes it for every request."""
    content = _encode_description(request.app, request.scope.get("root_path", "").rstrip("/"))
    return await respond_with_content(request, content, ".json", {})


@lru_cache(maxsize=8)
def _encode_description(app: FastAPI, prefix: str) -> bytes:
    servers = {"servers": [{"url": prefix}]} if prefix else {}
    return orjson.dumps({**app.openapi(), **servers})


@router.get(DOCS_ASSETS_PATH + "/corr2d/{name}")
async def docs_file(request: Request, name: str) -> Response:
    """Return the script or the style that corr2d adds to Swagger UI."""
    return await respond_with_file(request, DOCS_FOLDER, name)


@router.get(DOCS_ASSETS_PATH + "/{name:path}")
async def swagger_ui_file(request: Request, name: str) -> Response:
    """Return a file of Swagger UI."""
    return await respond_with_file(request, SWAGGER_UI_FOLDER, name)

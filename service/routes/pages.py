"""HTML pages: /, the page to see and learn convolutions, and /docs, Swagger UI; their files and their icon."""

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from service.assets import respond_with_content, respond_with_file
from service.middleware.auth import DOCS_ASSETS_PATH

router = APIRouter(include_in_schema=False)


class DocsAssets(StaticFiles):
    """Static files of /docs, without range requests: Starlette responds to an invalid Range in plain text."""

    def __init__(self) -> None:
        super().__init__(packages=[("fastapi_offline", "static")])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request and ignore its Range header, as RFC 9110, 14.2 allows."""
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)


INLINE_SCRIPT_PATTERN = re.compile(rb"<script>(.*?)</script>", re.DOTALL)

FAVICON = (Path(__file__).parent / "favicon.ico").read_bytes()

PLAYGROUND_FOLDER = Path(__file__).parents[1] / "playground" / "static"

PLAYGROUND_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    # RFC 8631: programs that request the address of the service find its description.
    "Link": '<openapi.json>; rel="service-desc", <docs>; rel="service-doc"',
}

SWAGGER_UI_PARAMETERS = {"defaultModelsExpandDepth": 0, "tryItOutEnabled": True}


@router.get("/")
async def playground(request: Request) -> Response:
    """Return the page, whatever the client accepts; its links are relative, so that it works below any prefix."""
    root = request.scope.get("root_path", "").encode()
    if root and request.scope.get("raw_path") == root:
        # Relative links need the slash at the end of the prefix.
        return RedirectResponse(f"{root.decode()}/")
    content = (PLAYGROUND_FOLDER / "index.html").read_bytes()
    return respond_with_content(request, content, ".html", PLAYGROUND_HEADERS)


@router.get("/page/{name:path}")
async def playground_file(request: Request, name: str) -> Response:
    """Return a file that the page loads."""
    return respond_with_file(request, PLAYGROUND_FOLDER, name)


@router.get("/favicon.ico")
async def favicon() -> Response:
    """Return the icon that browsers show next to the title of a page."""
    return Response(FAVICON, media_type="image/x-icon", headers={"Cache-Control": "max-age=86400"})


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """Return Swagger UI, with a content security policy that limits it to resources of the service."""
    root = request.scope.get("root_path", "")
    page = get_swagger_ui_html(
        openapi_url=f"{root}{request.app.openapi_url}",
        title=f"{request.app.title} - Swagger UI",
        swagger_js_url=f"{root}{DOCS_ASSETS_PATH}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{DOCS_ASSETS_PATH}/swagger-ui.css",
        swagger_favicon_url=f"{root}/favicon.ico",
        swagger_ui_parameters=SWAGGER_UI_PARAMETERS,
    )
    scripts = " ".join(f"'sha256-{_hash_script(script)}'" for script in INLINE_SCRIPT_PATTERN.findall(page.body))
    page.headers["Content-Security-Policy"] = (
        f"default-src 'none'; script-src 'self' {scripts}; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page


def _hash_script(script: bytes) -> str:
    return b64encode(sha256(script).digest()).decode()

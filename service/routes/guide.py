"""GET /guide: the documentation as HTML pages, which work offline."""

from http import HTTPStatus
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service.assets import respond_with_content, respond_with_file
from service.guide import pages

router = APIRouter(include_in_schema=False)

STYLESHEET = "guide.css"

GUIDE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
}


@router.get("/guide")
async def guide(request: Request) -> Response:
    """Return the index of the documentation."""
    return await respond_with_content(request, pages.render_page(pages.INDEX), ".html", GUIDE_HEADERS)


@router.get("/guide/{name:path}")
async def guide_page(request: Request, name: str) -> Response:
    """Return a page of the documentation, its stylesheet, or one of its images."""
    if name == STYLESHEET:
        return await respond_with_file(request, Path(pages.__file__).parent, name)
    if name.startswith("images/"):
        return await respond_with_file(request, pages.DOCS_FOLDER, name)
    if name == pages.INDEX or name not in pages.list_pages():
        raise HTTPException(HTTPStatus.NOT_FOUND)
    return await respond_with_content(request, pages.render_page(name), ".html", GUIDE_HEADERS)

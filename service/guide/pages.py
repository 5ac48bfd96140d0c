"""The pages of docs/ as HTML: Markdown with tables, anchors at headings, and links between the pages."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from string import Template

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.anchors import anchors_plugin

DOCS_FOLDER = Path(__file__).parents[2] / "docs"
"""Folder of the Markdown files; in the wheel it is inside the package `corr2d`, like `service`."""

INDEX = "README"
"""Name of the page at /guide. All others are below it, without the suffix."""

TEMPLATE = Template(Path(__file__).with_name("page.html").read_text("utf-8"))

PAGE_LINK_PATTERN = re.compile(r"([\w-]+)\.md(#.*)?")
INDEX_LINK_PATTERN = re.compile(r"\(([\w-]+)\.md\)")
TITLE_PATTERN = re.compile(r"^# (.+)$", re.MULTILINE)


@lru_cache(maxsize=1)
def list_pages() -> dict[str, str]:
    """Return the titles of all pages by name, in the order of the table in the index."""
    order = [INDEX, *INDEX_LINK_PATTERN.findall((DOCS_FOLDER / f"{INDEX}.md").read_text("utf-8"))]
    return {name: _find_title((DOCS_FOLDER / f"{name}.md").read_text("utf-8")) for name in order}


def render_page(name: str) -> bytes:
    """Return one of the pages of `list_pages` as HTML."""
    return _render(name, (DOCS_FOLDER / f"{name}.md").read_text("utf-8"))


@lru_cache(maxsize=32)
def _render(name: str, text: str) -> bytes:
    folder = "guide/" if name == INDEX else ""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").use(anchors_plugin, max_level=4)
    tokens = parser.parse(text)
    for token in tokens:
        _move_alignment_to_class(token)
        _rewrite_links(token.children or (), folder)
    marks = {name: ' aria-current="page"'}
    navigation = "\n".join(
        f'<li><a href="{_get_address(page, folder)}"{marks.get(page, "")}>{escape(title)}</a></li>'
        for page, title in list_pages().items()
    )
    content = parser.renderer.render(tokens, parser.options, {}).replace("<pre>", '<pre tabindex="0">')
    page = TEMPLATE.substitute(
        title=escape(_find_title(text)),
        home="./" if name == INDEX else "../",
        root="" if name == INDEX else "../",
        folder=folder,
        navigation=navigation,
        content=content,
    )
    return page.encode()


def _find_title(text: str) -> str:
    found = TITLE_PATTERN.search(text)
    return found[1] if found else "Documentation"


def _get_address(name: str, folder: str) -> str:
    """Return the relative address of a page; `folder` leads from the current page to the folder of the others."""
    if name == INDEX:
        return "guide" if folder else "../guide"
    return folder + name


def _move_alignment_to_class(token: Token) -> None:
    """Replace the inline style of aligned table cells, which the Content-Security-Policy forbids, by a class."""
    style = token.attrs.pop("style", None)
    if style is not None:
        token.attrSet("class", str(style).rpartition(":")[2])


def _rewrite_links(tokens: Sequence[Token], folder: str) -> None:
    """Change the links and images to addresses below /guide; links to other files of the repository become text."""
    for token, closing in _pair_links(tokens):
        target = str(token.attrGet("href"))
        page = PAGE_LINK_PATTERN.fullmatch(target)
        if page and page[1] in list_pages():
            token.attrSet("href", _get_address(page[1], folder) + (page[2] or ""))
        elif not target.startswith(("https://", "#")):
            token.tag = closing.tag = "span"
            token.attrs = {"title": f"{target.removeprefix('../')} in the repository"}
    for token in tokens:
        if token.type == "image":
            token.attrSet("src", f"{folder}{token.attrGet('src')}")


def _pair_links(tokens: Sequence[Token]) -> Iterable[tuple[Token, Token]]:
    """Return the opening and closing tokens of links, which cannot be nested."""
    kinds = ("link_open", "link_close")
    opening, closing = ([token for token in tokens if token.type == kind] for kind in kinds)
    return zip(opening, closing, strict=True)

"""Tests of the documentation as HTML pages."""

import re
from html.parser import HTMLParser
from urllib.parse import urljoin

import pytest

from service.guide.pages import INDEX, list_pages
from tests.problem_details import assert_problem
from tests.servers import SendFn

PATHS = ["/guide", *(f"/guide/{name}" for name in list_pages() if name != INDEX)]


class PageReader(HTMLParser):
    """Reader of the addresses, anchors and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del tag
        values = dict(attrs)
        self.attributes |= values.keys()
        self.anchors.add(values.get("id") or "")
        self.links += [value for name, value in attrs if name in ("href", "src") and value is not None]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read_page(send: SendFn, path: str) -> PageReader:
    response = send("GET", path)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    return PageReader(response.text)


@pytest.mark.parametrize("path", PATHS)
def test_links_lead_to_pages_anchors_and_images(send_in_process: SendFn, path: str) -> None:
    page = read_page(send_in_process, path)
    assert len(page.links) > len(PATHS)
    for link in page.links:
        if link.startswith("https://"):
            continue
        target, _, anchor = urljoin(path, link).partition("#")
        assert target.startswith(("/guide", "/docs", "/favicon.ico")) or target == "/", link
        response = send_in_process("GET", target)
        assert response.status_code == 200, link
        assert not anchor or anchor in PageReader(response.text).anchors, link


@pytest.mark.parametrize("path", PATHS)
def test_policy_allows_no_script_and_no_inline_style(send_in_process: SendFn, path: str) -> None:
    policy = send_in_process("GET", path).headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'self'; img-src 'self'; ")
    assert not {name for name in read_page(send_in_process, path).attributes if name == "style" or name[:2] == "on"}


def test_tables_and_code_are_rendered(send: SendFn) -> None:
    page = send("GET", "/guide/http-api").text
    assert "<td><code>GET /kernels</code></td>" in page
    assert '<pre tabindex="0"><code class="language-sh">curl ' in page
    assert '<h2 id="endpoints"' in page


def test_links_to_other_files_of_the_repository_are_text(send: SendFn) -> None:
    page = send("GET", "/guide/monitoring").text
    assert re.search(r'<span title="monitoring/alerts\.yml in the repository">', page)
    assert "../monitoring/" not in page


def test_unchanged_page_is_304(send: SendFn) -> None:
    tag = send("GET", "/guide/modes").headers["etag"]
    assert send("GET", "/guide/modes", headers={"If-None-Match": tag}).status_code == 304
    assert send("GET", "/guide/formats", headers={"If-None-Match": tag}).status_code == 200


@pytest.mark.parametrize(
    "name", ["nothing", "README", "", "formats.md", "images", "images/", "images/pictures.py", "x/y"]
)
def test_other_names_are_404(send: SendFn, name: str) -> None:
    assert send("GET", f"/guide/{name}").status_code == 404


def test_unknown_page_is_a_problem(send: SendFn) -> None:
    assert_problem(send("GET", "/guide/nothing"), 404)

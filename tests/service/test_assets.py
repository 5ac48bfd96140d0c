"""Tests of the responses with files that browsers load."""

import gzip
from pathlib import Path

import pytest

from service.codecs.zstandard import zstd
from service.routes import pages
from tests.problem_details import assert_problem
from tests.servers import SendFn

pytestmark = pytest.mark.own_server("changes the folder of the files in the process of the test")

TEXT = "export const text = 'ä';\n" * 200


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder whose files are served below /page/."""
    folder = tmp_path / "static"
    (folder / "vendor").mkdir(parents=True)
    (folder / "code.js").write_text(TEXT, "utf-8")
    (folder / "vendor" / "signals-1.14.5.js").write_text(TEXT, "utf-8")
    (folder / "notes").write_text("a file without a suffix")
    (folder / ".hidden.js").write_text("hidden")
    (folder / "photo.png").write_bytes(bytes(5000))
    (tmp_path / "outside.js").write_text("outside")
    monkeypatch.setattr(pages, "PLAYGROUND_FOLDER", folder)
    return folder


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("coding", ["gzip", "zstd", None])
def test_text_is_compressed_as_accepted(send: SendFn, coding: str | None) -> None:
    response = send("GET", "/page/code.js", headers={"Accept-Encoding": coding or "identity"})
    assert response.status_code == 200
    assert response.headers.get("content-encoding") == coding
    assert response.headers["content-type"] == "text/javascript; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["vary"] == "Accept-Encoding"
    assert response.headers["x-content-type-options"] == "nosniff"
    size = {"gzip": len(gzip.compress(TEXT.encode())), "zstd": len(zstd.compress(TEXT.encode())), None: len(TEXT) + 200}
    assert int(response.headers["content-length"]) == pytest.approx(size[coding], rel=0.3)
    assert coding == "zstd" or response.text == TEXT  # this httpx may not decode zstd


@pytest.mark.usefixtures("folder")
def test_each_coding_has_its_own_entity_tag(send: SendFn) -> None:
    accepted = ("gzip", "zstd", "identity")
    tags = {send("GET", "/page/code.js", headers={"Accept-Encoding": coding}).headers["etag"] for coding in accepted}
    assert len(tags) == 3


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}', 'W/"other",W/{}', "*"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_unchanged_file_is_304(send: SendFn, form: str, method: str) -> None:
    first = send("GET", "/page/code.js")
    headers = {"If-None-Match": form.format(first.headers["etag"])}
    response = send(method, "/page/code.js", headers=headers)
    assert (response.status_code, response.content) == (304, b"")
    for name in ("etag", "cache-control", "vary", "content-security-policy"):
        assert response.headers[name] == first.headers[name]


def test_changed_file_is_sent_again(send: SendFn, folder: Path) -> None:
    headers = {"If-None-Match": send("GET", "/page/code.js").headers["etag"]}
    (folder / "code.js").write_text("changed")
    assert send("GET", "/page/code.js", headers=headers).text == "changed"
    headers = {"If-None-Match": '"other", x"'}
    assert send("GET", "/page/code.js", headers=headers).status_code == 200


@pytest.mark.usefixtures("folder")
def test_file_with_a_version_is_immutable(send: SendFn) -> None:
    response = send("GET", "/page/vendor/signals-1.14.5.js")
    assert response.headers["cache-control"] == "public, max-age=31536000, immutable"


@pytest.mark.usefixtures("folder")
def test_image_is_not_compressed(send: SendFn) -> None:
    response = send("GET", "/page/photo.png", headers={"Accept-Encoding": "gzip"})
    assert (response.headers["content-type"], response.content) == ("image/png", bytes(5000))
    assert "content-encoding" not in response.headers


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "name",
    [
        "",
        "nothing.js",
        "notes",
        ".hidden.js",
        "vendor",
        "vendor/",
        "vendor//signals-1.14.5.js",
        "%2e/code.js",
        "%2e%2e/outside.js",
        "vendor/..%2fcode.js",
        "%2fetc/passwd.txt",
        "code.js%00",
        "code.js/x.js",
        "x" * 5000 + ".js",
    ],
)
def test_other_names_are_404(send: SendFn, name: str) -> None:
    assert_problem(send("GET", f"/page/{name}"), 404)


@pytest.mark.usefixtures("folder")
def test_other_methods_are_405(send: SendFn) -> None:
    response = send("POST", "/page/code.js")
    assert_problem(response, 405)
    assert response.headers["allow"] == "GET, HEAD"


@pytest.mark.usefixtures("folder")
def test_oversized_accept_encoding_is_431(send: SendFn) -> None:
    assert_problem(send("GET", "/page/code.js", headers={"Accept-Encoding": "gzip," * 300}), 431)

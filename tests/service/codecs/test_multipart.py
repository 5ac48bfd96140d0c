"""Tests of the multipart/form-data parser against httpx, which writes forms, and Python's email parser."""

import email
import email.policy
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.codecs import multipart
from service.codecs.multipart import Form, parse
from service.errors import InvalidRequest, NotParseable
from tests.service.codecs.strategies import assert_decode_rejected, assert_single_error


def build_form(fields: dict[str, str], *files: tuple[str, tuple[str, bytes, str]]) -> bytes:
    return httpx.Request("POST", "http://service", data=fields, files=list(files)).read()


def build_parts(*parts: tuple[bytes, bytes]) -> bytes:
    """Return a form of parts with these headers and contents."""
    return b"".join(b"--b\r\n" + headers + b"\r\n\r\n" + data + b"\r\n" for headers, data in parts) + b"--b--\r\n"


def parse_form(content: bytes, _: int = 0) -> Form:
    return parse(content, lambda: None)


def name_field(name: str) -> bytes:
    return f'Content-Disposition: form-data; name="{name}"'.encode()


NEAR_BOUNDARIES = st.lists(
    st.sampled_from([b"\r", b"\n", b"\r\n", b"--", b"-", b"\r\n--", b"\r\n--b", b"b", b"x", b"\0"]), max_size=30
).map(b"".join)


@given(content=st.binary(max_size=300) | NEAR_BOUNDARIES, chunk=st.integers(1, 60))
def test_file_is_a_view_of_the_body_whatever_the_chunks(content: bytes, chunk: int) -> None:
    # Longer than any boundary in the content.
    body = (
        b"--bbbbb\r\nContent-Disposition: form-data; name=input; filename=a\r\nContent-Type: image/png\r\n\r\n"
        + content
        + b"\r\n--bbbbb--\r\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multipart, "CHUNK_BYTES", chunk)
        file = parse_form(body).file
    assert file is not None
    assert file[:2] == ("input", "image/png")
    assert bytes(file.content) == content
    assert file.content.obj is body


@given(
    fields=st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1), st.text(min_size=1), max_size=4),
    name=st.sampled_from(["input", "an image", 'quo"ted', "ünï"]),
)
def test_forms_of_httpx_are_read(fields: dict[str, str], name: str) -> None:
    try:
        body = build_form(fields, (name, ("a.png", b"content", "image/png")))
    except UnicodeEncodeError:
        return
    form = parse_form(body)
    assert list(form.fields.values()) == list(fields.values())
    assert form.file is not None
    assert (form.file.media_type, bytes(form.file.content)) == ("image/png", b"content")
    message: Any = email.message_from_bytes(
        b"Content-Type: multipart/form-data; boundary=" + body[2 : body.index(b"\r\n")] + b"\r\n\r\n" + body,
        policy=email.policy.HTTP,
    )
    assert len(message.get_payload()) == len(fields) + 1


def test_blank_fields_and_unselected_files_are_ignored() -> None:
    unselected = b'Content-Disposition: form-data; name="input"; filename=""\r\nContent-Type: application/octet-stream'
    form = parse_form(build_parts((name_field("mode"), b""), (name_field("kernel"), b"box(3)"), (unselected, b"")))
    assert form == Form({"kernel": "box(3)"}, None)


FILE = b'Content-Disposition: form-data; name="input"; filename="a.npy"'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is empty"),
        (b"{}", "is not multipart/form-data: it must begin with --"),
        (b"--" + b"b" * 100 + b"\r\n", "the boundary of at most 70 bytes"),
        (b"--b\r\n", "is cut off after 5 bytes"),
        (build_parts((name_field("a"), b"1"))[:-4], "is cut off"),
        (build_parts((b"Content-Type: image/png", b"1")), "part 1 of the multipart body has no Content-Disposition"),
        (build_parts((b"Content-Disposition: attachment; name=a", b"1")), "no Content-Disposition: form-data"),
        (build_parts((b"Content-Disposition: form-data", b"1")), "with a name"),
        (build_parts((name_field("a"), b"\xff")), "the field 'a' of the form is not UTF-8"),
        (build_parts((b"no colon", b"1")), "the multipart body is damaged"),
        (build_parts((name_field("a") + b"\r\nX: " + b"x" * 2100, b"1")), "the multipart body is damaged"),
        (build_parts((name_field("a") + b"\r\nX: y" * 5, b"1")), "the multipart body is damaged"),
        (build_parts(*[(name_field(f"a{at}"), b"1") for at in range(102)]), "more than 101 parts"),
        (build_parts((name_field("a"), b"1" * 65_537)), "text fields of more than 65,536 bytes"),
        (build_parts(*[(name_field(f"a{at}"), b"1" * 33_000) for at in range(2)]), "more than 65,536 bytes"),
    ],
)
def test_damaged_and_oversized_forms_are_rejected(content: bytes, message: str) -> None:
    error = assert_decode_rejected(parse_form, content)
    assert isinstance(error, NotParseable)
    assert message in error.detail


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([(FILE, b"1"), (FILE.replace(b"input", b"kernel"), b"2")], "has the files 'input' and 'kernel'"),
        ([(name_field("mode"), b"same"), (name_field("mode"), b"full")], "has the field 'mode' twice: send it once"),
    ],
)
def test_repeated_parts_are_rejected(parts: list[tuple[bytes, bytes]], message: str) -> None:
    error = assert_decode_rejected(parse_form, build_parts(*parts))
    assert isinstance(error, InvalidRequest)
    assert message in assert_single_error(error).message


def test_truncation_anywhere_is_rejected() -> None:
    content = build_parts((name_field("mode"), b"same"), (FILE, b"\r\n--content"))
    assert content.endswith(b"--b--\r\n")
    for end in range(len(content) - len(b"\r\n")):
        assert isinstance(assert_decode_rejected(parse_form, content[:end]), NotParseable)

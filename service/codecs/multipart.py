"""multipart/form-data (RFC 7578), as HTML forms send it: text fields, and at most one file."""

import logging
from typing import NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.codecs.decode_limits import DecodeCheck
from service.codecs.header_checks import quote_name, truncate_name
from service.errors import FieldError, InvalidRequest, NotParseable

MEDIA_TYPE = "multipart/form-data"

MAX_BOUNDARY_BYTES = 70
MAX_PARTS = 101
"""Maximum number of parts: a file, and as many options as a query string may have."""

MAX_PART_HEADERS, MAX_PART_HEADER_BYTES = 4, 2048
"""Maximum number of headers of a part, and bytes of one of them."""

MAX_FIELD_BYTES = 65_536
"""Maximum bytes of all text fields together."""

CHUNK_BYTES = 1 << 18
"""Bytes that are parsed at a time; between them, a deadline can stop the parser."""

INSPECTED_BYTES = 8192
"""Bytes in which the file is looked for to predict its decoding time."""

# Its warnings repeat what clients send.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


class FilePart(NamedTuple):
    """File of a form: the name of its part, its media type as sent, and its content, a view of the body."""

    name: str
    media_type: str
    content: memoryview


class Form(NamedTuple):
    """Text fields by name, without those that are blank, and the file, if there is one."""

    fields: dict[str, str]
    file: FilePart | None


def parse(body: bytes | bytearray | memoryview, check: DecodeCheck) -> Form:
    """Return the form. Raises NotParseable, and InvalidRequest for a second file or field of the same name."""
    memory = memoryview(body)
    parser = _FormParser(memory)
    for start in range(0, len(memory), CHUNK_BYTES):
        check()
        parser.feed(start, CHUNK_BYTES)
    return parser.finish()


def find_file(body: bytes | bytearray | memoryview) -> FilePart | None:
    """Return the file if it begins near the beginning of the body; its content is the rest of the body."""
    memory = memoryview(body)
    try:
        parser = _FormParser(memory)
        parser.feed(0, INSPECTED_BYTES)
    except (NotParseable, InvalidRequest):
        return None
    return parser.get_open_file()


class _FormParser:
    """Parser of a body in pieces; python-multipart finds the parts, whose contents stay in the body."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._chunk, self._chunk_start = b"", 0
        self._header = b""
        self._headers: dict[bytes, bytes] = {}
        self._value = b""
        self._name, self._filename, self._media_type = "", "", ""
        self._is_file = False
        self._start, self._size = -1, 0
        self._parts = self._field_bytes = 0
        self._fields: dict[str, str] = {}
        self._file: FilePart | None = None
        self._is_complete = False
        first_line = bytes(memory[: MAX_BOUNDARY_BYTES + 4]).partition(b"\r\n")
        if not first_line[0].startswith(b"--") or not first_line[1]:
            raise NotParseable(
                "the body is not multipart/form-data: it must begin with --, the boundary of at most "
                f"{MAX_BOUNDARY_BYTES} bytes, and a line break"
                if memory
                else "the body is empty: it must be multipart/form-data"
            )
        self._parser = MultipartParser(
            first_line[0][2:],
            {
                "on_part_begin": self._begin_part,
                "on_part_data": self._add_data,
                "on_part_end": self._end_part,
                "on_header_begin": self._begin_header,
                "on_header_field": self._add_header_name,
                "on_header_value": self._add_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_end": self._end,
            },
            max_header_count=MAX_PART_HEADERS,
            max_header_size=MAX_PART_HEADER_BYTES,
        )

    def feed(self, start: int, size: int) -> None:
        """Parse the next bytes of the body."""
        self._chunk, self._chunk_start = bytes(self._memory[start : start + size]), start
        try:
            self._parser.write(self._chunk)
        except FormParserError as error:
            raise NotParseable(f"the multipart body is damaged: {error}") from error

    def finish(self) -> Form:
        """Return the form. Raises NotParseable if its last boundary is missing."""
        if not self._is_complete:
            raise NotParseable(f"the multipart body is cut off after {len(self._memory):,} bytes")
        return Form(self._fields, self._file)

    def get_open_file(self) -> FilePart | None:
        """Return the file that has begun."""
        if self._file is None and self._is_file and self._start >= 0:
            return FilePart(self._name, self._media_type, self._memory[self._start :])
        return self._file

    def _begin_part(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise NotParseable(f"the multipart body has more than {MAX_PARTS} parts: a file and its options")
        self._headers = {}
        self._start, self._size = -1, 0

    def _begin_header(self) -> None:
        self._header = self._value = b""

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header.lower()] = self._value

    def _end_headers(self) -> None:
        disposition, parameters = parse_options_header(self._headers.get(b"content-disposition", b""))
        if disposition != b"form-data" or not parameters.get(b"name"):
            raise NotParseable(
                f"part {self._parts} of the multipart body has no Content-Disposition: form-data with a name"
            )
        self._name = parameters[b"name"].decode("utf-8", "replace")
        self._is_file = b"filename" in parameters
        self._filename = parameters.get(b"filename", b"").decode("utf-8", "replace")
        media_type, _ = parse_options_header(self._headers.get(b"content-type", b""))
        self._media_type = media_type.decode("latin-1")

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._start < 0:
            # A part of what could have been a boundary, up to the beginning of the chunk, is passed on its own.
            self._start = self._chunk_start + (start if data is self._chunk else start - end)
        self._size += end - start
        if not self._is_file:
            self._field_bytes += end - start
            if self._field_bytes > MAX_FIELD_BYTES:
                raise NotParseable(
                    f"the multipart body has text fields of more than {MAX_FIELD_BYTES:,} bytes: send large arrays as "
                    "the file"
                )

    def _end_part(self) -> None:
        content = self._memory[self._start : self._start + self._size] if self._size else self._memory[:0]
        # A browser sends a file that was not selected as an empty one without a name.
        if self._is_file and (self._size or self._filename):
            if self._file is not None:
                first, second = truncate_name(self._file.name), truncate_name(self._name)
                message = f"the form has the files {first!r} and {second!r}: send one file, and arrays by name as npz"
                raise InvalidRequest(message, errors=[FieldError(second, message, "2 files", "1 file")])
            self._file = FilePart(self._name, self._media_type, content)
        elif not self._is_file and self._size:
            if self._name in self._fields:
                message = f"the form has the field {quote_name(self._name)} twice: send it once"
                raise InvalidRequest(message, errors=[FieldError(truncate_name(self._name), message, "twice", "once")])
            try:
                self._fields[self._name] = str(content, "utf-8")
            except UnicodeDecodeError as error:
                raise NotParseable(f"the field {quote_name(self._name)} of the form is not UTF-8: {error}") from error

    def _end(self) -> None:
        self._is_complete = True

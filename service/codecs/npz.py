"""numpy's .npz files: zip archives of .npy files, one for each array.

They are read without zipfile, which creates an object for every entry before their number is known (a body of 64 MB
can have a million) and copies the data. Only unambiguous archives are accepted: the directory is directly before the
end record, the end record is at the very end, and both headers of a member agree.
"""

import struct
import zlib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.codecs import npy
from service.codecs.decode_limits import DecodeCheck, check_size, no_check, raise_if_out_of_memory
from service.codecs.header_checks import quote_name, truncate_name
from service.codecs.inflate import inflate
from service.codecs.signatures import format_mismatch_error
from service.errors import NotAcceptable, NotParseable

MEDIA_TYPE = "application/x-npz"

MAX_ARCHIVE_MEMBERS = 64
NPY_SUFFIX = ".npy"
ALIGNMENT_BYTES = 64
"""Alignment of a .npy file in the archive, so that its numbers, 64 or 128 bytes further on, can be used in place."""

MAX_ARCHIVE_BYTES = 2**32 - 2**20
"""Limit of zip without its 64-bit extension, which no body needs, minus space for a directory."""

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
END_RECORD = struct.Struct("<4s4H2IH")
LOCAL_SIGNATURE, CENTRAL_SIGNATURE, END_SIGNATURE = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"

METHOD_STORED, METHOD_DEFLATED = 0, 8
FLAG_DEFLATE_OPTIONS, FLAG_SIZES_FOLLOW, FLAG_UTF8 = 6, 8, 2048
ZIP64_SIZE_MARK = 2**32 - 1
"""Value that marks a size as stored elsewhere; numpy writes it into every local header."""

ZIP_VERSION = 20
DOS_DATE_1980_01_01 = 33
"""First date that a zip archive can store; a fixed date makes equal arrays give equal bytes."""

PADDING_FIELD = struct.Struct("<3H")
PADDING_ID = 0xD935
"""ID of the extra field with which Android's zipalign pads; readers skip it."""

MAX_DEFLATE_RATIO = 1032
"""Maximum bytes that deflate makes from one: 258 from two bits."""


class Member(NamedTuple):
    """Entry of the directory."""

    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    offset: int

    @property
    def file(self) -> str:
        """Quoted name, for messages."""
        return quote_name(self.name.decode("utf-8", "replace"))


def decode(
    content: bytes | bytearray | memoryview, limit: int, check: DecodeCheck = no_check
) -> dict[str, NDArray[Any]]:
    """Return the arrays by name; those of stored members are views of the content if npy.decode can make them so.

    `limit` is the maximum number of bytes of all members together, .npy headers included.
    """
    memory = memoryview(content)
    members, end = _parse_directory(memory)
    check_size(sum(member.size for member in members.values()), limit, "the archive's content", "(body)")
    arrays = {}
    for name, (member, packed) in zip(members, _locate_members(memory[:end], list(members.values())), strict=True):
        file = (
            _read_stored(member, packed) if member.method == METHOD_STORED else _inflate_member(member, packed, check)
        )
        if zlib.crc32(file) != member.crc:
            raise NotParseable(f"{member.file} in the archive is damaged: its CRC does not match")
        arrays[name] = npy.decode(file, limit, field=truncate_name(name), source=f"{member.file} in the archive")
    return arrays


def estimate_decode_seconds(content: bytes | bytearray | memoryview, limit: int) -> float:
    """Return the predicted seconds, from the directory: stored members are checked, deflated ones inflated."""
    memory = memoryview(content)
    try:
        members, _ = _parse_directory(memory)
    except NotParseable:
        return 0.0
    inflated_bytes = sum(member.size for member in members.values() if member.method == METHOD_DEFLATED)
    return 1e-9 * len(memory) + 6e-9 * min(inflated_bytes, limit)


def encode(arrays: Mapping[str, NDArray[Any]]) -> list[bytes | memoryview]:
    """Return the parts of an archive of stored members, with the arrays' own memory if npy.encode can use it."""
    parts: list[bytes | memoryview] = []
    directory = bytearray()
    offset = 0
    for name, array in arrays.items():
        file = npy.encode(array)
        size, crc = 0, 0
        for part in file:
            size, crc = size + len(part), zlib.crc32(part, crc)
        encoded = f"{name}{NPY_SUFFIX}".encode()
        common = (ZIP_VERSION, FLAG_UTF8, METHOD_STORED, 0, DOS_DATE_1980_01_01, crc, size, size, len(encoded))
        padding = -(offset + LOCAL_HEADER.size + len(encoded) + PADDING_FIELD.size) % ALIGNMENT_BYTES
        extra = PADDING_FIELD.pack(PADDING_ID, 2 + padding, ALIGNMENT_BYTES) + bytes(padding)
        if offset + size > MAX_ARCHIVE_BYTES:
            raise NotAcceptable(
                "the arrays exceed the 4 GB limit of an .npz; request application/x-safetensors instead"
            )
        parts += [LOCAL_HEADER.pack(LOCAL_SIGNATURE, *common, len(extra)) + encoded + extra, *file]
        directory += CENTRAL_HEADER.pack(CENTRAL_SIGNATURE, ZIP_VERSION, *common, 0, 0, 0, 0, 0, offset) + encoded
        offset += LOCAL_HEADER.size + len(encoded) + len(extra) + size
    count = len(arrays)
    return [*parts, bytes(directory) + END_RECORD.pack(END_SIGNATURE, 0, 0, count, count, len(directory), offset, 0)]


def _parse_directory(memory: memoryview) -> tuple[dict[str, Member], int]:
    """Return the members by array name, and the offset of the directory."""
    if memory[:4] not in (LOCAL_SIGNATURE, END_SIGNATURE):
        raise format_mismatch_error(memory, "an .npz file")
    end = len(memory) - END_RECORD.size
    record = END_RECORD.unpack_from(memory, end) if end >= 0 else (b"",)
    if record[0] != END_SIGNATURE:
        raise NotParseable(
            "the archive does not end as a zip archive does: it was cut off, or bytes or a comment follow its end"
        )
    _, disk, first_disk, here, count, size, start, comment = record
    if disk or first_disk or here != count or start + size != end or comment:
        raise NotParseable(
            "the archive's end does not fit its directory: it must be one file of up to 4 GB, with nothing before it"
        )
    if count > MAX_ARCHIVE_MEMBERS:
        raise NotParseable(f"the archive has {count} entries: at most {MAX_ARCHIVE_MEMBERS} are read")
    members: dict[str, Member] = {}
    at = start
    for _ in range(count):
        member, at = _parse_entry(memory[:end], at)
        name = _parse_array_name(member)
        if name in members:
            raise NotParseable(f"the archive has two entries {member.file}: send each array once")
        members[name] = member
    if at != end:
        raise NotParseable(f"the archive's directory has {end - at} bytes more than its {count} entries")
    return members, start


def _parse_entry(memory: memoryview, at: int) -> tuple[Member, int]:
    """Return the directory's entry at `at`, and the offset of its end."""
    name_at = at + CENTRAL_HEADER.size
    record = CENTRAL_HEADER.unpack_from(memory, at) if name_at <= len(memory) else (b"",)
    if record[0] != CENTRAL_SIGNATURE:
        raise NotParseable("the archive's directory is damaged: it has fewer entries than it declares")
    flags, method, crc, packed, size, name, extra, comment = *record[3:5], *record[7:13]
    end = name_at + name + extra + comment
    if end > len(memory):
        raise NotParseable("the archive's directory is damaged: an entry is longer than the directory")
    member = Member(bytes(memory[name_at : name_at + name]), flags, method, crc, packed, size, record[-1])
    return member, end


def _parse_array_name(member: Member) -> str:
    try:
        name = member.name.decode("utf-8" if member.flags & FLAG_UTF8 else "ascii")
    except UnicodeDecodeError:
        name = ""
    plain = name.isprintable() and not any(part in name for part in ("/", "\\", ".."))
    if not (plain and name.endswith(NPY_SUFFIX) and len(name) > len(NPY_SUFFIX)):
        raise NotParseable(
            f"the archive has an entry {member.file}: only plain names such as input.npy are read, without a folder"
        )
    if member.flags & ~(FLAG_DEFLATE_OPTIONS | FLAG_SIZES_FOLLOW | FLAG_UTF8):
        raise NotParseable(f"{member.file} in the archive is encrypted, or patch data: send it plain")
    if member.method not in (METHOD_STORED, METHOD_DEFLATED):
        raise NotParseable(
            f"{member.file} in the archive is compressed by method {member.method}: "
            "stored (0) and deflated (8) members are read, as numpy.savez and numpy.savez_compressed write them"
        )
    return name.removesuffix(NPY_SUFFIX)


def _locate_members(memory: memoryview, members: list[Member]) -> Iterator[tuple[Member, memoryview]]:
    """Yield each member with its bytes in the archive; overlapping members are rejected before the first is yielded."""
    ranges = [_locate_member(memory, member) for member in members]
    occupied = sorted((member.offset, end) for member, (_, end) in zip(members, ranges, strict=True))
    for (_, end), (offset, _) in pairwise(occupied):
        if offset < end:
            raise NotParseable("the archive has entries that overlap")
    for member, (start, end) in zip(members, ranges, strict=True):
        yield member, memory[start:end]


def _locate_member(memory: memoryview, member: Member) -> tuple[int, int]:
    """Return the begin and end of a member's bytes by its local header, which must agree with the directory."""
    name_at = member.offset + LOCAL_HEADER.size
    record = LOCAL_HEADER.unpack_from(memory, member.offset) if name_at <= len(memory) else (b"",)
    if record[0] != LOCAL_SIGNATURE:
        raise NotParseable(f"{member.file} in the archive is not where the directory says")
    flags, method, crc, packed, size, name, extra = *record[2:4], *record[6:]
    start = name_at + name + extra
    later = bool(flags & FLAG_SIZES_FOLLOW)
    agrees = (
        method == member.method
        and memory[name_at : name_at + name] == member.name
        and (later or crc == member.crc)
        and (later or packed in (member.packed, ZIP64_SIZE_MARK))
        and (later or size in (member.size, ZIP64_SIZE_MARK))
    )
    if not agrees:
        raise NotParseable(f"{member.file} in the archive has a header that contradicts the directory")
    if start + member.packed > len(memory):
        raise NotParseable(f"{member.file} in the archive is cut off: it declares {member.packed:,} bytes")
    return start, start + member.packed


def _read_stored(member: Member, packed: memoryview) -> memoryview:
    if len(packed) != member.size:
        raise NotParseable(
            f"{member.file} in the archive is stored with {len(packed):,} bytes, but declares {member.size:,}"
        )
    return packed


def _inflate_member(member: Member, packed: memoryview, check: DecodeCheck) -> memoryview:
    """Return the member's inflated bytes, never more than declared; impossible sizes are rejected before allocation."""
    if member.size > MAX_DEFLATE_RATIO * len(packed):
        raise NotParseable(
            f"{member.file} in the archive cannot be {member.size:,} bytes: {len(packed):,} deflated bytes hold fewer"
        )
    # Not a bytearray, which Python fills with zeros while it holds the GIL.
    file = np.empty(member.size, np.uint8).data
    filled = 0
    try:
        for piece in inflate([packed], -zlib.MAX_WBITS, member.size, check):
            file[filled : filled + len(piece)] = piece
            filled += len(piece)
    except zlib.error as error:
        raise_if_out_of_memory(error)
        raise NotParseable(f"{member.file} in the archive is damaged: {error}") from error
    return file

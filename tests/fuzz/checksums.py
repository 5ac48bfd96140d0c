"""Repair checksums and lengths after a mutation; with wrong ones, decoders reject a file before they read its data."""

import struct
import zlib
from contextlib import suppress


def repair_npy(content: bytes) -> bytes:
    """Set the length of the header by the position of its closing brace."""
    end = content.find(b"}", 10)
    return content if end < 0 else content[:8] + struct.pack("<H", (end - 9) % 2**16) + content[10:]


def repair_safetensors(content: bytes) -> bytes:
    """Set the length of the header by the position of its last brace."""
    end = content.rfind(b"}", 0, 8192)
    return content if end < 8 else struct.pack("<Q", end - 7) + content[8:]


def repair_png(content: bytes) -> bytes:
    """Set the CRC of every chunk."""
    repaired = bytearray(content)
    at = 8
    while at + 12 <= len(repaired):
        end = at + 8 + int.from_bytes(repaired[at : at + 4])
        if end + 4 > len(repaired):
            break
        struct.pack_into(">I", repaired, end, zlib.crc32(repaired[at + 4 : end]))
        at = end + 4
    return bytes(repaired)


def repair_npz(content: bytes) -> bytes:
    """Set the CRC of every member that can be located, in both of its headers, and the position of the directory."""
    repaired = bytearray(content)
    at = directory = content.find(b"PK\x01\x02")
    count = 0
    while at >= 0 and at + 46 <= len(content):
        with suppress(struct.error, zlib.error):
            method, packed, name, extra = (struct.unpack_from("<H", content, at + 10)[0], 0, 0, 0)
            packed, offset = (struct.unpack_from("<I", content, at + field)[0] for field in (20, 42))
            name, extra = struct.unpack_from("<2H", content, offset + 26)
            member = content[offset + 30 + name + extra :][:packed]
            file = zlib.decompressobj(-15).decompress(member, 100_000) if method == 8 else member
            for field in (at + 16, offset + 14):
                struct.pack_into("<I", repaired, field, zlib.crc32(file))
        count += 1
        at = content.find(b"PK\x01\x02", at + 46)
    end = content.rfind(b"PK\x05\x06")
    if 0 <= directory < end and end + 22 <= len(content):
        struct.pack_into("<2H2I", repaired, end + 8, count, count, end - directory, directory)
    return bytes(repaired)

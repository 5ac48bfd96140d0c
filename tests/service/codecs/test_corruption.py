"""Tests that a randomly damaged file gives an array within the limit, or one of the service's own errors."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ServiceError
from tests.service.codecs.strategies import DECODE_LIMIT_BYTES, mutated_files
from tests.service.codecs.valid_files import VALID_FILES, assert_valid_arrays


@pytest.mark.parametrize("name", VALID_FILES)
def test_valid_files_decode_to_valid_arrays(name: str) -> None:
    decode, content = VALID_FILES[name]
    assert_valid_arrays(decode(content, DECODE_LIMIT_BYTES), DECODE_LIMIT_BYTES)


@pytest.mark.slow
@pytest.mark.parametrize("name", VALID_FILES)
@given(data=st.data())
def test_damage_raises_only_service_errors(name: str, data: st.DataObject) -> None:
    decode, content = VALID_FILES[name]
    with suppress(ServiceError):
        assert_valid_arrays(decode(data.draw(mutated_files(content)), DECODE_LIMIT_BYTES), DECODE_LIMIT_BYTES)


@pytest.mark.parametrize("name", VALID_FILES)
def test_truncation_anywhere_is_rejected(name: str) -> None:
    decode, content = VALID_FILES[name]
    # The end marker of a JPEG may be missing.
    for end in range(len(content) - (len(b"\xff\xd9") if name.startswith("jpeg") else 0)):
        with pytest.raises(ServiceError):
            decode(content[:end], DECODE_LIMIT_BYTES)


@pytest.mark.parametrize("name", VALID_FILES)
@given(content=st.binary(max_size=200))
def test_noise_after_a_signature_is_rejected(name: str, content: bytes) -> None:
    decode, valid = VALID_FILES[name]
    with pytest.raises(ServiceError):
        decode(valid[:8] + content, DECODE_LIMIT_BYTES)

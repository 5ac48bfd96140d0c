"""Valid files, damaged at random: what comes out is an array within the limit, or an error of the service's own."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ServiceError
from tests.service.codecs.drawn import LIMIT, mutations
from tests.service.codecs.files import FILES, assert_sound


@pytest.mark.parametrize("name", FILES)
def test_valid_files_are_sound(name: str) -> None:
    decode, content = FILES[name]
    assert_sound(decode(content, LIMIT), LIMIT)


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_damage_raises_nothing_but_the_services_own_errors(name: str, data: st.DataObject) -> None:
    decode, content = FILES[name]
    with suppress(ServiceError):
        assert_sound(decode(data.draw(mutations(content)), LIMIT), LIMIT)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_off_anywhere_is_refused(name: str) -> None:
    decode, content = FILES[name]
    for end in range(len(content)):
        with pytest.raises(ServiceError):
            decode(content[:end], LIMIT)


@pytest.mark.parametrize("name", FILES)
@given(content=st.binary(max_size=200))
def test_noise_behind_a_signature_is_refused(name: str, content: bytes) -> None:
    decode, valid = FILES[name]
    with pytest.raises(ServiceError):
        decode(valid[:8] + content, LIMIT)

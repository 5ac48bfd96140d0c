import pytest

from core.shapes import Mode, Operation, Sides, mode_padding, same_padding


@pytest.mark.parametrize(
    ("mode", "operation", "sides"),
    [
        ("valid", "correlate", (0, 0, 0, 0)),
        ("valid", "convolve", (0, 0, 0, 0)),
        ("same", "correlate", (1, 2, 0, 1)),
        ("same", "convolve", (2, 1, 1, 0)),
        ("full", "correlate", (3, 3, 1, 1)),
        ("full", "convolve", (3, 3, 1, 1)),
    ],
)
def test_mode_is_converted_to_padding(mode: Mode, operation: Operation, sides: Sides) -> None:
    assert mode_padding(mode, operation, (4, 2)) == sides


def test_same_padding_puts_the_odd_pixel_last() -> None:
    assert same_padding((5, 6), (2, 4), (1, 1), (1, 1)) == (0, 1, 1, 2)
    assert same_padding((224, 224), (7, 7), (2, 2), (1, 1)) == (2, 3, 2, 3)

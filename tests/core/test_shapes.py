import pytest

from core.shapes import Mode, Operation, Problem, Sides, mode_padding, same_padding


def test_cost_matches_a_manual_count() -> None:
    problem = Problem(
        batch=2,
        channels=4,
        height=10,
        width=12,
        filters=6,
        kernel_height=3,
        kernel_width=5,
        groups=2,
        stride=(2, 1),
        dilation=(1, 2),
        padding=(1, 0, 2, 2),
    )
    assert problem.padded_size == (11, 16)
    assert problem.output_size == (5, 8)  # rows (11 - 3) // 2 + 1, columns 16 - (2 * 4 + 1) + 1
    assert problem.operations == 2 * (2 * 6 * 5 * 8) * (2 * 3 * 5)
    assert problem.total_bytes == 4 * (2 * 4 * 10 * 12 + 6 * 2 * 3 * 5 + 2 * 6 * 5 * 8)
    assert problem.padded_bytes == 4 * 2 * 4 * 11 * 16


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

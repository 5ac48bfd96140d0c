from core.problem import Problem


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

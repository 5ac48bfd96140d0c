import numpy as np
import pytest
import scipy.ndimage

import core
from core import KERNELS, named_kernel

IMPULSE = np.zeros((41, 41))
IMPULSE[20, 20] = 1

SUMS = {"identity": 1, "box": 1, "gaussian": 1, "sharpen": 1, "emboss": 1, "motion": 1}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_keep_or_remove_constant_brightness(name: str) -> None:
    assert named_kernel(KERNELS[name].example).sum() == pytest.approx(SUMS.get(name, 0), abs=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_examples_are_valid_names_of_their_family(name: str) -> None:
    assert KERNELS[name].example.startswith(name)
    assert KERNELS[name].signature.startswith(name)
    assert named_kernel(f"  {KERNELS[name].example} ").ndim == 2


def test_names_may_contain_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "laplacian2", KERNELS["laplacian"])
    assert named_kernel("laplacian2").tolist() == named_kernel("laplacian").tolist()


@pytest.mark.parametrize(("name", "axis"), [("x", 1), ("y", 0)])
def test_derivatives_match_scipy(name: str, axis: int) -> None:
    for family, filtered in (("sobel", scipy.ndimage.sobel), ("prewitt", scipy.ndimage.prewitt)):
        kernel = named_kernel(f"{family}_{name}")
        np.testing.assert_array_equal(scipy.ndimage.correlate(IMPULSE, kernel), filtered(IMPULSE, axis))


def test_derivative_is_positive_towards_brighter_pixels() -> None:
    ramp = np.tile(np.arange(9.0), (9, 1))
    for name in ("sobel", "prewitt", "scharr"):
        assert (core.correlate(ramp, f"{name}_x").output > 0).all()
        assert (core.correlate(ramp, f"{name}_y").output == 0).all()
        assert (core.correlate(ramp.T, f"{name}_y").output > 0).all()
    assert (core.correlate(ramp, "edge_x").output == 1).all()


@pytest.mark.parametrize("sigma", [0.5, 1, 2.0, 3.3])
def test_gaussian_matches_scipy(sigma: float) -> None:
    expected = scipy.ndimage.gaussian_filter(IMPULSE, sigma)
    np.testing.assert_allclose(
        scipy.ndimage.correlate(IMPULSE, named_kernel(f"gaussian({sigma})")), expected, atol=1e-16
    )


def test_gaussian_accepts_a_size() -> None:
    assert named_kernel("gaussian(1.5, 4)").shape == (4, 4)
    np.testing.assert_allclose(named_kernel("gaussian(1, 2)"), 0.25)
    np.testing.assert_allclose(named_kernel("gaussian(0.001, 2)"), 0.25)


def test_laplacian_matches_scipy() -> None:
    kernel = named_kernel("laplacian")
    np.testing.assert_array_equal(scipy.ndimage.correlate(IMPULSE, kernel), scipy.ndimage.laplace(IMPULSE))


def test_log_approximates_scipy_and_sums_to_zero() -> None:
    kernel = named_kernel("log(2)")
    expected = scipy.ndimage.gaussian_laplace(IMPULSE, 2)[12:29, 12:29]
    assert np.abs(kernel - expected).max() < 0.03 * np.abs(expected).max()


def test_motion_is_a_line_of_its_length_and_angle() -> None:
    np.testing.assert_allclose(named_kernel("motion(5, 0)"), np.outer([0, 0, 1, 0, 0], [0.2] * 5))
    np.testing.assert_allclose(named_kernel("motion(5, 90)"), named_kernel("motion(5, 0)").T)
    np.testing.assert_allclose(named_kernel("motion(9, 45)"), named_kernel("motion(9, 135)")[:, ::-1], atol=1e-12)
    np.testing.assert_allclose(named_kernel("motion(9, 225)"), named_kernel("motion(9, 45)"), atol=1e-12)
    # Angles are counter-clockwise: at 45 degrees the line rises to the right (row numbers increase downwards).
    assert named_kernel("motion(5, 45)")[1, 3] > 0 == named_kernel("motion(5, 45)")[1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sobelx", "did you mean sobel_x or sobel_y?"),
        ("", "is not a named kernel"),
        ("😀" * 1000, "is not a named kernel"),
        ("box", "does not match box(n): received 0 arguments"),
        ("box(0)", "n must be a whole number from 1 to 1023"),
        ("box(2.5)", "n must be a whole number"),
        ("box(1e9)", "n must be a whole number"),
        ("box(inf)", "n must be a whole number"),
        ("box(nan)", "n must be a whole number"),
        ("gaussian(0)", "sigma must be above 0"),
        ("gaussian(-1)", "sigma must be above 0"),
        ("gaussian(nan)", "sigma must be above 0"),
        ("gaussian(1e300)", "n must be a whole number"),
        ("gaussian(1, 2, 3)", "received 3 arguments"),
        ("gaussian(one)", "could not convert"),
        ("gaussian(1", "is not a named kernel"),
        ("log(inf)", "sigma must be above 0"),
        ("motion(4, 0)", "n must be odd"),
        ("motion(5, inf)", "angle must be finite"),
        ("sobel_x(3)", "received 1 argument;"),
        ("sobel_x" + " " * 200 + "junk", "is not a named kernel"),
        ("log(1e-100)", "an argument is out of range"),
        ("__import__('os')", "is not a named kernel"),
    ],
)
def test_unknown_name_is_rejected_with_a_suggestion(text: str, message: str) -> None:
    with pytest.raises(core.UnknownKernel) as caught:
        named_kernel(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400

"""docs/robustness.md and tests/hazards beside each other: every hazard has its row and its tests."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "robustness.md").read_text()
MAKEFILE = (TESTS.parent / "Makefile").read_text()

NUMBERS = [*range(1, 66), *range(70, 83)]


def numbers_of(name: str) -> list[int]:
    """Those that a test's name begins with: test_42_46_a_format_... is about both."""
    return [int(number) for number in re.findall(r"(?<=_)\d\d(?=_)", re.match(r"test(_\d\d)*_", name)[0])]  # type: ignore[index]


def names_in(folder: Path) -> list[str]:
    return [
        name for path in sorted(folder.rglob("test_*.py")) for name in re.findall(r"def (test_\w+)", path.read_text())
    ]


def test_every_hazard_has_its_row_in_order() -> None:
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)] == NUMBERS


def test_every_hazard_has_a_test_and_every_test_a_hazard() -> None:
    tested = {name: numbers_of(name) for name in names_in(TESTS / "hazards")}
    assert [name for name, numbers in tested.items() if not numbers] == []
    assert {number for numbers in tested.values() for number in numbers} == set(NUMBERS)


def test_no_other_test_has_a_number_that_no_hazard_has() -> None:
    assert {number for name in names_in(TESTS) for number in numbers_of(name)} <= set(NUMBERS)


def test_the_commands_that_the_page_names_are_there() -> None:
    for target in re.findall(r"`make (\w+)`", PAGE):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target

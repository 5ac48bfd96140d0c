"""docs/robustness.md and tests/robustness: each case has a row and a test."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "robustness.md").read_text()
MAKEFILE = (TESTS.parent / "Makefile").read_text()

CASE_NUMBERS = [*range(1, 66), *range(70, 83)]


def list_tests(folder: Path) -> dict[str, list[int]]:
    """Return the case numbers of each test below a folder, from its marker `robustness` or its module's."""
    tests = {}
    for path in sorted(folder.rglob("test_*.py")):
        for name, decorators in find_tests(ast.parse(path.read_text())):
            tests[f"{path.stem}.{name}"] = [number for decorator in decorators for number in parse_marker(decorator)]
    return tests


def find_tests(module: ast.Module) -> Iterator[tuple[str, list[ast.expr]]]:
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node.name, node.decorator_list


def parse_marker(decorator: ast.expr) -> list[int]:
    if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.robustness":
        return [ast.literal_eval(argument) for argument in decorator.args]
    return []


def test_every_case_has_its_row_in_order() -> None:
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)] == CASE_NUMBERS


def test_every_case_has_a_test_and_every_test_a_case() -> None:
    tests = list_tests(TESTS / "robustness")
    assert [name for name, numbers in tests.items() if not numbers] == []
    assert {number for numbers in tests.values() for number in numbers} == set(CASE_NUMBERS)


def test_markers_elsewhere_use_listed_numbers() -> None:
    assert {number for numbers in list_tests(TESTS).values() for number in numbers} <= set(CASE_NUMBERS)


def test_commands_on_the_page_exist() -> None:
    for target in re.findall(r"`make (\w+)`", PAGE):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target

"""Every error that core or the service can raise has its line in the table, and its line in its tree."""

import inspect
import re

import core
import core.errors
import service.errors
from service.errors import ServiceError
from service.problems import ERRORS, LIMIT_SETTINGS
from service.settings import PREFIX, Settings


def tree(root: type[Exception]) -> set[type[Exception]]:
    return {root}.union(*(tree(child) for child in root.__subclasses__()))


def test_the_table_has_every_error_and_no_other() -> None:
    assert set(ERRORS) == tree(core.CoreError) | tree(ServiceError)


def test_no_two_errors_share_a_name() -> None:
    names = [kind.name for kind in ERRORS.values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in names)


def test_the_docstrings_draw_the_trees_as_they_are() -> None:
    for module, root in ((core.errors, core.CoreError), (service.errors, ServiceError)):
        drawn = set(re.findall(r"(?:├──|└──) (\w+)", inspect.getdoc(module) or ""))
        assert drawn == {error.__name__ for error in tree(root) - {root}}


def test_the_limits_name_settings_that_there_are() -> None:
    for setting in LIMIT_SETTINGS.values():
        assert setting.removeprefix(PREFIX).lower() in Settings.model_fields

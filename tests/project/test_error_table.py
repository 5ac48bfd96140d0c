"""Every error that core or the service raises is in PROBLEM_TYPES and in the class tree of its module's docstring."""

import inspect
import re

import core
import core.errors
import service.errors
from service.configuration.computed_settings import find_limit_settings
from service.configuration.settings import ENV_PREFIX, Settings
from service.errors import ServiceError
from service.problems import PROBLEM_TYPES


def collect_subclasses(root: type[Exception]) -> set[type[Exception]]:
    """Return all subclasses of a base class, which itself is never raised."""
    return {*root.__subclasses__()}.union(*(collect_subclasses(child) for child in root.__subclasses__()))


def test_table_lists_exactly_the_errors() -> None:
    assert set(PROBLEM_TYPES) == collect_subclasses(core.CoreError) | collect_subclasses(ServiceError)


def test_error_names_are_unique() -> None:
    names = [kind.name for kind in PROBLEM_TYPES.values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in names)


def test_docstrings_show_the_class_trees() -> None:
    for module, root in ((core.errors, core.CoreError), (service.errors, ServiceError)):
        drawn = set(re.findall(r"(?:├──|└──) (\w+)", inspect.getdoc(module) or ""))
        assert drawn == {error.__name__ for error in collect_subclasses(root)}


def test_limits_name_existing_settings() -> None:
    for setting in find_limit_settings(Settings(), Settings(max_compute_mb=2000)).values():
        assert setting.removeprefix(ENV_PREFIX).lower() in Settings.model_fields

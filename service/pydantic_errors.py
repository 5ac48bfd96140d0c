"""Conversion of pydantic's errors to FieldError: field, message, received value and allowed values."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from service.errors import FieldError

MAX_EXPLAINED_ERRORS = 20
"""Maximum number of errors that get a full message; a response lists no more, and counts the others."""

MAX_HINT_CHARS = 60
"""Maximum length, in characters, of an unknown field name that is compared with the known names."""

Location = tuple[int | str, ...]
ListNamesFn = Callable[[Location], Sequence[str]]
"""Function that returns the accepted field names of the object at a location."""

LOCATION_SECTIONS = ("body", "query", "path", "header")


def convert_errors(
    errors: Sequence[Mapping[str, Any]], list_names: ListNamesFn = lambda _location: ()
) -> list[FieldError]:
    """Return pydantic's errors, one per field; an unknown field is compared with the accepted names for a hint."""
    by_field: dict[str, FieldError] = {}
    # Unknown fields first: they are often the misspelling of one that is missing.
    for error in sorted(errors, key=lambda error: error["type"] != "extra_forbidden"):
        context = error.get("ctx") or {}
        field = (_format_path(error["loc"]) + context.get("position", "")).removeprefix(".") or "(body)"
        if field in by_field:
            continue
        if len(by_field) < MAX_EXPLAINED_ERRORS:
            by_field[field] = _convert_error(error, field, context, list_names)
        else:
            by_field[field] = FieldError(field, error["msg"])
    return list(by_field.values())


def _convert_error(
    error: Mapping[str, Any], field: str, context: Mapping[str, Any], list_names: ListNamesFn
) -> FieldError:
    got: object = _format_value(error["input"])
    limit: object = None
    match error["type"]:
        case "corr2d":
            message, got, limit = f"{field} {error['msg']}", context.get("got"), context.get("limit")
        case "extra_forbidden":
            *parents, name = error["loc"]
            return _describe_unknown_field(field, str(name), list_names(tuple(parents)))
        case "missing":
            message, got = f'"{field}" is required', None
        case "model_type":
            message = f"{field.strip('()')} must be an object, not {got}"
            limit = ", ".join(list_names(tuple(error["loc"])))
        case "literal_error":
            message, limit = f'"{field}" must be {context["expected"]}, not {got}', context["expected"]
        case _:
            text = error["msg"][0].lower() + error["msg"][1:]
            message = f'"{field}" {text.removeprefix("input ")}, not {got}'
    return FieldError(field, message, got, limit)


def _describe_unknown_field(field: str, name: str, known_names: Sequence[str]) -> FieldError:
    if name in known_names:
        return FieldError(field, f'"{field}" was received under both of its names: send one', None, "one of them")
    near = difflib.get_close_matches(name, known_names, n=1) if len(name) <= MAX_HINT_CHARS else []
    hint = f'; did you mean "{near[0]}"?' if near else ""
    return FieldError(field, f'unknown field "{field[:MAX_HINT_CHARS]}"{hint}', None, ", ".join(known_names) or None)


def _format_path(location: Sequence[int | str]) -> str:
    """Return a location as a path: ("body", "pairs", 0, "input") as "pairs[0].input"."""
    parts = location[1:] if location and location[0] in LOCATION_SECTIONS else location
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _format_value(value: object) -> str:
    """Return a value for a message: the type and length of a list or object, else the first 100 characters."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return repr(value)[:100]

"""Plain config values made into what an annotation asks for, or refused in words that the config's user understands."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
import types
import typing
from collections import abc
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path", type(None): "null"}
_LISTS = (list, tuple, abc.Sequence, abc.Iterable, abc.Collection, set, frozenset)
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)


class _Mismatch(Exception):
    """A value that an annotation does not take; caught here, never seen outside."""

    def __init__(self, place: str, expected: str, value: Any, hint: str = "") -> None:
        super().__init__(f"{place} must be {expected}; got {describe_value(value)}.{hint}")


def convert(value: Any, hint: Any, place: str) -> Any:
    """``value`` as ``hint`` wants it: whole numbers for integers and numbers, lists for tuples, text for paths.

    An annotation that cannot be checked here (a tensor, a type variable) lets everything through.

    Raises:
        ValueError: ``training.steps must be an integer; got 'abc' (text).``
    """
    try:
        return _convert(value, hint, place)
    except _Mismatch as mismatch:
        raise ValueError(str(mismatch)) from None


def _convert(value: Any, hint: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, arguments, place, hint)
    if origin is typing.Literal:
        return _choice(value, arguments, place)
    if origin is typing.Annotated:
        return _convert(value, arguments[0], place)
    if hint in (int, float, bool, str, Path, None, type(None)):
        return _scalar(value, hint, place)
    if (origin or hint) in _LISTS:
        return _list(value, origin or hint, arguments, place)
    if (origin or hint) in _MAPPINGS:
        return _mapping(value, arguments, place)
    if (origin or hint) in (abc.Callable, typing.Callable) and not callable(value):
        raise _Mismatch(place, "a function", value)
    if inspect.isclass(hint):
        return _instance(value, hint, place)
    return value


def _scalar(value: Any, hint: Any, place: str) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int and number and float(value).is_integer():  # 1e5 is a float to YAML and a count to everybody else
        return int(value)
    if hint is float and number:
        return float(value)
    if hint is Path and isinstance(value, (str, os.PathLike)):
        return Path(value)
    if hint in (None, type(None)) and value is None:
        return None
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise _Mismatch(place, words(hint), value)


def _one_of(value: Any, members: tuple[Any, ...], place: str, hint: Any) -> Any:
    alternatives = [member for member in members if member is not type(None)]
    if value is None and len(alternatives) < len(members):
        return None
    if len(alternatives) == 1:  # its own complaint is the precise one: it may point inside a list, or name choices
        return _convert(value, alternatives[0], place)
    exact = [member for member in alternatives if type(value) is member]  # 1 stays an integer for `float | int`
    for member in [*exact, *alternatives]:
        try:
            return _convert(value, member, place)
        except _Mismatch:
            continue
    raise _Mismatch(place, words(hint), value)


def _choice(value: Any, choices: tuple[Any, ...], place: str) -> Any:
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise _Mismatch(place, f"one of {', '.join(str(choice) for choice in choices)}", value, hint)


def _list(value: Any, kind: Any, arguments: tuple[Any, ...], place: str) -> Any:
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, abc.Iterable):
        raise _Mismatch(place, words(kind[arguments] if arguments and kind in (list, tuple) else list), value)
    items = list(value)
    fixed = kind is tuple and arguments and arguments[-1] is not Ellipsis
    if fixed and len(items) != len(arguments):
        raise _Mismatch(place, f"a list of {len(arguments)} entries", value)
    hints = arguments if fixed else [arguments[0] if arguments else Any] * len(items)
    converted = [
        _convert(item, hint, f"{place}[{position}]")
        for position, (item, hint) in enumerate(zip(items, hints, strict=True))
    ]
    return kind(converted) if kind in (list, set, frozenset) else tuple(converted)


def _mapping(value: Any, arguments: tuple[Any, ...], place: str) -> Any:
    if not isinstance(value, abc.Mapping):
        raise _Mismatch(place, words(dict), value)
    key_hint, item_hint = arguments if len(arguments) == 2 else (Any, Any)
    return {
        _convert(key, key_hint, f"{place}, key {key}"): _convert(item, item_hint, f"{place}.{key}")
        for key, item in value.items()
    }


def _instance(value: Any, kind: type, place: str) -> Any:
    if kind.__module__.split(".")[0] in ("jaxtyping", "torch", "numpy"):
        return value  # an array may be given as a list; the callee says what it takes
    try:
        fits = isinstance(value, kind)
    except TypeError:  # a Protocol that is not checkable at run time
        return value
    if not fits:
        raise _Mismatch(place, words(kind), value)
    return value


def words(hint: Any) -> str:
    """An annotation in words: ``int | None`` is "an integer or null"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words(member) for member in arguments)
    if origin is typing.Literal:
        return f"one of {', '.join(str(choice) for choice in arguments)}"
    if hint in _WORDS or hint is None:
        return _WORDS[hint if hint is not None else type(None)]
    if (origin or hint) in _LISTS:
        return f"a list ({words(arguments[0])} each)" if arguments else "a list"
    if (origin or hint) in _MAPPINGS:
        return "a section of keys and values"
    name = getattr(hint, "__name__", str(hint))
    article = "an" if name[:1] in "AEIOU" else "a"
    return f"{article} {name}, a section with _target_"


def describe_value(value: Any) -> str:
    """A config value with its kind, as a message shows it."""
    kinds = {bool: "true or false", int: "integer", float: "number", str: "text", list: "list", dict: "section"}
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float, list, dict)):
        text = repr(value)
        return f"{text if len(text) < 60 else text[:57] + '...'} ({kinds[type(value)]})"
    return f"a {type(value).__name__}"


def evaluate_hint(hint: Any, target: Callable[..., Any]) -> Any:
    """A string annotation of a class's or function's parameter as the type it names; ``Any`` where that is unknown."""
    if not isinstance(hint, str):
        return hint
    for namespace in _namespaces(target):
        try:
            # The text is from code that the caller has resolved and trusts, never from a config.
            return eval(hint, dict(namespace))
        except Exception:  # a name imported for type checkers only, or syntax of a newer Python
            continue
    return Any


def _namespaces(target: Callable[..., Any]) -> list[dict[str, Any]]:
    """Where the names in a callable's annotations live: the modules of its classes, its own globals."""
    homes = [kind.__module__ for kind in target.__mro__] if inspect.isclass(target) else [target.__module__]
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    own = getattr(function, "__globals__", {})
    return [vars(sys.modules[home]) for home in homes if home in sys.modules and home != "builtins"] + [own]


def hydra_text(text: str) -> str:
    """Any text as a quoted value in the grammar of Hydra's overrides.

    A backslash there is one, except before a quote and at the end, where it must be doubled.
    """
    escaped = re.sub(r"(\\*)\"", r'\1\1\\"', text)
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'

"""Checks of every annotated shape and type, made ready when a function is called first.

jaxtyping's import hook makes the checks of every function as a package is imported: of thousands, where a worker calls
some hundreds, and each checks its arguments twice for the sake of its message. Here a function gets its checks at its
first call, and checks arguments and result once, within one scope of names for sizes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
from types import FunctionType
from typing import Any, get_type_hints

import jaxtyping
from beartype import beartype

_jaxtyped = jaxtyping.jaxtyped
_SCOPE = _jaxtyped("context")  # has no state of its own


def install(packages: Sequence[str]) -> None:
    """Check the functions of these packages, none of which may have been imported yet."""
    jaxtyping.install_import_hook(packages, "beartype.beartype")
    jaxtyping.jaxtyped = check_when_called  # what the hook puts before every function


def check_when_called(decorated: Any = None, *, typechecker: Callable[..., Any] = beartype) -> Any:
    """The function with its checks; a class as it is, with checks of the ``__init__`` that a dataclass has made."""
    if decorated is None:
        return partial(check_when_called, typechecker=typechecker)
    if inspect.isclass(decorated):
        if dataclasses.is_dataclass(decorated) and not hasattr(decorated.__init__, "__wrapped__"):
            decorated.__init__ = check_when_called(decorated.__init__, typechecker=typechecker)  # type: ignore[misc]
        return decorated
    if not isinstance(decorated, FunctionType) or inspect.isgeneratorfunction(decorated):
        return _jaxtyped(decorated, typechecker=typechecker)
    checked: Callable[..., Any] | None = None

    @wraps(decorated)
    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if checked is None:
            checked = with_checks(decorated)
        with _SCOPE:
            return checked(*args, **kwargs)

    return function


def with_checks(function: FunctionType) -> Callable[..., Any]:
    """A copy of the function that checks what it is given and gives, but for names that only type checkers see."""
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    copy.__annotations__ = {
        name: annotated(hint, function.__globals__) for name, hint in function.__annotations__.items()
    }
    return beartype(copy)  # type: ignore[no-any-return]


def annotated(hint: Any, names: dict[str, Any]) -> Any:
    """What an annotation stands for; anything, where its names are imported for type checkers only."""

    def bearer() -> None: ...

    bearer.__annotations__ = {"hint": hint}
    try:
        return get_type_hints(bearer, names, include_extras=True)["hint"]
    except Exception:
        return Any

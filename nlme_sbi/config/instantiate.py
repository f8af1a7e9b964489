"""From a config section with ``_target_`` to the object it describes, without ever running foreign code.

A section may come from a run directory that somebody sent. So a ``_target_`` is resolved only where both its text and
the ``__module__`` of the object behind it lie under ``nlme_sbi.``, ``simulators.`` or a prefix that the user trusts:
``nlme_sbi.runs.os.system`` begins well and is refused all the same. Of our own modules only a class that plays one of
the roles in :mod:`nlme_sbi.config.targets` can be a target, and that is decided before anything is called. ``trust``
is an argument of the caller, who has it from the user; no section can carry one.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nlme_sbi.config.conversion import convert, evaluate_hint
from nlme_sbi.config.targets import OWN_PREFIXES, ROLES, Role, lies_in, refusal

TARGET = "_target_"
_DEEPEST = 50  # sections inside sections


def instantiate(
    node: Any,
    *,
    trust: Iterable[str] = (),
    where: str = "",
    given: Mapping[str, Any] | None = None,
    role: type | None = None,
    roles: tuple[Role, ...] = ROLES,
) -> Any:
    """Build what a config section describes; sections inside it are built first.

    Args:
        node: a section (dict or DictConfig) with ``_target_``, or a list or dict of such; anything else is returned.
        trust: module prefixes besides ours that a ``_target_`` may name; from the user, never from a section.
        where: the section's place in the config, for messages.
        given: further keyword arguments for the outermost target, objects that no config can hold.
        role: a Protocol whose methods the outermost class must have, checked before anything is built.
        roles: what our own classes may be; :data:`nlme_sbi.config.targets.STORED_ROLES` for a section of a run
            directory.

    Raises:
        ValueError: for a target that is not trusted, not there or of another role, an unknown or missing keyword, a
            value of the wrong type, or what the target itself refuses; with the config path and the remedy.
    """
    if isinstance(trust, str):
        raise ValueError(f'trust must be a list, for example trust=[{trust}]; got "{trust}".')
    plain, rules = _plain_node(node, where), _Rules(tuple(trust), roles)
    _refuse_deep(plain, where)
    # Every target is located before any is called: a section that is refused has done nothing.
    targets: dict[str, Callable[..., Any]] = {}
    _locate_all(plain, rules, where, targets)
    if role is not None:
        _refuse_other_role(targets.get(where, type(plain)), role, where)
    return _build(plain, targets, where, dict(given or {}))


@dataclass(frozen=True)
class _Rules:
    """What a section may name."""

    trust: tuple[str, ...]
    roles: tuple[Role, ...]


def role_members(role: type) -> dict[str, bool]:
    """Public members of a Protocol, and whether each is a method; inherited ones included."""
    members: dict[str, bool] = {}
    for base in reversed(role.__mro__):
        if base is object or base.__module__ == "typing":
            continue
        for name in [*getattr(base, "__annotations__", {}), *vars(base)]:
            if not name.startswith("_"):
                members[name] = inspect.isfunction(vars(base).get(name))
    return members


def _refuse_other_role(target: Callable[..., Any], role: type, where: str) -> None:
    """A class of another kind is recognised by the methods that it lacks; what a function returns is seen
    afterwards."""
    if not inspect.isclass(target):
        return
    methods = [name for name, is_method in role_members(role).items() if is_method]
    lacking = sorted(name for name in methods if not callable(getattr(target, name, None)))
    if lacking:
        raise ValueError(f"{where} is a {target.__name__}, which is no {role.__name__}: it lacks {', '.join(lacking)}.")


def _refuse_deep(node: Any, where: str) -> None:
    level = [node]
    for _ in range(_DEEPEST):
        level = [
            inner
            for item in level
            if isinstance(item, (Mapping, list, tuple))
            for inner in (item.values() if isinstance(item, Mapping) else item)
        ]
        if not level:
            return
    raise ValueError(f"{where or 'The section'} nests more than {_DEEPEST} sections in each other; nothing needs that.")


def _plain_node(node: Any, where: str) -> Any:
    if not OmegaConf.is_config(node):
        return node
    try:
        return OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {str(error).splitlines()[0]}.") from error


def _locate_all(node: Any, rules: _Rules, where: str, targets: dict[str, Callable[..., Any]]) -> None:
    """Fill ``targets`` with every target below a section, by the place of its section."""
    if isinstance(node, (list, tuple)):
        for position, item in enumerate(node):
            _locate_all(item, rules, f"{where}[{position}]", targets)
    elif isinstance(node, Mapping):
        if TARGET in node:
            targets[where] = locate(node[TARGET], trust=rules.trust, where=_join(where, TARGET), roles=rules.roles)
        for key, item in node.items():
            if key != TARGET:
                _locate_all(item, rules, _join(where, key), targets)


def _build(node: Any, targets: Mapping[str, Callable[..., Any]], where: str, given: dict[str, Any]) -> Any:
    if isinstance(node, (list, tuple)):
        return [_build(item, targets, f"{where}[{position}]", {}) for position, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    values = {key: _build(item, targets, _join(where, key), {}) for key, item in node.items() if key != TARGET}
    if TARGET not in node:
        return values
    return _call(targets[where], values, where, given)


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def locate(
    path: Any, *, trust: Iterable[str] = (), where: str = TARGET, roles: tuple[Role, ...] = ROLES
) -> Callable[..., Any]:
    """The class that a dotted path names, or a function of a trusted module; refused where it is not ours or trusted.

    Raises:
        ValueError: with the nearest name that exists, with what to pass to trust it, or with the roles that there are.
    """
    allowed = (*OWN_PREFIXES, *trust)
    if not isinstance(path, str) or not path.isascii() or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"{where} must be a dotted path such as simulators.mrna_two_rate.MrnaTwoRate; got {path!r}.")
    # The text is checked before anything is imported, because importing a module runs it.
    _refuse_foreign(path, path, allowed, where)
    if any(part.startswith("_") for part in path.split(".")):
        raise ValueError(f"{where}: {path} is private; name a public class.")
    found = _follow(path, allowed, where)
    if not (inspect.isclass(found) or inspect.isroutine(found)):
        raise ValueError(f"{where}: {path} is neither a class nor a function.")
    home = str(getattr(found, "__module__", None))
    _refuse_foreign(home, path, allowed, where)
    if not lies_in(home, OWN_PREFIXES):  # trusted; ours is what it is, whoever trusts it
        if not inspect.isclass(found) and not inspect.isfunction(found):
            raise ValueError(f"{where}: {path} is a method; name a class, or a function that makes an object.")
        return found
    reason = refusal(found, roles)
    if reason is not None:
        raise ValueError(f"{where}: {path} {reason}.")
    return found


def _follow(path: str, allowed: Sequence[str], where: str) -> Any:
    """The object behind a dotted path. Names are followed only inside modules that are allowed: what those have
    imported from elsewhere is not even looked at."""
    found, names = _import_longest(path, where)
    for position, name in enumerate(names):
        if isinstance(found, ModuleType):
            _refuse_foreign(found.__name__, path, allowed, where)
        elif position:
            raise ValueError(f"{where}: {path} is no class in a module but something inside {_shown_name(found)}.")
        if not hasattr(found, name):
            raise ValueError(f"{where}: {_shown_name(found)} has no {name}.{_suggest(name, _public_names(found))}")
        found = getattr(found, name)
    return found


def _refuse_foreign(module: str, path: str, allowed: Sequence[str], where: str) -> None:
    if not lies_in(module, tuple(allowed)):
        outside = path.split(".")[0] if module == path else module
        raise ValueError(
            f"{where}: {path} comes from {outside}, which is neither part of nlme_sbi nor trusted. If the code is "
            f"yours or you have read it, pass trust=[{outside}]."
        )


def _import_longest(path: str, where: str) -> tuple[Any, list[str]]:
    """The longest part of a dotted path that is a module, imported, and the names that follow."""
    parts = path.split(".")
    module: ModuleType | None = None
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise ValueError(f"{where}: importing {name} failed, because {error.name} is not installed.") from error
            if module is None:
                raise ValueError(
                    f"{where}: there is no module {name} where Python looks for it; run from its folder, or install it."
                ) from error
            if count < len(parts) and not hasattr(module, parts[count - 1]):
                known = [found.name for found in pkgutil.iter_modules(getattr(module, "__path__", []))]
                raise ValueError(f"{where}: there is no module {name}.{_suggest(parts[count - 1], known)}") from error
            return module, parts[count - 1 :]
        except (ImportError, SyntaxError) as error:
            raise ValueError(f"{where}: importing {name} failed: {error}.") from error
    raise ValueError(f"{where}: {path} is a module; name a class in it.")


def _call(target: Callable[..., Any], values: dict[str, Any], where: str, given: dict[str, Any]) -> Any:
    parameters = {
        key: parameter.replace(annotation=evaluate_hint(parameter.annotation, target))
        for key, parameter in inspect.signature(target).parameters.items()
    }
    name = getattr(target, "__qualname__", repr(target))
    arguments = _check_arguments(
        parameters, {key: item for key, item in values.items() if key not in given}, where, name
    )
    missing = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and key not in arguments
        and key not in given
    ]
    if missing:
        first = _join(where, missing[0])
        raise ValueError(f"{first} has no value, and {name} needs it; give it as {first}=...")
    try:
        return target(**arguments, **given)
    except ValueError as error:
        if not where or str(error).startswith(where):
            raise
        raise ValueError(f"{where}: {error}") from error
    except (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        if not lies_in(str(getattr(target, "__module__", "")), OWN_PREFIXES):
            raise  # a user's own class: the traceback is what helps
        raise ValueError(
            f"{where or name}: {name} cannot be made of these values ({type(error).__name__}: {error})."
        ) from error


def _check_arguments(
    parameters: dict[str, inspect.Parameter], values: dict[str, Any], where: str, name: str
) -> dict[str, Any]:
    """Values as the callable's annotations want them; unknown, missing and mistyped ones refused by name."""
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    checked: dict[str, Any] = {}
    for key, value in values.items():
        place = _join(where, key)
        if isinstance(value, str) and value == MISSING:
            raise ValueError(f"{place} has no value; give it as {place}=...")
        if key not in parameters or parameters[key].kind is inspect.Parameter.VAR_KEYWORD:
            if not open_ended:
                raise ValueError(unknown_option(place, str(key), list(parameters), name))
            checked[str(key)] = value
            continue
        hint = parameters[key].annotation
        checked[key] = value if hint is inspect.Parameter.empty else convert(value, hint, place)
    return checked


def unknown_option(place: str, key: str, options: Sequence[str], name: str) -> str:
    """The sentence for a key that does not exist."""
    listed = ", ".join(options) if options else "none"
    return f"{place} is not an option of {name}; options: {listed}.{_suggest(key, options)}"


def _suggest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _shown_name(found: Any) -> str:
    return str(getattr(found, "__qualname__", getattr(found, "__name__", repr(found))))


def _public_names(found: Any) -> list[str]:
    return [name for name in dir(found) if not name.startswith("_") and inspect.isclass(getattr(found, name, None))]

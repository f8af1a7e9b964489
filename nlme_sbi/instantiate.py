"""From a config section with ``_target_`` to the object it describes, without ever running foreign code.

A section may come from a run directory that somebody sent. So a ``_target_`` is resolved only where both its text and
the ``__module__`` of the object behind it lie under ``nlme_sbi.``, ``simulators.`` or a prefix that the user trusts:
``nlme_sbi.runs.os.system`` begins well and is refused all the same. Of our own modules only what describes a run can
be a target: classes, and the functions of ``nlme_sbi.io`` that read data.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nlme_sbi.conversion import convert, evaluate_hint

TARGET = "_target_"
OWN_PREFIXES = ("nlme_sbi", "simulators")
_READERS = "nlme_sbi.io"


def instantiate(
    node: Any, *, trust: Iterable[str] = (), where: str = "", given: Mapping[str, Any] | None = None
) -> Any:
    """Build what a config section describes; sections inside it are built first.

    Args:
        node: a section (dict or DictConfig) with ``_target_``, or a list or dict of such; anything else is returned.
        trust: module prefixes besides ours that a ``_target_`` may name.
        where: the section's place in the config, for messages.
        given: further keyword arguments for the outermost target, objects that no config can hold.

    Raises:
        ValueError: for a target that is not trusted or not there, an unknown or missing keyword, a value of the wrong
            type, or what the target itself refuses; with the config path and the remedy.
    """
    if isinstance(trust, str):
        raise ValueError(f'trust must be a list, for example trust=[{trust}]; got "{trust}".')
    return _build(_plain_node(node, where), tuple(trust), where, dict(given or {}))


def _plain_node(node: Any, where: str) -> Any:
    if not OmegaConf.is_config(node):
        return node
    try:
        return OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {str(error).splitlines()[0]}.") from error


def _build(node: Any, trust: tuple[str, ...], where: str, given: dict[str, Any]) -> Any:
    if isinstance(node, (list, tuple)):
        return [_build(item, trust, f"{where}[{position}]", {}) for position, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    values = {key: _build(item, trust, _join(where, key), {}) for key, item in node.items() if key != TARGET}
    if TARGET not in node:
        return values
    target = locate(node[TARGET], trust=trust, where=_join(where, TARGET))
    return _call(target, values, where, given)


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def locate(path: Any, *, trust: Iterable[str] = (), where: str = TARGET) -> Callable[..., Any]:
    """The class or function that a dotted path names; refused where it is not ours or trusted.

    Raises:
        ValueError: with the nearest name that exists, or with what to pass to trust it.
    """
    allowed = (*OWN_PREFIXES, *trust)
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"{where} must be a dotted path such as simulators.mrna_two_rate.MrnaTwoRate; got {path!r}.")
    # The text is checked before anything is imported, because importing a module runs it.
    _refuse_foreign(path, path, allowed, where)
    module, names = _import_longest(path, where)
    found: Any = module
    for name in names:
        if not hasattr(found, name):
            raise ValueError(f"{where}: {_shown_name(found)} has no {name}.{_suggest(name, _public_names(found))}")
        found = getattr(found, name)
    if not (inspect.isclass(found) or inspect.isroutine(found)):
        raise ValueError(f"{where}: {path} is neither a class nor a function.")
    home = str(getattr(found, "__module__", None))
    _refuse_foreign(home, path, allowed, where)
    _refuse_what_acts(found, home, path, where)
    return found


def _refuse_foreign(module: str, path: str, allowed: Sequence[str], where: str) -> None:
    if not any(module == prefix or module.startswith(f"{prefix}.") for prefix in allowed):
        outside = path.split(".")[0] if module == path else module
        raise ValueError(
            f"{where}: {path} comes from {outside}, which is neither part of nlme_sbi nor trusted. If the code is "
            f"yours or you have read it, pass trust=[{outside}]."
        )


def _refuse_what_acts(found: Any, home: str, path: str, where: str) -> None:
    """Our own functions may write files; a section that came from elsewhere must not be able to call them."""
    ours = home == "nlme_sbi" or home.startswith("nlme_sbi.")
    reads = home == _READERS or home.startswith(f"{_READERS}.")
    owner = getattr(found, "__self__", None)
    if ours and not (
        inspect.isclass(found) or inspect.isclass(owner) or (reads and not found.__name__.startswith("_"))
    ):
        raise ValueError(f"{where}: {path} is a function that does something; a target must be a class or a reader.")


def _import_longest(path: str, where: str) -> tuple[ModuleType, list[str]]:
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
    arguments = _checked(parameters, {key: item for key, item in values.items() if key not in given}, where, name)
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


def _checked(parameters: dict[str, inspect.Parameter], values: dict[str, Any], where: str, name: str) -> dict[str, Any]:
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

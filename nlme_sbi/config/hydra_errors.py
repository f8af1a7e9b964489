"""What Hydra and OmegaConf refuse, as one sentence with the nearest valid choice."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

_HIDDEN = ("_target_", "hydra")


def config_sentence(error: BaseException) -> str | None:
    """One sentence for an error of the configuration; None where the error is of another kind."""
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None
    if isinstance(error, MissingConfigException):
        return _missing_choice(error)
    if isinstance(error, OverrideParseException):
        return f'"{error.override}" cannot be read; write KEY=VALUE, with quotes around a value of special signs.'
    for cause in _chain(error):
        if isinstance(cause, MissingMandatoryValue):
            key = cause.full_key or str(cause)
            return f"{key} has no value; give it as {key}=..."
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
            return _unknown_key(cause)
        if isinstance(cause, (InterpolationResolutionError, UnsupportedInterpolationType)):
            return f"{cause.full_key or 'A value'} cannot be worked out: {_first_line(cause)}."
    if isinstance(error, ConfigCompositionException) and str(error).startswith("Ambiguous value"):
        argument = re.findall(r"'([^']*)'", str(error))[0]
        return f"{argument} names several values; add -m to run them one after another, or write a list as KEY=[A,B]."
    return _first_line(error).rstrip(".") + "."


def _missing_choice(error: MissingConfigException) -> str:
    found = re.search(r"Available options in '([^']*)'", str(error))
    wanted = str(error.missing_cfg_file)
    if found is None or not error.options:
        return f"There is no configuration {wanted}; look into the folder conf/ or give yours with --config-dir."
    group = found.group(1)
    choice = wanted[len(group) + 1 :]
    return f'{group} has no choice "{choice}"; choices: {", ".join(error.options)}.{_nearest(choice, error.options)}'


def _unknown_key(error: OmegaConfBaseException) -> str:
    parent = error.parent_node
    known = [str(key) for key in parent if key not in _HIDDEN] if isinstance(parent, DictConfig) else []
    place = str(error.full_key or error.key)
    owner = place.rpartition(".")[0] or "the configuration"
    if isinstance(parent, DictConfig) and not known:  # a section that waits for names, such as population.fixed
        return f"{place} is not a key of {owner}, which is empty; add it with a plus: +{place}=..."
    return f"{place} is not a key of {owner}; keys: {', '.join(known) or 'none'}.{_nearest(str(error.key), known)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

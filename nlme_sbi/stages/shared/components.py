"""Parts of a run from their config sections, refused by name where they are of another kind."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from nlme_sbi.config.instantiate import instantiate, role_members
from nlme_sbi.config.targets import ROLES, STORED_ROLES, Role
from nlme_sbi.config.wording import listed
from nlme_sbi.designs import Reader
from nlme_sbi.individual_model.neural.networks_within import require_trained
from nlme_sbi.individual_model.priors import PriorOfData
from nlme_sbi.individual_model.time_covariates import time_covariates_read
from nlme_sbi.simulation.shards import check_compatible
from nlme_sbi.types import DesignSource, Observations, Prior, Simulator

log = logging.getLogger(__name__)


def part(section: Any, role: type, *, where: str, trust: tuple[str, ...], roles: tuple[Role, ...] = ROLES) -> Any:
    """What a config section describes, which must have the members of the Protocol ``role``.

    Methods are checked on the class, before anything is built; what only an object has is checked on the object.

    Raises:
        ValueError: for a section that cannot be built, or that builds something of another kind; the latter is often a
            ``_target_`` of another group.
    """
    made = instantiate(section, trust=trust, where=where, role=role, roles=roles)
    lacking = [name for name in sorted(role_members(role)) if not hasattr(made, name)]
    if lacking:
        raise ValueError(
            f"{where} is a {type(made).__name__}, which is no {role.__name__}: it lacks {', '.join(lacking)}."
        )
    return made


def refuse_unread_courses(observations: Observations, simulator: Simulator) -> None:
    """Refuse covariates in time that the simulator does not read; raises ``ValueError`` with what to type."""
    course, read = observations.design.time_covariates, time_covariates_read(simulator)
    idle = [] if course is None else [name for name in course.names if name not in read]
    if idle:
        raise ValueError(
            f"data.time_covariates names {listed(idle)}, and {type(simulator).__name__} reads no such covariate along "
            f"the timeline. Say what follows it, such as 'simulator.time_covariates.CL={{{idle[0]}: {{form: power, "
            "reference: 70}}' with simulator=compartments or pkpd; or take its first value, "
            f"'data.covariates=[{idle[0]}]' data.covariate_value=first; or leave it out."
        )


def stored_part(section: Any, role: type, *, where: str, trust: tuple[str, ...]) -> Any:
    """As :func:`part`, for a section of a run directory: what that describes never reads a data file."""
    return part(section, role, where=where, trust=trust, roles=STORED_ROLES)


def with_stated_prior(
    plain: Mapping[str, Any], trust: tuple[str, ...], observations: Observations | None = None
) -> dict[str, Any]:
    """The configuration with ``prior=of_data`` replaced by the normal prior that doses and data give; others unchanged.

    Args:
        plain: a plain configuration with ``prior``, ``simulator`` and, where needed, ``data``.
        trust: module prefixes beside ours.
        observations: the data where they are already read.

    Raises:
        ValueError: there are no data, or the simulator states no scales.
    """
    section = plain["prior"]
    if not isinstance(section, Mapping) or not str(section.get("_target_", "")).endswith("PriorOfData"):
        return dict(plain)
    wanted: PriorOfData = part(section, PriorOfData, where="prior", trust=trust)
    simulator: Simulator = part(plain["simulator"], Simulator, where="simulator", trust=trust)
    if observations is None:
        if "_target_" not in (plain.get("data") or {}):
            raise ValueError("prior=of_data states a prior from data, and there are none; choose them with data=...")
        observations = part(plain["data"], Reader, where="data", trust=trust).read()
    stated = wanted.resolve(simulator, observations)
    shown = ", ".join(f"{name} {entry['mean']:g} (SD {entry['sd']:g})" for name, entry in stated["parameters"].items())
    log.info("Prior stated from doses and data, unconstrained scale: %s", shown)
    return {**plain, "prior": stated}


def generative_parts(config: Mapping[str, Any], trust: tuple[str, ...]) -> tuple[Prior, DesignSource, Simulator]:
    """Prior, design source and simulator of a plain configuration, checked to belong together."""
    prior, designs, simulator = (
        part(config[name], role, where=name, trust=trust)
        for name, role in (("prior", Prior), ("design", DesignSource), ("simulator", Simulator))
    )
    check_compatible(prior, designs, simulator)
    require_trained(simulator)
    return prior, designs, simulator

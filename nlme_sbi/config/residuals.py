"""``residuals.correlation=exponential``: what it changes in the sections simulator, prior and population."""

from __future__ import annotations

import math
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from nlme_sbi.config.conversion import convert
from nlme_sbi.config.wording import check_choice, listed

_WRAPPER = "nlme_sbi.WithCorrelatedResiduals"
CORRELATION_TIME, NUGGET = "correlation_time", "nugget"
PRIOR_SD = 1.5  # of their priors, on log and logit scale: wide


def correlate_residuals(cfg: DictConfig) -> None:
    """Give the simulator correlated residuals where the configuration asks for them: in place.

    The simulator is wrapped; a prior that names its parameters gets two more for each correlation time; and neither
    varies between individuals unless ``residuals.constant=false`` says so.

    Raises:
        ValueError: a prior that the parameters cannot be added to, or one that needs a correlation time.
    """
    section = OmegaConf.select(cfg, "residuals")
    if not isinstance(section, DictConfig) or "_target_" in section:  # train_hierarchical has its own
        return
    check_choice("residuals.correlation", str(section.correlation), ("none", "exponential"))
    if section.correlation == "none" or cfg.simulator.get("_target_") == _WRAPPER:
        return
    by_signal = convert(OmegaConf.to_container(section.by_signal), list[str], "residuals.by_signal")
    suffixes = [f"_{name}" for name in by_signal] or [""]
    times, nuggets = [f"{CORRELATION_TIME}{end}" for end in suffixes], [f"{NUGGET}{end}" for end in suffixes]
    with open_dict(cfg):
        cfg.simulator = {"_target_": _WRAPPER, "simulator": cfg.simulator, "by_signal": by_signal}
        _extend_prior(cfg.prior, times, nuggets, section.time)
    constant = OmegaConf.select(cfg, "population.constant")
    if convert(section.constant, bool, "residuals.constant") and isinstance(constant, ListConfig):
        constant.extend([name for name in (*times, *nuggets) if name not in constant])


def _extend_prior(prior: DictConfig, times: list[str], nuggets: list[str], expected: Any) -> None:
    """Normal priors of the two further parameters, where the prior does not have them already."""
    target = str(prior.get("_target_", ""))
    missing = [name for name in (*times, *nuggets) if name not in (prior.get("parameters") or {})]
    if target.endswith("PriorOfData") or not missing:
        return
    if not target.endswith(".GaussianPrior") or prior.get("correlation") is not None:
        raise ValueError(
            f"residuals.correlation=exponential adds the parameters {listed(missing)}, and this prior does not have "
            f"them; add a line for each to prior.parameters, after those of the simulator, or take prior=gaussian."
        )
    if expected is None:
        raise ValueError(
            "residuals.correlation=exponential needs the correlation time to expect, for the prior: type "
            "residuals.time=3, in the unit of the data's times."
        )
    time = convert(expected, float, "residuals.time")
    if not 0 < time < math.inf:
        raise ValueError(f"residuals.time must be positive; got {time:g}.")
    for name in missing:
        prior.parameters[name] = {"mean": round(math.log(time), 4) if name in times else 0.0, "sd": PRIOR_SD}

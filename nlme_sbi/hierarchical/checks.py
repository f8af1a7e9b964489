"""Whether a fitted hierarchy describes its data: coverage of predictions, residuals, weights, what was learnt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.compute.random_streams import seeded
from nlme_sbi.diagnostics.findings import Finding, Light
from nlme_sbi.diagnostics.fit.iwres import standardized_residuals
from nlme_sbi.hierarchical.model import HierarchicalModel
from nlme_sbi.hierarchical.predictions import draw_measurements
from nlme_sbi.hierarchical.regressors import levels_of
from nlme_sbi.hierarchical.residuals import CorrelatedResiduals
from nlme_sbi.hierarchical.scores import coverage, crps
from nlme_sbi.individual_model.noise.correlated import decorrelated
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.types import Design, Observations, SimulatorOutput

_LEVELS = (0.5, 0.9)
_NUMBERS = 20_000_000  # simulated readings at once
_FEW_DRAWS = 10.0


class HierarchySimulator:
    """A fitted hierarchy's model of measurements as a simulator: residuals are correlated where the fit's are.

    Args:
        model: fitted.
    """

    def __init__(self, model: HierarchicalModel) -> None:
        inner = model.simulator
        self.model = model
        self.parameters: ParameterSpace = inner.parameters
        self.signals: tuple[str, ...] = tuple(inner.signals)
        self.signal_units: tuple[str, ...] = tuple(inner.signal_units)
        self.time_unit: str = inner.time_unit
        self.covariates: tuple[str, ...] = tuple(inner.covariates)
        self.takes_doses: bool = inner.takes_doses

    def predict(self, phi: Float[Tensor, "I *batch D"], design: Design) -> Float[Tensor, "I *batch T C"]:
        """Noise-free signals."""
        return self.model.simulator.predict(phi, design)

    def log_likelihood(self, observations: Observations, phi: Float[Tensor, "I *batch D"]) -> Float[Tensor, I * batch]:
        """Of every individual and draw."""
        found: Tensor = self.model.residuals(self.model.simulator, observations, phi)
        return found

    def simulate(self, phi: Float[Tensor, "N D"], design: Design, generator: torch.Generator) -> SimulatorOutput:
        """Measurements of individuals with these parameters; status 1 where one is not finite."""
        values = draw_measurements(self.model, phi[:, None], design, generator)[:, 0]
        finite = torch.isfinite(values).flatten(1).all(1)
        return SimulatorOutput(torch.where(finite[:, None, None], values, 0.0), (~finite).long())


@torch.no_grad()
def coverage_table(
    model: HierarchicalModel,
    observations: Observations,
    phi: Float[Tensor, "I K D"],
    sides: Sequence[str],
    *seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> pd.DataFrame:
    """Share of readings within 50% and 90% bands, and CRPS, by signal, of the individuals of every side.

    Args:
        model: fitted.
        observations: prepared, of these individuals.
        phi: draws of new individuals in their places.
        sides: of each individual: fitted or held_out.
        seed: of the measurement noise.
        advance: called with the number of individuals just finished.
    """
    generator = seeded("cpu", *seed)
    step = max(1, _NUMBERS // (phi.shape[1] * observations.values[0].numel()))
    totals: dict[tuple[str, str], list[float]] = {}
    seen = observations.uncensored
    for rows in torch.split(torch.arange(len(observations)), step):
        some = observations[rows.tolist()]
        made = draw_measurements(model, phi[rows], some.design, generator)
        for side in dict.fromkeys(sides[row] for row in rows.tolist()):
            ours = [place for place, row in enumerate(rows.tolist()) if sides[row] == side]
            values, there = some.values[ours], seen[rows][ours]
            found = [
                *(coverage(made[ours], values, there, level) for level in _LEVELS),
                crps(made[ours], values, there),
            ]
            counts = there.sum((0, 1))
            for place, signal in enumerate(observations.signals):
                count = float(counts[place])
                if count == 0:
                    continue
                total = totals.setdefault((side, signal), [0.0] * (len(found) + 1))
                total[-1] += count
                for at, one in enumerate(found):
                    total[at] += count * float(one[place])
        advance(len(rows))
    rows_of = [
        {
            "side": side,
            "signal": signal,
            "readings": int(total[-1]),
            **{f"within_{100 * level:g}": total[at] / total[-1] for at, level in enumerate(_LEVELS)},
            "crps": total[len(_LEVELS)] / total[-1],
        }
        for (side, signal), total in totals.items()
    ]
    return pd.DataFrame(rows_of).sort_values("side", kind="stable").reset_index(drop=True)


@torch.no_grad()
def response_table(
    model: HierarchicalModel,
    observations: Observations,
    phi: Float[Tensor, "I K D"],
    sides: Sequence[str],
    *seed: int,
) -> pd.DataFrame:
    """The last reading of every individual and signal beside quantiles of its prediction, with groups and doses.

    Args:
        model: fitted.
        observations: prepared, of these individuals.
        phi: draws of new individuals in their places.
        sides: of each individual: fitted or held_out.
        seed: of the measurement noise.
    """
    design = observations.design
    seen = observations.design.observed.any(-1)
    last = torch.where(seen, torch.arange(seen.shape[1]), -1).amax(1)
    times = design.times.gather(1, last[:, None])
    observed = design.observed.gather(1, last[:, None, None].expand(-1, -1, design.observed.shape[2]))
    once = Design(times, torch.ones_like(observed), covariates=design.covariates, groups=design.groups)
    made = draw_measurements(model, phi, once, seeded("cpu", *seed))[:, :, 0]
    low, middle, high = torch.quantile(made, torch.tensor([0.05, 0.5, 0.95], dtype=made.dtype), dim=1)
    factors = list(model.hierarchy.levels)
    groups = [
        " ".join(parts) for parts in zip(*(levels_of(design.groups, one, len(sides)) for one in factors), strict=True)
    ]
    rows = []
    for row, name in enumerate(observations.ids):
        doses = {}
        if design.covariates is not None:
            doses = {f"dose {one}": float(design.covariates.column(one)[row]) for one in design.covariates.names}
        for place, signal in enumerate(observations.signals):
            if bool(observed[row, 0, place]):
                value = float(observations.values[row, last[row], place])
                bands = {"q5": float(low[row, place]), "q50": float(middle[row, place]), "q95": float(high[row, place])}
                about = {"id": name, "side": sides[row], "group": groups[row] if groups else "all", **doses}
                rows.append({**about, "signal": signal, "value": value, **bands})
    return pd.DataFrame(rows)


def coverage_finding(table: pd.DataFrame, side: str) -> Finding:
    """The finding of one side's 90% bands."""
    words = {"fitted": "fitted individuals", "held_out": "individuals that were held out"}[side]
    chosen = table[table.side == side]
    shares = dict(zip(chosen.signal, chosen.within_90.astype(float), strict=True))
    low, high = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    light: Light = "green"
    if shares[low] < 0.85 or shares[high] > 0.98:
        light = "red" if shares[low] < 0.7 else "amber"
    remedy = ""
    if shares[low] < 0.85:
        remedy = (
            " Bands are too narrow: something differs between individuals that the model shares, or a grouping "
            "variable is missing (data.groups)."
        )
    elif light != "green":
        remedy = " Bands are too wide: predictions are less certain than they need be."
    return Finding(
        f"coverage_{side}",
        f"Predictions of {words}",
        light,
        f"90% bands of predictions that did not see the series hold {100 * shares[low]:.0f}% ({low}) to "
        f"{100 * shares[high]:.0f}% ({high}) of the readings of {words}.{remedy}",
        "Green: 85 to 98% in every signal; amber: 70% or more, or above 98%; red: less than 70% in some signal. "
        "Readings of one series hang together, so this is a rule of size and no test.",
        {"lowest": shares[low], "highest": shares[high]},
    )


@torch.no_grad()
def residual_table(
    model: HierarchicalModel, observations: Observations, phi: Float[Tensor, "I D"], generator: torch.Generator
) -> pd.DataFrame:
    """Residuals of one posterior draw each, in units of their SD and decorrelated in time, by signal.

    Plain standard normals under the model: ``mean``, ``sd``, ``beyond`` (share outside 1.96), ``neighbours``, the
    correlation of residuals that follow each other. A saturated reading gets a draw of the noise beyond its limit: to
    leave it out would leave those below it.

    Args:
        model: fitted.
        observations: prepared.
        phi: one draw of each individual.
        generator: of the draws for censored readings.
    """
    simulator, noise = model.simulator, model.simulator.noise
    prediction = simulator.predict(phi[:, None], observations.design)[:, 0]
    parameters = simulator.noise_parameters(phi[:, None], observations.design)
    sd = noise.standard_deviation(prediction[:, None], parameters)[:, 0].double()
    there = observations.design.observed
    white = standardized_residuals(simulator, observations, prediction.double(), sd.expand(there.shape), generator)
    if isinstance(model.residuals, CorrelatedResiduals):
        time, nugget = model.residuals.correlation_time.double(), model.residuals.nugget.double()
        white = decorrelated(white, observations.design.times.double(), there, time, nugget)
    rows = []
    for place, signal in enumerate(observations.signals):
        mask = there[..., place]
        shown = white[..., place][mask]
        pairs = mask[:, 1:] & mask[:, :-1]
        first, second = white[:, :-1, place][pairs], white[:, 1:, place][pairs]
        together = torch.corrcoef(torch.stack([first, second]))[0, 1] if len(first) > 2 else torch.tensor(math.nan)
        rows.append(
            {
                "signal": signal,
                "readings": len(shown),
                "mean": float(shown.mean()),
                "sd": float(shown.std()),
                "beyond": float((shown.abs() > 1.959964).double().mean()),
                "neighbours": float(together),
            }
        )
    return pd.DataFrame(rows)


def residual_finding(table: pd.DataFrame) -> Finding:
    """The finding of residuals of all signals."""
    departures = {
        "mean": (table["mean"].abs(), 0.1, 0.3),
        "SD": ((table["sd"].clip(lower=1e-9)).map(lambda sd: abs(math.log(sd))), math.log(1.2), math.log(1.6)),
        "correlation of neighbours": (table["neighbours"].abs(), 0.15, 0.4),
    }
    faults, light = [], "green"
    for name, (values, amber, red) in departures.items():
        for signal, value in zip(table.signal, values, strict=True):
            if value > amber:
                light = "red" if value > red or light == "red" else "amber"
                column = {"mean": "mean", "SD": "sd"}.get(name, "neighbours")
                shown = float(table.loc[table.signal == signal, column].iloc[0])
                faults.append(f"{signal} has a {name} of {shown:.2f}")
    sentence = "Residuals of all signals look like independent standard normals."
    if faults:
        sentence = f"Residuals depart from independent standard normals: {'; '.join(faults)}."
        if any("neighbours" in fault for fault in faults):
            sentence += " Correlated residuals: residuals.correlation=exponential."
        elif any("SD" in fault for fault in faults):
            sentence += " Let noise be each individual's own, or combined (simulator.noise=combined)."
    return Finding(
        "residuals",
        "Residuals",
        light,  # type: ignore[arg-type]
        sentence,
        "Of one posterior draw an individual, divided by their SD and decorrelated in time. Amber: a mean beyond 0.1, "
        "an SD beyond a factor of 1.2, or a correlation of neighbours beyond 0.15; red: 0.3, 1.6, 0.4.",
        {
            f"{name} {signal}": float(value)
            for name in ("mean", "sd", "neighbours")
            for signal, value in zip(table.signal, table[name], strict=True)
        },
    )


def weight_finding(effective: Float[Tensor, " I"], proposals: int) -> Finding:
    """How many of the draws of individuals count under the fitted population."""
    median = float(effective.median())
    few = int((effective < _FEW_DRAWS).sum())
    light: Light = "green" if few == 0 else ("amber" if median >= _FEW_DRAWS else "red")
    sentence = f"Of {proposals} draws of an individual {median:.0f} are effective (median)."
    if few:
        sentence += (
            f" {few} of {len(effective)} individuals have less than {_FEW_DRAWS:g}: their posteriors are rough and "
            "rather too narrow, and log densities too low. Train longer (training.steps, training.max_cpu_seconds)."
        )
    return Finding(
        "weights",
        "Draws of the individuals",
        light,
        sentence,
        "Green: at least 10 effective draws for everybody; amber: for half of them; red: for less.",
        {"median": median, "few": few},
    )


def learnt_finding(shared: pd.DataFrame) -> Finding:
    """What the data say of globals and effects of groups: posterior against prior SDs."""
    ratio = shared.sd / shared.prior_sd
    names = [
        f"{parameter}[{level}]" if level else str(parameter)
        for parameter, level, value in zip(shared["parameter"], shared["level"], ratio, strict=True)
        if value > 0.8
    ]
    moved = ((shared["mean"] - shared.prior_mean).abs() > 3 * shared.prior_sd).sum()
    light: Light = "green" if not names and not moved else "amber"
    sentence = f"The data tell all {len(shared)} shared parameters."
    if names:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        sentence = (
            f"The data say little of {len(names)} of {len(shared)} shared parameters, whose priors decide: {shown}."
        )
    if moved:
        sentence += f" {int(moved)} lie more than 3 prior SDs from their prior's mean: look at that prior."
    return Finding(
        "learnt",
        "What was learnt of what is shared",
        light,
        sentence,
        "Green: every posterior SD is below 0.8 prior SDs, and every mean within 3 prior SDs; amber otherwise. "
        "Variational posteriors are rather too narrow where data say little.",
        {"undetermined": len(names), "shared": len(shared)},
    )


def grouping_finding(notes: Sequence[str]) -> Finding:
    """What is to be known of the grouping variables."""
    return Finding(
        "groups",
        "Grouping variables",
        "amber" if notes else "green",
        " ".join(notes)
        or "Every level of every grouping variable has several individuals, and no two divide them alike.",
        "Amber: a level of one individual, or two variables that divide the individuals in the same way.",
    )

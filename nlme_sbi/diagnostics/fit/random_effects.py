"""Random effects of a fit: their distribution, shrinkage, what covariates leave unexplained.

Posterior means of random effects shrink towards 0 and are no sample of the population. One draw of each individual
from ``p(phi | y_i, theta)`` is one, where the model is right; so distributions are tested on single draws, and p-values
of several of them are combined as twice their median, which is conservative. Where the population model is not
Gaussian, each deviation is replaced by the normal quantile of its probability in that model. Covariates are tested on
posterior means, whose expectation is 0 whatever the covariate, where the model is right.

Source: Lavielle and Ribba (2016), Pharm. Res. 33:2979; Savic and Karlsson (2009), AAPS J. 11:558, on shrinkage;
Ruger (1978), Metrika 25:171, for twice the median of p-values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import chi2, f_oneway, norm, pearsonr, rankdata, shapiro
from torch import Tensor

from nlme_sbi.diagnostics.findings import Finding
from nlme_sbi.numerics.multiple_testing import holm, twice_the_median
from nlme_sbi.types import Covariates, Design

_SINGLE_DRAWS = 20  # of every individual, each a sample of its own
_FEWEST = 8  # individuals from which a distribution can be judged
_MOST = 4000  # individuals that the test of normality is calibrated for
_LEVEL_SIZE = 2  # individuals that a level of a covariate needs
_SHRUNK = 0.3


@dataclass(frozen=True, eq=False)
class RandomEffects:
    """Standardised random effects of the ``V`` parameters that vary.

    Args:
        ids: of the individuals.
        names: of the V parameters.
        mean: ``(I, V)`` posterior means, in the population's SDs.
        sd: ``(I, V)`` posterior SDs, in the population's SDs.
        drawn: ``(R, I, V)`` single draws of every individual, in the population's SDs, or as normal scores in a
            population that is not Gaussian.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    mean: Float[Tensor, "I V"]
    sd: Float[Tensor, "I V"]
    drawn: Float[Tensor, "R I V"]

    @property
    def shrinkage(self) -> Float[Tensor, " V"]:
        """1 - SD of the posterior means; NaN for one individual."""
        return 1 - self.mean.std(0) if len(self.ids) > 1 else torch.full_like(self.mean[0], math.nan)

    def to_frame(self) -> pd.DataFrame:
        """One row for each individual and parameter: id, parameter, eta, sd, drawn (the first draw), normal_score (what
        a normal sample of this size has at the draw's rank: the QQ plot's other axis)."""
        first = self.drawn[0].cpu().numpy()
        count = len(self.ids)
        # Blom (1958): about the expectation of an order statistic of a normal sample.
        scores = norm.ppf((rankdata(first, axis=0) - 0.375) / (count + 0.25))
        parts = [
            pd.DataFrame(
                {
                    "id": self.ids,
                    "parameter": name,
                    "eta": self.mean[:, place].cpu().numpy(),
                    "sd": self.sd[:, place].cpu().numpy(),
                    "drawn": first[:, place],
                    "normal_score": scores[:, place],
                }
            )
            for place, name in enumerate(self.names)
        ]
        return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True, eq=False)
class EffectTests:
    """Tests with p-values adjusted by Holm's method over all of them.

    Args:
        table: one row a test.
        level: familywise error rate.
    """

    table: pd.DataFrame
    level: float

    @property
    def rejected(self) -> pd.DataFrame:
        """The rows that are rejected, smallest p-value first."""
        return self.table[self.table["rejected"]].sort_values("p_adjusted")


def random_effects(
    draws: Float[Tensor, "I S D"],
    typical: Float[Tensor, "I D"],
    sd: Float[Tensor, "I D"],
    *,
    ids: tuple[str, ...],
    names: tuple[str, ...],
    generator: torch.Generator,
    reference: Float[Tensor, "n D"] | None = None,
) -> RandomEffects:
    """Standardised random effects from draws of every individual.

    Args:
        draws: of ``p(phi | y_i, theta_hat)``.
        typical: each individual's typical value.
        sd: each individual's SD between individuals; 0 for what does not vary, which is left out.
        ids: of the individuals.
        names: of the D parameters.
        generator: which draws are single ones.
        reference: standardised deviations that the population model makes, many; None where they are normal.

    Raises:
        ValueError: where nothing varies, or draws are not finite.
    """
    varying = torch.nonzero((sd > 0).all(0))[:, 0]
    if len(varying) == 0:
        raise ValueError("No parameter varies between individuals, so there are no random effects to look at.")
    eta = (draws[..., varying] - typical[:, None, varying]) / sd[:, None, varying]
    if not bool(torch.isfinite(eta).all()):
        broken = int((~torch.isfinite(eta)).flatten(1).any(1).sum())
        raise ValueError(f"{broken} individuals have draws that are not finite; fit again with more draws.")
    single = min(_SINGLE_DRAWS, draws.shape[1])
    order = torch.rand(draws.shape[:2], generator=generator, device=draws.device).argsort(1)[:, :single]
    drawn = eta.gather(1, order[..., None].expand(-1, -1, len(varying))).transpose(0, 1)
    if reference is not None:
        drawn = _normal_scores(drawn, reference[:, varying].to(drawn))
    return RandomEffects(
        ids=ids, names=tuple(names[int(place)] for place in varying), mean=eta.mean(1), sd=eta.std(1), drawn=drawn
    )


def _normal_scores(drawn: Float[Tensor, "R I V"], reference: Float[Tensor, "n V"]) -> Float[Tensor, "R I V"]:
    """Normal quantiles of the probabilities that deviations have in a large sample, interpolated within it."""
    count = len(reference)
    probability = (np.arange(1, count + 1) - 0.5) / count
    scores = [
        norm.ppf(np.interp(drawn[..., place].cpu().numpy(), np.sort(reference[:, place].cpu().numpy()), probability))
        for place in range(drawn.shape[-1])
    ]
    return torch.as_tensor(np.stack(scores, -1)).to(drawn)


def distribution_tests(effects: RandomEffects, *, level: float = 0.05) -> EffectTests:
    """Whether random effects are normal (Shapiro and Wilk) with the population's SD; one row a parameter: parameter,
    mean, sd (of the single draws), p_normal, p_sd, p_adjusted, rejected. At most 4000 individuals enter, evenly chosen.

    Raises ``ValueError`` for fewer than 8 individuals.
    """
    count = len(effects.ids)
    if count < _FEWEST:
        raise ValueError(f"The distribution of random effects needs at least {_FEWEST} individuals; there are {count}.")
    rows = np.linspace(0, count - 1, min(count, _MOST)).round().astype(int)
    drawn = effects.drawn[:, rows].double().cpu().numpy()
    table = []
    for place, name in enumerate(effects.names):
        samples = drawn[..., place]
        normal = twice_the_median([float(shapiro(sample).pvalue) for sample in samples])
        spread = twice_the_median([_p_of_variance(sample) for sample in samples])
        table.append(
            {
                "parameter": name,
                "mean": float(samples.mean()),
                "sd": float(np.sqrt(samples.var(axis=1, ddof=1).mean())),
                "p_normal": normal,
                "p_sd": spread,
            }
        )
    frame = pd.DataFrame(table)
    adjusted = holm(frame[["p_normal", "p_sd"]].to_numpy().ravel()).reshape(-1, 2).min(1)
    return EffectTests(frame.assign(p_adjusted=adjusted, rejected=adjusted <= level), level)


def _p_of_variance(sample: Float[np.ndarray, " n"]) -> float:
    """That a normal sample about 0 has variance 1."""
    total, count = float((sample**2).sum()), len(sample)
    return min(1.0, 2 * min(float(chi2.sf(total, count)), float(chi2.cdf(total, count))))


def covariate_tests(effects: RandomEffects, design: Design, *, level: float = 0.05) -> EffectTests:
    """Whether random effects depend on the covariates of the data, those of the fitted model among them.

    One row for each parameter and covariate: parameter, covariate, kind (numeric: correlation; categorical: analysis of
    variance), effect (the correlation, or the largest difference between means of levels), p, p_adjusted, rejected,
    individuals (that have the covariate; levels of a single individual are left out).

    Raises ``ValueError`` where the data have no covariates, or none that differs between individuals.
    """
    covariates = design.covariates
    if covariates is None or not covariates.names:
        raise ValueError("The data have no covariates (data.covariates), so nothing can depend on them.")
    table = [
        {"parameter": name, "covariate": covariate, **row}
        for covariate in covariates.names
        for place, name in enumerate(effects.names)
        if (row := _one_covariate(covariates, covariate, effects.mean[:, place].double().cpu().numpy())) is not None
    ]
    if not table:
        raise ValueError("No covariate of the data differs enough between individuals to explain anything.")
    frame = pd.DataFrame(table)
    adjusted = holm(frame["p"].to_numpy())
    return EffectTests(frame.assign(p_adjusted=adjusted, rejected=adjusted <= level), level)


def _one_covariate(covariates: Covariates, name: str, eta: Float[np.ndarray, " I"]) -> dict[str, object] | None:
    """The test of one random effect against one covariate; None where the covariate carries no information."""
    values = covariates.column(name).double().cpu().numpy()
    known = np.isfinite(values)
    values, eta = values[known], eta[known]
    if name in covariates.levels:
        groups = [eta[values == code] for code in np.unique(values)]
        groups = [group for group in groups if len(group) >= _LEVEL_SIZE]
        if len(groups) < 2:
            return None
        means = [float(group.mean()) for group in groups]
        p = float(f_oneway(*groups).pvalue)
        count = sum(map(len, groups))
        return {"kind": "categorical", "effect": max(means) - min(means), "p": p, "individuals": count}
    if len(values) < 4 or np.ptp(values) == 0:
        return None
    found = pearsonr(values, eta)
    return {
        "kind": "numeric",
        "effect": float(found.statistic),
        "p": float(found.pvalue),
        "individuals": len(values),
    }


def distribution_finding(tests: EffectTests) -> Finding:
    """Amber where some distribution is rejected at the familywise level."""
    bad = tests.rejected
    if len(bad) == 0:
        sentence = "Random effects are distributed as the population model says (no parameter is rejected)."
    else:
        named = ", ".join(
            f"{row.parameter} (SD {row.sd:.2f} of the model's, normality p = {row.p_normal:.2g})"
            for row in bad.itertuples()
        )
        sentence = (
            f"Random effects are not distributed as the population model says: {named}. Look for groups, outlying "
            "individuals or another transform; standard errors by the sandwich and the bootstrap are safer then."
        )
    return Finding(
        check="random_effects",
        title="Distribution of the random effects",
        light="amber" if len(bad) else "green",
        sentence=sentence,
        rule=(
            "Single draws of every individual: Shapiro-Wilk and variance against the model's, twice the median "
            f"p-value over draws, Holm over parameters: at most {100 * tests.level:g}% false alarms for all together."
        ),
        numbers={
            "rejected": len(bad),
            "tests": 2 * len(tests.table),
            "smallest_p": float(tests.table.p_adjusted.min()),
        },
    )


def covariate_finding(tests: EffectTests) -> Finding:
    """Amber where some covariate explains a random effect at the familywise level."""
    bad = tests.rejected
    if len(bad) == 0:
        sentence = f"No covariate explains what the fit left to random effects ({len(tests.table)} pairs looked at)."
    else:
        named = ", ".join(
            f"{row.parameter} with {row.covariate} "
            + (
                f"(correlation {row.effect:.2f})"
                if row.kind == "numeric"
                else f"(means differ by {row.effect:.2f} SDs)"
            )
            for row in bad.itertuples()
        )
        sentence = (
            f"Random effects go with covariates: {named}. Give the population model these effects "
            "(population.covariates), and compare the fits."
        )
    return Finding(
        check="covariates",
        title="Covariates left unexplained",
        light="amber" if len(bad) else "green",
        sentence=sentence,
        rule=(
            "Posterior means of the random effects against each covariate of the data (correlation, or analysis of "
            f"variance), Holm over all pairs: at most {100 * tests.level:g}% false alarms for all together."
        ),
        numbers={"rejected": len(bad), "tests": len(tests.table), "smallest_p": float(tests.table.p_adjusted.min())},
    )


def shrinkage_finding(effects: RandomEffects) -> Finding:
    """Amber where some parameter's shrinkage is above 0.3: its posterior means must not be looked at like a sample."""
    found = dict(zip(effects.names, effects.shrinkage.tolist(), strict=True))
    high = {name: value for name, value in found.items() if value > _SHRUNK}
    listed = ", ".join(f"{name} {100 * value:.0f}%" for name, value in (high or found).items())
    if high:
        sentence = (
            f"Individual estimates are shrunk towards the typical value: {listed}. Do not plot them like a sample of "
            "the population or regress them on covariates by eye; the fit itself is not affected."
        )
    else:
        sentence = f"The individuals' data determine their own parameters (shrinkage: {listed})."
    return Finding(
        check="shrinkage",
        title="Shrinkage",
        light="amber" if high else "green",
        sentence=sentence,
        rule=f"Amber where 1 - SD of the posterior means over the population's SD is above {_SHRUNK:g}; no test.",
        numbers={f"shrinkage.{name}": value for name, value in found.items()},
    )

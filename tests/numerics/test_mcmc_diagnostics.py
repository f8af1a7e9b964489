"""R-hat and effective sample sizes against ArviZ and against chains whose autocorrelation is known."""

from __future__ import annotations

import numpy as np
import pytest

from nlme_sbi.numerics.mcmc_diagnostics import bulk_ess, split_rhat, tail_ess


def autoregressive(correlation: float, *, chains: int, draws: int, seed: int) -> np.ndarray:
    """Stationary chains of unit variance with correlation ``correlation**lag``."""
    random = np.random.default_rng(seed)
    values = np.empty((chains, draws))
    values[:, 0] = random.standard_normal(chains)
    for step in range(1, draws):
        fresh = random.standard_normal(chains)
        values[:, step] = correlation * values[:, step - 1] + np.sqrt(1 - correlation**2) * fresh
    return values


CASES = {
    "independent": autoregressive(0.0, chains=4, draws=500, seed=1),
    "slow": autoregressive(0.9, chains=4, draws=1000, seed=2),
    "antithetic": autoregressive(-0.5, chains=3, draws=400, seed=3),
    "one chain": autoregressive(0.3, chains=1, draws=600, seed=4),
    "heavy tails": np.random.default_rng(5).standard_cauchy((4, 300)),
    "apart": autoregressive(0.2, chains=4, draws=300, seed=6) + np.arange(4)[:, None],
    "unequal scales": autoregressive(0.2, chains=4, draws=300, seed=7) * np.array([1.0, 1.0, 1.0, 4.0])[:, None],
    "ties": np.round(autoregressive(0.5, chains=4, draws=300, seed=8)),
    "short": autoregressive(0.0, chains=2, draws=6, seed=9),
}


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_arviz(case: str) -> None:
    arviz = pytest.importorskip("arviz_stats.base", reason="arviz-stats needs Python 3.11 or newer").array_stats
    chains = CASES[case]
    axes = {"chain_axis": 0, "draw_axis": 1}
    if len(chains) > 1:  # for one chain ArviZ gives no R-hat; its halves can be compared all the same
        assert split_rhat(chains) == pytest.approx(float(arviz.rhat(chains, method="rank", **axes)), rel=1e-9)
    # The last lag of all counts once there and twice here, which shows where correlations stay positive to the end.
    assert bulk_ess(chains) == pytest.approx(float(arviz.ess(chains, method="bulk", **axes)), rel=0.02)
    found = float(arviz.ess(chains, method="tail", prob=(0.05, 0.95), **axes))
    assert tail_ess(chains) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_the_effective_number_is_that_of_the_known_autocorrelation(correlation: float) -> None:
    chains = autoregressive(correlation, chains=4, draws=5000, seed=11)
    expected = chains.size * (1 - correlation) / (1 + correlation)
    # The estimate's own relative error is about sqrt(2 window / draws): 10% here; three of them.
    assert bulk_ess(chains) == pytest.approx(expected, rel=0.3)
    assert split_rhat(chains) < 1.01


def test_chains_that_have_not_met_are_rejected() -> None:
    mixed = autoregressive(0.3, chains=4, draws=500, seed=12)
    assert split_rhat(mixed) < 1.01
    stuck = mixed + np.array([0.0, 0.0, 0.0, 2.0])[:, None]
    assert split_rhat(stuck) > 1.1
    assert bulk_ess(stuck) < 0.05 * stuck.size
    assert split_rhat(mixed * np.array([1.0, 1.0, 1.0, 3.0])[:, None]) > 1.05  # same place, other width
    assert split_rhat(mixed + np.linspace(0, 3, 500)) > 1.1  # all drift alike: only halves tell
    constant = np.repeat(np.arange(4.0)[:, None], 100, axis=1)
    assert split_rhat(constant) > 1e6


def test_values_that_are_none_give_no_number_and_too_few_are_refused() -> None:
    broken = np.zeros((2, 10))
    broken[1, 3] = np.nan
    assert all(np.isnan(measure(broken)) for measure in (split_rhat, bulk_ess, tail_ess))
    assert split_rhat(np.ones((2, 10))) == 1.0
    assert bulk_ess(np.ones((2, 10))) == 20
    with pytest.raises(ValueError, match=r"at least one chain of 4 draws; got 2 of 3"):
        split_rhat(np.zeros((2, 3)))

"""Claims about reaction networks: the master equation's law, leaps close to it, whole numbers, refusals."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import expm
from torch import Tensor

from nlme_sbi.individual_model.stochastic_models.reaction_network import Leaping, ReactionNetwork
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design, Simulator, TractableSimulator

NAMES = ("birth", "pairing", "breaking")


class Dimers(ReactionNetwork):
    """Monomers are born and pair; pairs break: 0 -> A, 2 A -> B, B -> 2 A."""

    parameters = ParameterSpace(tuple(Parameter(name, "1/h") for name in NAMES))
    signals = ("monomers", "pairs")
    signal_units = ("", "")
    stoichiometry = ((1, 0), (-2, 1), (2, -1))

    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return torch.tensor([4.2, 0.9]).expand(len(design), 2)  # rounded to 4 and 1

    def propensities(self, counts: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        a, b = counts.unbind(-1)
        return torch.stack(
            [natural["birth"].expand_as(a), natural["pairing"] * a * (a - 1) / 2, natural["breaking"] * b], dim=-1
        )

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return states


RATES = (0.8, 0.6, 0.5)
LARGEST = 24  # monomers in all; more have a probability below 1e-12


def _master_equation(time: float) -> dict[tuple[int, int], float]:
    """Probabilities of all states at ``time`` by the matrix exponential."""
    states = [(a, b) for b in range(LARGEST // 2 + 1) for a in range(LARGEST - 2 * b + 1)]
    place = {state: row for row, state in enumerate(states)}
    birth, pairing, breaking = RATES
    generator = np.zeros((len(states), len(states)))
    for (a, b), row in place.items():
        for target, rate in (
            ((a + 1, b), birth),
            ((a - 2, b + 1), pairing * a * (a - 1) / 2),
            ((a + 2, b - 1), breaking * b),
        ):
            if rate > 0 and target in place:
                generator[place[target], row] += rate
                generator[row, row] -= rate
    return dict(zip(states, expm(generator * time)[:, place[4, 1]], strict=True))


@pytest.mark.parametrize("method", ["ssa", "tau_leaping"])
def test_counts_follow_the_master_equation(method: str, generator: torch.Generator) -> None:
    """With so few molecules leaping comes down to single events, and has the same law."""
    count = 20_000
    times = torch.tensor([0.3, 1.5])
    phi = torch.tensor(RATES).log().expand(count, 3)
    values = Dimers(method).simulate(phi, Design.regular(times, count, signals=2), generator).values
    for column, time in enumerate(times.tolist()):
        exact = _master_equation(time)
        assert sum(exact.values()) == pytest.approx(1, abs=1e-9)
        found, numbers = np.unique(values[:, column].numpy().astype(int), axis=0, return_counts=True)
        seen = dict(zip(map(tuple, found.tolist()), numbers.tolist(), strict=True))
        assert set(seen) <= set(exact)
        common = [state for state, p in exact.items() if count * p >= 10]
        expected = [count * exact[state] for state in common]
        observed = [seen.get(state, 0) for state in common]
        rest, seen_rest = count - sum(expected), count - sum(observed)
        assert rest >= 5
        # Two times, two methods: a false alarm in 2,500 seeds.
        assert stats.chisquare([*observed, seen_rest], [*expected, rest], sum_check=False).pvalue > 1e-4


class Expression(ReactionNetwork):
    """mRNA decays and is translated, protein decays: linear, so that all moments are known."""

    parameters = ParameterSpace((*(Parameter(name, "1/h") for name in ("delta", "k", "gamma")), Parameter("m0", "")))
    signals = ("mrna", "protein")
    signal_units = ("", "")
    stoichiometry = ((-1, 0), (0, 1), (0, -1))

    def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return torch.stack([natural["m0"], torch.zeros_like(natural["m0"])], dim=-1)

    def propensities(self, counts: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        m, p = counts.unbind(-1)
        return torch.stack([natural["delta"] * m, natural["k"] * m, natural["gamma"] * p], dim=-1)

    def observe(self, states: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
        return states


def moments(delta: float, k: float, gamma: float, m0: float, time: float) -> tuple[np.ndarray, np.ndarray]:
    """Means and covariance of mRNA and protein: independent molecules, whose proteins are Poisson given its life.

    By the linear moment equations, solved as one matrix exponential in (m, p, mm, mp, pp).
    """
    a = np.zeros((5, 5))
    a[0, 0], a[1, 0], a[1, 1] = -delta, k, -gamma
    a[2, 2], a[2, 0] = -2 * delta, delta
    a[3, 3], a[3, 2] = -delta - gamma, k
    a[4, 4], a[4, 3], a[4, 0], a[4, 1] = -2 * gamma, 2 * k, k, gamma
    m, p, mm, mp, pp = expm(a * time) @ np.array([m0, 0, 0, 0, 0])
    return np.array([m, p]), np.array([[mm, mp], [mp, pp]])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "m0", "count"), [("ssa", 6.0, 20_000), ("tau_leaping", 3000.0, 10_000)])
def test_moments_of_gene_expression(method: str, m0: float, count: int, generator: torch.Generator) -> None:
    rates = (0.4, 1.5, 0.2)
    phi = torch.tensor([*rates, m0], dtype=torch.float64).log().expand(count, 4)
    design = Design.regular(torch.tensor([0.5, 3.0]), count, signals=2)
    values = Expression(method).simulate(phi, design, generator).values
    for column, time in enumerate((0.5, 3.0)):
        mean, covariance = moments(*rates, m0, time)
        sample = values[:, column].numpy()
        sd = np.sqrt(np.diag(covariance))
        # Leaps at midpoints with changes of 3%/2: means are off by a part in ten thousand, variances by 2%.
        bias, slack = (0.0, 0.0) if method == "ssa" else (1e-4, 0.02)
        # 2 x 2 means and 2 x 3 (co)variances at 4.5 standard errors; kurtosis of so few molecules makes 1.3 of it.
        assert (np.abs(sample.mean(0) - mean) < 4.5 * sd / math.sqrt(count) + bias * mean).all()
        error = 1.3 * np.sqrt((np.outer(sd, sd) ** 2 + covariance**2) / count)
        assert (np.abs(np.cov(sample.T) - covariance) < 4.5 * error + slack * np.outer(sd, sd)).all()


@pytest.mark.slow
def test_leaps_are_close_to_single_events_where_both_can_be_made(generator: torch.Generator) -> None:
    class Crowded(Dimers):
        def initial_state(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
            return torch.tensor([600.0, 0.0]).expand(len(design), 2)

    count = 1500
    phi = torch.tensor([20.0, 0.002, 0.4]).log().expand(count, 3)
    design = Design.regular(torch.tensor([0.4, 2.0]), count, signals=2)
    exact, leaped = (Crowded(method).simulate(phi, design, generator).values for method in ("ssa", "tau_leaping"))
    for column in range(2):
        for signal in range(2):
            # Four tests of one law; leaps with a share of 0.03 are not seen by 1500 paths.
            assert stats.ks_2samp(exact[:, column, signal], leaped[:, column, signal]).pvalue > 1e-4


@pytest.mark.slow
def test_counts_are_whole_numbers_and_never_negative(generator: torch.Generator) -> None:
    phi = torch.tensor([3.0, 0.5, 0.1, 300.0]).log().expand(500, 4)
    design = Design.regular(torch.linspace(0.1, 6, 30), 500, signals=2)
    values = Expression("tau_leaping").simulate(phi, design, generator).values
    assert torch.equal(values, values.round())
    assert float(values.min()) == 0
    assert bool((values[:, 1:, 0] <= values[:, :-1, 0]).all())  # mRNA only decays


def test_what_cannot_react_any_more_stays_as_it_is_and_measurements_may_be_anywhere(generator: torch.Generator) -> None:
    class Late(Expression):
        def start_time(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
            return torch.full_like(natural["m0"], 2.0)

    phi = torch.tensor([50.0, 1e-9, 50.0, 5.0]).log().expand(3, 4)
    times = torch.tensor([[0.0, 1.0, 2.0, 2.0], [1.0, 40.0, 40.0, 90.0], [3.0, 4.0, 5.0, 5.0]])
    for method in ("ssa", "tau_leaping"):
        values = Late(method).simulate(phi, Design(times, torch.ones((3, 4, 2), dtype=torch.bool)), generator).values
        assert values[0, :, 0].tolist() == [5, 5, 5, 5]
        assert values[1, :, 0].tolist() == [5, 0, 0, 0]
        assert values[2, :, 0].tolist() == [0, 0, 0, 0]


def test_the_same_seed_gives_the_same_bytes_and_individuals_are_independent() -> None:
    phi = torch.tensor([0.4, 1.5, 0.2, 20.0]).log().expand(4000, 4)
    design = Design.regular(torch.tensor([2.0]), 4000, signals=2)
    first, again = (Expression().simulate(phi, design, torch.Generator().manual_seed(5)).values for _ in range(2))
    assert torch.equal(first, again)
    pairs = first[:, 0, 1].reshape(2000, 2).T
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 4.5 / math.sqrt(2000)


def test_too_many_events_and_impossible_rates_fail_alone(generator: torch.Generator) -> None:
    class Busy(Expression):
        max_events = 400

        def start_time(self, natural: Mapping[str, Tensor], design: Design) -> Tensor:
            return torch.where(natural["gamma"] > 1, torch.nan, 0.0)

    rows = [[0.4, 1.5, 0.2, 20.0], [0.4, 1e6, 0.2, 20.0], [0.4, math.nan, 0.2, 20.0], [0.4, 1.5, 2.0, 20.0]]
    phi = torch.tensor(rows).log()
    output = Busy().simulate(phi, Design.regular(torch.tensor([2.0]), 4, signals=2), generator)
    assert output.status.tolist() == [0, 1, 1, 1]


def test_wrong_models_are_refused_with_the_remedy(generator: torch.Generator) -> None:
    design = Design.regular(torch.ones(1), 2, signals=2)
    phi = torch.zeros((2, 3))

    class Negative(Dimers):
        def propensities(self, counts: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
            return -super().propensities(counts, natural, design)

    class Careless(Dimers):
        def propensities(self, counts: Tensor, natural: Mapping[str, Tensor], design: Design) -> Tensor:
            return torch.ones((len(counts), 3), dtype=counts.dtype) * torch.tensor([0.0, 5.0, 0.0])

    class Short(Dimers):
        stoichiometry = ((1, 0, 0), (0, 1, 0), (0, 0, 1))

    class Ragged(Dimers):
        stoichiometry = ((1, 0), (0, 1, 0))

    class Hasty(Dimers):
        leaping = Leaping(share=1.5)

    with pytest.raises(ValueError, match="must not be negative; those of 2 individuals are, the first in row 0"):
        Negative().simulate(phi, design, generator)
    with pytest.raises(ValueError, match=r"without the molecules that it takes.*n \* \(n - 1\)"):
        Careless().simulate(phi, design, generator)
    with pytest.raises(ValueError, match="initial_state has 2 species, the stoichiometry 3"):
        Short().simulate(phi, design, generator)
    with pytest.raises(ValueError, match="all with one entry a species"):
        Ragged()
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        Hasty()


def test_roles_are_played() -> None:
    assert isinstance(Dimers(), Simulator)
    assert not isinstance(Dimers(), TractableSimulator)

"""Training on given pairs: a thousand are enough, every order of exchangeable points gives the same, and refusals."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from nlme_sbi import (
    GaussianPrior,
    PairBudget,
    Parameter,
    ParameterSpace,
    PosteriorEnsemble,
    UniformPrior,
    observe_vectors,
    train_on_pairs,
)
from nlme_sbi.networks.flows import AffineCouplingFlow
from nlme_sbi.networks.vector_summaries import EntryScaling

SD = 0.5
PRIOR = GaussianPrior({"a": {"mean": 0.0, "sd": 1.0}, "b": {"mean": 2.0, "sd": 1.0}})
TINY = PairBudget(epochs=2, patience=2)
SMALL = AffineCouplingFlow(couplings=2, hidden=8, layers=1)


def linear_pairs(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Parameters from the prior and ``x = theta + noise`` with one entry a thousand times the other."""
    random = np.random.default_rng(seed)
    theta = random.normal([0.0, 2.0], 1.0, (count, 2))
    return theta, (theta + SD * random.standard_normal((count, 2))) * [1.0, 1000.0]


@pytest.mark.slow
def test_a_thousand_pairs_give_the_posterior_of_a_linear_model(generator: torch.Generator) -> None:
    theta, x = linear_pairs(1000)
    flow, budget = AffineCouplingFlow(couplings=4, hidden=32), PairBudget(epochs=50)
    posterior, results = train_on_pairs(theta, x, prior=PRIOR, flow=flow, budget=budget, progress=False, device="cpu")
    draws = posterior.sample(observe_vectors([1.0, 2500.0]), 4000, generator).phi[0]
    precision = 1 + SD**-2
    exact = torch.tensor([1.0, 2.5]) / SD**2 / precision + torch.tensor([0.0, 2.0]) / precision
    # A linear regression on 900 pairs knows the mean to SD / 30; a network is allowed six times that.
    assert torch.allclose(draws.mean(0), exact, atol=0.1)
    assert torch.allclose(draws.std(0), torch.full((2,), precision**-0.5), rtol=0.2)
    assert results[0].stopped_early or results[0].steps == 50 * 14


def test_the_schedule_follows_the_number_of_pairs() -> None:
    for count in (60, 1000, 10_000, 100_000):
        settings = PairBudget().settings(count)
        epoch = (count - settings.validation_size) // settings.batch_size
        assert settings.validation_size == math.ceil(0.1 * count)
        assert settings.validate_every == epoch >= 1
        assert settings.steps == 200 * epoch
        assert settings.validation_size + settings.batch_size <= count


@pytest.mark.slow
def test_members_are_an_ensemble_of_different_networks() -> None:
    theta, x = linear_pairs(100)
    budget = PairBudget(epochs=1, patience=1, members=2)
    posterior, results = train_on_pairs(theta, x, prior=PRIOR, budget=budget, flow=SMALL, progress=False, device="cpu")
    assert isinstance(posterior, PosteriorEnsemble)
    assert len(results) == 2
    assert results[0].best_loss != results[1].best_loss


@pytest.mark.slow
def test_the_order_of_exchangeable_points_does_not_matter(generator: torch.Generator) -> None:
    random = np.random.default_rng(1)
    theta = random.normal([0.0, 2.0], 1.0, (200, 2))
    sets = theta[:, None] + random.standard_normal((200, 5, 2))
    posterior, _ = train_on_pairs(theta, sets, prior=PRIOR, budget=TINY, flow=SMALL, progress=False, device="cpu")
    phi = torch.tensor(theta[:1, None], dtype=torch.float32)
    found = [posterior.log_prob(phi, observe_vectors(sets[:1, order])) for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3])]
    assert torch.allclose(found[0], found[1], atol=1e-5)
    with pytest.raises(ValueError, match="makes 5 point"):
        posterior.sample(observe_vectors(sets[:1, :3]), 1, generator)


@pytest.mark.slow
def test_frames_name_the_entries_and_natural_values_are_transformed(generator: torch.Generator) -> None:
    theta, x = linear_pairs(100)
    frame, table = pd.DataFrame(np.exp(theta[:, ::-1]), columns=["b", "a"]), pd.DataFrame(x, columns=["u", "v"])
    space = ParameterSpace((Parameter("a"), Parameter("b")))
    posterior, _ = train_on_pairs(
        frame, table, prior=PRIOR, parameters=space, budget=TINY, flow=SMALL, progress=False, device="cpu"
    )
    plain, _ = train_on_pairs(theta, x, prior=PRIOR, budget=TINY, flow=SMALL, progress=False, device="cpu")
    with pytest.raises(ValueError, match="x1"):
        posterior.sample(observe_vectors(x[:1]), 3, generator)
    ours = posterior.sample(observe_vectors(table[:1]), 3, torch.Generator().manual_seed(1)).phi
    assert torch.allclose(
        ours, plain.sample(observe_vectors(x[:1]), 3, torch.Generator().manual_seed(1)).phi, atol=1e-3
    )


@pytest.mark.slow
def test_draws_stay_within_the_bounds_of_the_prior(generator: torch.Generator) -> None:
    random = np.random.default_rng(2)
    theta = random.uniform(0, 1, (200, 1))
    prior = UniformPrior({"share": {"lower": 0.0, "upper": 1.0}})
    posterior, _ = train_on_pairs(
        theta[:, 0], theta + random.normal(size=theta.shape), prior=prior, budget=TINY, progress=False, device="cpu"
    )
    draws = posterior.sample(observe_vectors([50.0]), 1000, generator)
    assert bool(torch.isfinite(prior.log_prob(draws.phi)).all())


def test_every_entry_has_a_scale_of_its_own_and_ties_lie_in_their_middle() -> None:
    random = torch.Generator().manual_seed(3)
    zero_or_more = torch.poisson(torch.full((4000,), 0.5), generator=random)
    values = torch.stack([1e6 * torch.randn(4000, generator=random), zero_or_more, torch.full((4000,), 7.0)], 1)
    scaling = EntryScaling(3)
    scaling.fit(values)
    features = scaling(values)
    assert torch.allclose(features[:, 0].std(), torch.tensor(1.0), atol=0.05)
    assert bool((features[:, [2, 5]] == 0).all())  # an entry that never changes
    # 0 takes the places up to exp(-1/2): by symmetry in the scores its middle lies below the median.
    places = [float(features[zero_or_more == count, 1].unique()) for count in (0, 1, 2)]
    assert places == sorted(places)
    assert places[0] < 0 < places[1]
    assert bool((scaling(torch.tensor([[1e9, 1e3, 1e3]])) > scaling(torch.tensor([[1e8, 1e2, 1e2]]))).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"theta": np.zeros((100, 3))}, "theta must be"),
        ({"theta": np.zeros((90, 2))}, "90 rows and x has 100"),
        ({"x": np.full((100, 2), np.nan)}, "max_failed="),
        ({"x": np.ones((100, 2))}, "the same in all simulations"),
        ({"x": np.ones((100, 2, 2, 2))}, "shape"),
        ({"entries": ["u", "u"]}, "another name"),
        ({"theta": np.zeros((20, 2)), "x": np.zeros((20, 2))}, "too few to train on"),
        ({"prior": UniformPrior({n: {"lower": 5.0, "upper": 6.0} for n in "ab"})}, "100 of 100 rows of theta lie out"),
        ({"theta": pd.DataFrame({"a": np.zeros(100)})}, "no column b"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, object], message: str) -> None:
    theta, x = linear_pairs(100)
    given = {"theta": theta, "x": x, "prior": PRIOR, "progress": False, "device": "cpu", **change}
    with pytest.raises(ValueError, match=message):
        train_on_pairs(given.pop("theta"), given.pop("x"), **given)  # type: ignore[arg-type]


def test_a_budget_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="held_out"):
        PairBudget(held_out=0.0)
    with pytest.raises(ValueError, match="members"):
        PairBudget(members=0)

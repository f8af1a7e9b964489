"""Summaries of tokens see doses, infusions, steady states, limits and covariates, and neither padding nor order."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from dosed import LinearDosed, Regimens, regimens, written_out
from safetensors.torch import save_file

from nlme_sbi import AffineCouplingFlow, GaussianPrior, TrainingSettings, train_posterior
from nlme_sbi.diagnostics.network.simulated_posteriors import observations_of, posterior_pairs
from nlme_sbi.limits import Limits
from nlme_sbi.networks.posterior import build_network, load_network
from nlme_sbi.networks.stored_weights import describe_shape, load_shape
from nlme_sbi.networks.summaries import DataShape, PooledSummary, SummarySettings
from nlme_sbi.networks.token_summaries import AttentionSummary, RecurrentSummary
from nlme_sbi.runs import save_json
from nlme_sbi.simulation.shards import simulate_batch
from nlme_sbi.types import Covariates, Design, Events, Simulations

SMALL: dict[str, SummarySettings] = {
    "attention": AttentionSummary(width=8, hidden=16, token_width=8, token_hidden=16, blocks=1, heads=2),
    "recurrent": RecurrentSummary(width=8, hidden=16, token_width=8, token_hidden=16, state=12),
}
SHAPE = DataShape(
    6, 1, True, False, covariates=("WT", "SEX"), levels=(("SEX", 2),), takes_doses=True, compartments=2, censored=True
)
PRIOR = GaussianPrior({"slope": {"mean": 0.0, "sd": 1.0}})


def pilot(count: int, generator: torch.Generator) -> Simulations:
    """Regimens with two compartments, limits and covariates; values are noise."""
    design = regimens(count, generator)
    assert design.events is not None
    events = replace(design.events, compartment=1 + (torch.rand(count, 3, generator=generator) < 0.5).long())
    size = design.observed.shape
    limits = Limits(torch.full(size, -torch.inf), torch.full(size, -0.5))
    columns = torch.stack((50 + 40 * torch.rand(count, generator=generator), torch.arange(count) % 2), 1)
    covariates = Covariates(("WT", "SEX"), columns, {"SEX": ("f", "m")})
    values = torch.randn(size, generator=generator)
    whole = torch.zeros(count, dtype=torch.int64)
    return Simulations(
        torch.zeros(count, 1), values, replace(design, events=events, limits=limits, covariates=covariates), whole
    )


@pytest.fixture(params=sorted(SMALL))
def network(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    made = SMALL[request.param].build(SHAPE)
    assert isinstance(made, torch.nn.Module)
    made.fit_scaling(pilot(500, torch.Generator().manual_seed(1)))
    # Blocks are the identity before training: random weights instead, so that nothing is hidden by zeros.
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return made.eval()


@torch.no_grad()
def test_padding_order_and_additional_doses_never_change_a_summary(
    network: torch.nn.Module, generator: torch.Generator
) -> None:
    data = pilot(60, generator)
    design = data.design
    assert design.events is not None
    assert design.limits is not None
    expected = network(data.values, design)
    assert bool(torch.isfinite(expected).all())
    assert torch.equal(network(data.values, written_out(design)), expected)
    # Every individual alone: without the padding that the others ask for. Sums may then be rounded otherwise.
    for row in range(0, 60, 7):
        alone = data[[row]]
        count = int(alone.design.observed.sum())
        limits = alone.design.limits
        assert limits is not None
        short = replace(
            alone.design,
            times=alone.design.times[:, :count],
            observed=alone.design.observed[:, :count],
            limits=Limits(limits.lower[:, :count], limits.upper[:, :count]),
        )
        torch.testing.assert_close(network(alone.values[:, :count], short)[0], expected[row], rtol=1e-6, atol=1e-6)
    backwards = replace(
        design.events, **{item.name: getattr(design.events, item.name).flip(1) for item in fields(Events)[:-1]}
    )
    assert torch.equal(network(data.values, replace(design, events=backwards)), expected)
    junk = torch.where(design.observed, data.values, 123.0)
    assert torch.equal(network(junk, design), expected)
    # Below the limit of -0.5 nothing is told.
    hidden = torch.where(data.values < -0.5, data.values - 1, data.values)
    assert torch.equal(network(hidden, design), expected)


def changed_events(events: Events, **columns: torch.Tensor) -> Events:
    return replace(events, **columns)


@torch.no_grad()
def test_everything_that_tells_of_an_individual_reaches_the_summary(
    network: torch.nn.Module, generator: torch.Generator
) -> None:
    data = pilot(40, generator)
    design, values = data.design, data.values
    events, limits, covariates = design.events, design.limits, design.covariates
    assert events is not None
    assert limits is not None
    assert covariates is not None
    first = torch.zeros_like(events.kind, dtype=torch.bool)
    first[:, 0] = True
    base = network(values, design)

    def differs(design: Design, values: torch.Tensor = values) -> torch.Tensor:
        return (network(values, design) - base).abs().amax(1)

    every = {
        "amount": differs(replace(design, events=replace(events, amount=events.amount * 1.5))),
        "rate": differs(replace(design, events=replace(events, rate=torch.where(first, 0.7, events.rate)))),
        "modelled duration": differs(
            replace(design, events=replace(events, rate=torch.where(first, -2.0, events.rate)))
        ),
        "compartment": differs(replace(design, events=replace(events, compartment=3 - events.compartment))),
        "steady state": differs(
            replace(
                design,
                events=replace(events, steady_state=first.long(), interval=torch.where(first, 4.0, events.interval)),
            )
        ),
        "weight": differs(
            replace(design, covariates=replace(covariates, values=covariates.values + torch.tensor([9.0, 0.0])))
        ),
        "level": differs(
            replace(
                design,
                covariates=replace(
                    covariates, values=torch.stack((covariates.values[:, 0], 1 - covariates.values[:, 1]), 1)
                ),
            )
        ),
        "times": differs(replace(design, times=design.times * 1.1)),
        "values": differs(design, values + 5.0),
    }
    for name, difference in every.items():
        assert float(difference.min()) > 1e-5, name
    # A limit matters to those whose values it hides, and to nobody else.
    moved = differs(replace(design, limits=Limits(limits.lower, limits.upper - 0.01)))
    below = ((values < -0.51) & design.observed).any(1).flatten()
    within = ((values < -0.5) & (values > -0.51) & design.observed).any(1).flatten()
    assert bool((moved[below] > 1e-6).all())
    assert bool((moved[~below & ~within] == 0).all())
    assert 5 < int(below.sum()) < 40


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_stored_network_is_read_back_from_its_description(name: str, tmp_path: Path) -> None:
    flow = AffineCouplingFlow(couplings=2, hidden=8)
    made = build_network(SHAPE, SMALL[name], flow, dimension=3)
    save_file(made.state_dict(), tmp_path / "weights.safetensors")
    save_json(tmp_path / "network.json", describe_shape(SHAPE))
    shape = load_shape(tmp_path / "network.json")
    assert shape == SHAPE
    again = load_network(shape, SMALL[name], flow, dimension=3, weights=tmp_path / "weights.safetensors")
    for key, weight in made.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight)


def test_networks_of_one_bolus_are_described_as_before_there_were_tokens(tmp_path: Path) -> None:
    shape = DataShape(12, 2, True, False, takes_doses=True)
    assert list(describe_shape(shape)) == [
        *("times", "signals", "missing", "shared_times", "covariates", "levels", "takes_doses")
    ]
    save_json(tmp_path / "network.json", describe_shape(shape))
    assert load_shape(tmp_path / "network.json") == shape


def test_other_summaries_refuse_regimens_with_the_words_to_type(generator: torch.Generator) -> None:
    made = simulate_batch(PRIOR, Regimens(), LinearDosed(), 20, generator)
    summary = PooledSummary(width=4, hidden=8, nodes=4).build(DataShape.of(made, LinearDosed()))
    with pytest.raises(ValueError, match=r"summary=attention or summary=recurrent.*posterior=none"):
        summary.fit_scaling(made)


def test_settings_that_make_no_network_are_refused() -> None:
    with pytest.raises(ValueError, match="token_width must be a multiple of heads; got token_width=10"):
        AttentionSummary(token_width=10)
    with pytest.raises(ValueError, match="must be positive; got state=0"):
        RecurrentSummary(state=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("summary", "limit", "steps", "batch_size"),
    [
        (AttentionSummary(width=24, hidden=48, token_width=24, token_hidden=48, blocks=1), None, 400, 128),
        (RecurrentSummary(width=24, hidden=48, token_width=24, token_hidden=48, state=32), 0.3, 600, 256),
    ],
    ids=["attention", "recurrent, censored"],
)
def test_posteriors_under_random_regimens_come_near_the_exact_ones(
    summary: SummarySettings, limit: float | None, steps: int, batch_size: int
) -> None:
    posterior, _ = train_posterior(
        LinearDosed(),
        PRIOR,
        Regimens(limit),
        summary=summary,
        flow=AffineCouplingFlow(couplings=2, hidden=32),
        settings=TrainingSettings(
            steps=steps,
            batch_size=batch_size,
            warmup_steps=50,
            validation_size=500,
            validate_every=100,
            pilot_size=2000,
        ),
        device="cpu",
        progress=False,
    )
    generator = torch.Generator().manual_seed(5)
    made = simulate_batch(PRIOR, Regimens(limit), LinearDosed(), 500, generator)
    observations = observations_of(made, LinearDosed())
    pairs = posterior_pairs(posterior, observations, made.phi, draws=300, generator=generator)
    mean, sd = LinearDosed.posterior(made.values, made.design)
    if limit is not None:
        assert observations.censoring is not None
        assert 0.3 < float((observations.censoring > 0).sum() / made.design.observed.sum()) < 0.8
    off = (pairs.draws[..., 0].mean(1) - mean) / sd
    # Small networks reach 0.3 to 0.4 in these steps; one that says the prior whatever it sees is off by the second.
    assert float(off.square().mean().sqrt()) < 0.5
    assert float((mean / sd).square().mean().sqrt()) > 1.0
    widths = (pairs.draws[..., 0].std(1) / sd).log()
    assert abs(float(widths.mean())) < 0.15
    for level in (0.5, 0.9):
        low, high = (pairs.draws[..., 0].quantile(edge, 1) for edge in ((1 - level) / 2, (1 + level) / 2))
        covered = float(((pairs.truth[:, 0] > low) & (pairs.truth[:, 0] < high)).double().mean())
        # Five standard errors of 500 individuals are 0.11 and 0.07.
        assert abs(covered - level) < 5 * (level * (1 - level) / 500) ** 0.5

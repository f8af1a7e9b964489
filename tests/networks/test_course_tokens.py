"""Covariates that change in time reach summaries of tokens, and how their records are written changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dosed import regimens

from nlme_sbi import AffineCouplingFlow, GaussianPrior, TrainingSettings, train_posterior
from nlme_sbi.designs.resampled import ResampledDesigns
from nlme_sbi.diagnostics.network.simulated_posteriors import observations_of, posterior_pairs
from nlme_sbi.individual_model.time_covariates import values_at
from nlme_sbi.networks.summaries import DataShape, PooledSummary, SummarySettings
from nlme_sbi.networks.token_summaries import AttentionSummary, RecurrentSummary
from nlme_sbi.networks.tokens import TokenKind, tokens_of
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.simulation.shards import simulate_batch
from nlme_sbi.types import Design, Simulations, SimulatorOutput, TimeCovariates

SMALL: dict[str, SummarySettings] = {
    "attention": AttentionSummary(width=8, hidden=16, token_width=8, token_hidden=16, blocks=1, heads=2),
    "recurrent": RecurrentSummary(width=8, hidden=16, token_width=8, token_hidden=16, state=12),
}
SHAPE = DataShape(6, 1, True, False, takes_doses=True, along=("WT", "ROOM"))
PRIOR = GaussianPrior({"slope": {"mean": 0.0, "sd": 1.0}})
BETWEEN = ("previous", "linear")


def courses(count: int, generator: torch.Generator, *, records: int = 3) -> TimeCovariates:
    """Weights that are carried forward and temperatures that are interpolated, at the same records."""
    times = 8 * torch.rand((count, records), generator=generator).sort(1).values
    values = torch.stack(
        (40 + 40 * torch.rand(count, records, generator=generator), torch.randn(count, records, generator=generator)), 2
    )
    return TimeCovariates(("WT", "ROOM"), times, values, BETWEEN)


def pilot(count: int, generator: torch.Generator) -> Simulations:
    design = replace(regimens(count, generator), time_covariates=courses(count, generator))
    values = torch.randn(design.observed.shape, generator=generator)
    return Simulations(torch.zeros(count, 1), values, design, torch.zeros(count, dtype=torch.int64))


@pytest.fixture(params=sorted(SMALL))
def network(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    made = SMALL[request.param].build(SHAPE)
    assert isinstance(made, torch.nn.Module)
    made.fit_scaling(pilot(300, torch.Generator().manual_seed(1)))
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return made.eval()


def with_course(design: Design, times: torch.Tensor, values: torch.Tensor) -> Design:
    return replace(design, time_covariates=TimeCovariates(("WT", "ROOM"), times, values, BETWEEN))


@torch.no_grad()
def test_padding_repeated_records_and_the_order_of_individuals_never_change_a_summary(
    network: torch.nn.Module, generator: torch.Generator
) -> None:
    data = pilot(40, generator)
    course = data.design.time_covariates
    assert course is not None
    expected = network(data.values, data.design)
    assert bool(torch.isfinite(expected).all())
    padded = [torch.cat([part, part[:, -1:], part[:, -1:]], 1) for part in (course.times, course.values)]
    assert torch.equal(network(data.values, with_course(data.design, *padded)), expected)
    # A weight that is recorded once more before it changes, which a course that is carried forward has anyway.
    weight = replace(
        data.design, time_covariates=TimeCovariates(("WT",), course.times, course.values[..., :1], ("previous",))
    )
    between = (course.times[:, :1] + course.times[:, 1:2]) / 2
    times = torch.cat([course.times[:, :1], between, course.times[:, 1:]], 1)
    repeated = torch.cat([course.values[:, :1, :1], course.values[:, :1, :1], course.values[:, 1:, :1]], 1)
    again = replace(weight, time_covariates=TimeCovariates(("WT",), times, repeated, ("previous",)))
    first, second = (tokens_of(data.values, design, takes_doses=True, along=["WT"]) for design in (weight, again))
    assert torch.equal(first.time, second.time)
    assert torch.equal(first.along, second.along)
    order = torch.randperm(40, generator=generator)
    torch.testing.assert_close(network(data.values[order], data.design[order]), expected[order], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_values_and_times_of_records_reach_the_summary(network: torch.nn.Module, generator: torch.Generator) -> None:
    data = pilot(40, generator)
    course = data.design.time_covariates
    assert course is not None
    base = network(data.values, data.design)
    for place in range(2):
        moved = course.values.clone()
        moved[:, 0, place] *= 1.3
        other = network(data.values, with_course(data.design, course.times, moved))
        assert float((other - base).abs().amax(1).min()) > 1e-5
    later = network(data.values, with_course(data.design, course.times * 0.9, course.values))
    assert float((later - base).abs().amax(1).min()) > 1e-6


def test_tokens_hold_what_holds_at_their_time(generator: torch.Generator) -> None:
    data = pilot(30, generator)
    course = data.design.time_covariates
    assert course is not None
    tokens = tokens_of(data.values, data.design, takes_doses=True, along=["ROOM", "WT"])
    held = values_at(course, data.design.times.double(), ["WT", "ROOM"])
    measured = tokens.of_kind(TokenKind.MEASUREMENT)
    for row in range(30):
        seen = data.design.observed[row, :, 0]
        for place, name in enumerate(("ROOM", "WT")):
            expected = held[name][row, seen].float()
            torch.testing.assert_close(tokens.along[row, measured[row], place], expected)
    assert int(tokens.of_kind(TokenKind.COVARIATE).sum(1).max()) <= 6
    assert tokens_of(data.values, data.design, takes_doses=True).along.shape[2] == 0


def test_what_training_did_not_have_is_refused(generator: torch.Generator) -> None:
    design = pilot(20, generator).design
    course = design.time_covariates
    assert course is not None
    source = ResampledDesigns(design, jitter=0.2)
    assert source.covers(design) == {}
    assert ResampledDesigns(design).covers(design) == {}
    for varied in (True, False):
        covers = (source if varied else ResampledDesigns(design)).covers
        heavy = course.values.clone()
        heavy[3, 1, 0] = 500.0
        reason = covers(with_course(design, course.times, heavy))
        assert set(reason) == {3}
        assert '"WT" is 500 at a time, but the network was trained on' in reason[3]
        read_otherwise = replace(course, between=("next", "linear"))
        told = covers(replace(design, time_covariates=read_otherwise))
        assert "'data.time_covariates={WT: previous}'" in told[0]
        assert 'covariate "WT" in time is missing' in covers(replace(design, time_covariates=None))[0]
        halves = torch.stack([course.times, course.times + 1e-3], 2).flatten(1)
        flicker = torch.stack([course.values, course.values * 1.01], 2).flatten(1, 2)
        assert "record" in covers(with_course(design, halves, flicker))[0]


def test_a_large_change_between_records_is_refused(generator: torch.Generator) -> None:
    design = regimens(2, generator)
    times = torch.tensor([[0.0, 4.0], [0.0, 4.0]])
    slow = torch.tensor([[[50.0], [52.0]], [[90.0], [91.0]]])
    course = TimeCovariates(("WT",), times, slow, ("previous",))
    source = ResampledDesigns(replace(design, time_covariates=course))
    jump = replace(course, values=torch.tensor([[[50.0], [90.0]], [[90.0], [91.0]]]))
    reason = source.covers(replace(design, time_covariates=jump))
    assert set(reason) == {0}
    assert '"WT" changes by 40 from one record to the next, but the network was trained on at most 2' in reason[0]


def test_records_move_with_the_clock_of_varied_designs(generator: torch.Generator) -> None:
    design = regimens(1, generator)
    course = TimeCovariates(("WT",), design.times[:, 2:4], torch.tensor([[[50.0], [60.0]]]), ("previous",))
    drawn = ResampledDesigns(replace(design, time_covariates=course), jitter=0.3).sample(50, generator)
    found = drawn.time_covariates
    assert found is not None
    assert torch.equal(found.times, drawn.times[:, 2:4])
    factor = found.values[..., 0] / torch.tensor([50.0, 60.0])
    torch.testing.assert_close(factor[:, 0], factor[:, 1])
    assert float(factor.log().abs().max()) <= 0.3 + 1e-6
    assert float(factor.std()) > 0.05


class Following:
    """``y = slope * weight(t) + noise`` with ``slope ~ N(0, 1)``: its posterior is known."""

    parameters = ParameterSpace((Parameter("slope", transform="identity"),))
    signals = ("one",)
    signal_units = ("",)
    time_unit = "h"
    covariates = ()
    time_covariates = ("WT",)
    takes_doses = False

    def simulate(self, phi: torch.Tensor, design: Design, generator: torch.Generator) -> SimulatorOutput:
        noise = torch.randn(design.times.shape, generator=generator)
        made = phi * weights(design).to(phi) + 0.5 * noise
        values = torch.where(design.observed, made[..., None], 0.0)
        return SimulatorOutput(values, torch.zeros(len(phi), dtype=torch.int64))


def weights(design: Design) -> torch.Tensor:
    course = design.time_covariates
    assert course is not None
    return values_at(course, design.times.double(), ["WT"])["WT"]


def test_other_summaries_refuse_them_with_the_words_to_type(generator: torch.Generator) -> None:
    pool = Design(
        torch.arange(4.0)[None], torch.ones((1, 4, 1), dtype=torch.bool), time_covariates=one_course(1, generator)
    )
    with pytest.raises(ValueError, match=r"PooledSummary does not read; take summary=attention.*posterior=none"):
        train_posterior(
            Following(),
            PRIOR,
            ResampledDesigns(pool),
            summary=PooledSummary(width=4, hidden=8, nodes=4),
            flow=AffineCouplingFlow(couplings=2, hidden=8),
            settings=TrainingSettings(steps=2, batch_size=8, pilot_size=20, validation_size=10),
            device="cpu",
            progress=False,
        )


def one_course(count: int, generator: torch.Generator) -> TimeCovariates:
    times = torch.tensor([[0.0, 2.0]]).expand(count, 2).contiguous()
    return TimeCovariates(("WT",), times, 0.1 + 2 * torch.rand(count, 2, 1, generator=generator), ("previous",))


@pytest.mark.slow
def test_a_posterior_that_depends_on_the_course_comes_near_the_exact_one() -> None:
    generator = torch.Generator().manual_seed(3)
    pool = Design.regular(torch.arange(4.0), 400)
    designs = ResampledDesigns(replace(pool, time_covariates=one_course(400, generator)))
    posterior, _ = train_posterior(
        Following(),
        PRIOR,
        designs,
        summary=RecurrentSummary(width=24, hidden=48, token_width=24, token_hidden=48, state=32),
        flow=AffineCouplingFlow(couplings=2, hidden=32),
        settings=TrainingSettings(
            steps=500, batch_size=256, warmup_steps=50, validation_size=500, validate_every=100, pilot_size=2000
        ),
        device="cpu",
        progress=False,
    )
    made = simulate_batch(PRIOR, designs, Following(), 400, generator)
    pairs = posterior_pairs(posterior, observations_of(made, Following()), made.phi, draws=300, generator=generator)
    known = weights(made.design)
    precision = 1 + known.square().sum(1) / 0.25
    mean = (known * made.values[..., 0].double()).sum(1) / 0.25 / precision
    off = (pairs.draws[..., 0].mean(1) - mean) * precision.sqrt()
    # One that took the mean weight for the course would be off by more than 1.
    assert float(off.square().mean().sqrt()) < 0.6
    assert abs(float((pairs.draws[..., 0].std(1) * precision.sqrt()).log().mean())) < 0.2

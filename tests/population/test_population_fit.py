"""Whole fits against exact maximum likelihood: estimates, errors, symmetry, warnings, refusals."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, replace

import pytest
import torch
from conjugate_case import ConjugateCase, observations, parameter_space
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from nlme_sbi.individual_model.priors import GaussianPrior, UniformPrior
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population import FitProgress, GaussianPopulation, PriorRatio, fit_population, individual_draws
from nlme_sbi.population.models.interface import ParameterTable, Unknown
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import Design, Observations

DOUBLE = torch.float64
MEAN = [0.5, -0.3, 0.8]
OMEGA = torch.tensor([[0.36, 0.15, 0.0], [0.15, 0.25, 0.05], [0.0, 0.05, 0.16]], dtype=DOUBLE)
DIAGONAL = torch.diag(OMEGA.diagonal())
NO_SIGMA = torch.diag(torch.tensor([0.36, 0.25, 0.0], dtype=DOUBLE))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True, eq=False)
class ExactPosterior:
    """The conjugate case as a posterior to draw from."""

    case: ConjugateCase

    @property
    def parameters(self) -> ParameterSpace:
        return self.case.parameters

    @property
    def prior(self) -> GaussianPrior:
        return self.case.prior

    def sample(self, observations: Observations, draws: int, generator: torch.Generator) -> PosteriorSamples:
        return self.case.samples(draws, seed=int(torch.randint(2**31, (1,), generator=generator)))

    def log_prob(self, phi: Tensor, observations: Observations) -> Tensor:
        centre, covariance = self.case.posterior(self.case.prior.mean, self.case.prior.covariance)
        return MultivariateNormal(centre[:, None], covariance[:, None]).log_prob(phi)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("population", "omega"),
    [
        (GaussianPopulation(), DIAGONAL),
        (GaussianPopulation(covariance="full"), OMEGA),
        (GaussianPopulation(constant=("sigma",)), NO_SIGMA),
        (GaussianPopulation(fixed={"mean": {"uptake": math.exp(0.5)}, "sd": {"decay": 0.5}}), DIAGONAL),
    ],
    ids=["diagonal", "full", "constant", "fixed"],
)
def test_estimates_and_errors_are_those_of_exact_maximum_likelihood(
    population: GaussianPopulation, omega: Tensor
) -> None:
    case = ConjugateCase.simulated(MEAN, omega, individuals=80, seed=1)
    fit = fit_population(
        case.samples(1500, seed=2),
        case.observations,
        population,
        parameters=case.parameters,
        generator=seeded(),
        starts=2,
    )
    exact, se, maximum = case.maximum(fit.population, fit.theta)
    free = fit.population.unknowns.free
    assert fit.converged, fit.message
    # Both optima are within 0.01 SE of being exact; the rest is the Monte-Carlo error that the fit reports.
    z = (fit.theta - exact)[free].abs() / (fit.monte_carlo.se[free] + 0.002 * se)
    assert float(z.max()) < 5
    # A curvature from weights has a relative error of the order of the score's Monte-Carlo error in SE.
    assert float((fit.standard_errors[free] / se - 1).abs().max()) < 0.12
    assert bool((fit.standard_errors[fit.population.unknowns.fixed] == 0).all())
    fixed = fit.population.unknowns.fixed
    torch.testing.assert_close(fit.theta[fixed], fit.population.unknowns.starts[fixed])
    assert fit.log_likelihood_ratio is not None
    assert abs(fit.log_likelihood_ratio - fit.monte_carlo.objective_bias - maximum) < 5 * fit.monte_carlo.objective_se
    assert fit.minus_two_log_likelihood is None


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_another_one_does_not() -> None:
    case = ConjugateCase.simulated(MEAN, NO_SIGMA, individuals=12, seed=3)
    population, estimator = GaussianPopulation(constant=("sigma",)), PriorRatio(draws=150, max_draws=150)

    def fit(seed: int) -> Tensor:
        return fit_population(
            ExactPosterior(case), case.observations, population, estimator=estimator, generator=seeded(seed), starts=2
        ).theta

    first = fit(5)
    assert torch.equal(first, fit(5))
    assert not torch.equal(first, fit(6))


@pytest.mark.slow
def test_individuals_are_those_of_the_conjugate_case_under_the_fit() -> None:
    case = ConjugateCase.simulated(MEAN, NO_SIGMA, individuals=40, seed=4)
    population = GaussianPopulation(constant=("sigma",))
    samples = case.samples(1500, seed=1)
    fit = fit_population(
        samples, case.observations, population, parameters=case.parameters, generator=seeded(), starts=1
    )
    centre, covariance = case.posterior(fit.population.mean(fit.theta), fit.population.covariance(fit.theta))
    sd = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    # A reweighted mean of ESS draws; 6 standard errors for 80 of them. Mixtures of draws add about as much again.
    error = sd / fit.ess[:, None].sqrt()
    assert bool(((fit.individuals.mean - centre).abs() < 6 * 1.4 * error + 1e-9).all())
    assert bool((fit.individuals.sd[:, 2] == 0).all())
    assert bool((fit.individuals.mean[:, 2] == fit.theta[2]).all())
    torch.testing.assert_close(fit.individuals.sd[:, :2], sd[:, :2], rtol=0.25, atol=0)
    drawn = individual_draws(fit, 4000, seeded(1))
    assert drawn.shape == (40, 4000, 3)
    assert bool((drawn[..., 2] == fit.theta[2]).all())
    resampled = fit.individuals.sd / math.sqrt(4000)
    assert bool(((drawn.mean(1) - fit.individuals.mean).abs() <= 6 * resampled + 1e-9).all())


def mirror_samples(individuals: int, draws: int, *, seed: int) -> tuple[PosteriorSamples, Tensor]:
    """Data that do not tell uptake from decay: posteriors with two mirror modes. Returns also y (I, 2)."""
    generator = seeded(seed)
    prior = GaussianPrior({name: {"mean": 0.0, "sd": 1.5} for name in ("uptake", "decay")})
    phi = torch.tensor([1.0, -1.2]) + torch.tensor([0.3, 0.5]) * torch.randn((individuals, 2), generator=generator)
    y = (phi + 0.3 * torch.randn((individuals, 2), generator=generator)).double()
    shrinkage = 1.5**2 / (1.5**2 + 0.09)
    noise = torch.randn((individuals, draws, 2), generator=generator, dtype=DOUBLE)
    modes = shrinkage * y[:, None] + math.sqrt(shrinkage * 0.09) * noise
    swapped = torch.rand((individuals, draws, 1), generator=generator) < 0.5
    phi = torch.where(swapped, modes.flip(-1), modes)
    log_q = torch.zeros(individuals, draws, dtype=DOUBLE)
    return PosteriorSamples(names=prior.names, phi=phi, log_q=log_q, prior=prior), y


def mirror_log_ratio(y: Tensor, theta: Tensor) -> Tensor:
    """Exact objective: the likelihood is the even mixture of the two labellings."""
    variance = (2 * theta[2:]).exp() + 0.09
    normal = Normal(theta[:2], variance.sqrt())
    both = torch.stack([normal.log_prob(y).sum(-1), normal.log_prob(y.flip(-1)).sum(-1)])
    evidence = Normal(0.0, math.sqrt(1.5**2 + 0.09)).log_prob(y).sum(-1)
    return torch.logsumexp(both, 0) - math.log(2) - evidence


@pytest.mark.slow
def test_mirror_modes_give_one_labelling_and_say_so() -> None:
    samples, y = mirror_samples(100, 600, seed=5)
    space = parameter_space(("uptake", "decay"))
    fit = fit_population(
        samples, observations(y), GaussianPopulation(), parameters=space, generator=seeded(1), starts=8
    )
    assert fit.converged, fit.message
    theta = fit.theta if float(fit.theta[0]) > 0 else fit.theta[[1, 0, 3, 2]]
    # The exact maximum, by Newton steps from the estimate.
    exact = theta.clone()
    for _ in range(6):
        slope = torch.func.jacrev(lambda at: mirror_log_ratio(y, at).sum())(exact)
        curve = torch.func.hessian(lambda at: mirror_log_ratio(y, at).sum())(exact)
        exact = exact - torch.linalg.solve(curve, slope)
    se = torch.linalg.inv(-curve).diagonal().sqrt()
    order = [0, 1, 2, 3] if float(fit.theta[0]) > 0 else [1, 0, 3, 2]
    assert bool(((theta - exact).abs() < 5 * fit.monte_carlo.se[order] + 0.01 * se).all())
    verdicts = [restart.verdict for restart in fit.restarts]
    assert "other point" in verdicts
    mirrored = next(restart for restart in fit.restarts if restart.verdict == "other point")
    assert mirrored.differing == ("uptake", "decay")
    assert mirrored.exchanged == ("uptake", "decay")
    assert "its mirror image, in which uptake and decay are exchanged" in fit.message
    assert not any("may not be the highest" in warning for warning in fit.warnings)


@pytest.mark.slow
def test_draws_are_doubled_until_they_suffice() -> None:
    case = ConjugateCase.simulated(MEAN, DIAGONAL, individuals=60, seed=6)
    seen: list[FitProgress] = []
    fit = fit_population(
        ExactPosterior(case),
        case.observations,
        GaussianPopulation(),
        estimator=PriorRatio(draws=100, max_draws=6400),
        generator=seeded(),
        starts=2,
        progress=seen.append,
    )
    assert fit.draws > 100
    assert max(fit.monte_carlo.worst(fit.standard_errors, fit.population.unknowns.free)) < 0.1
    assert not any("Monte-Carlo" in warning for warning in fit.warnings)
    assert {step.stage for step in seen} == {"draws", "starts", "polish", "curvature", "Monte-Carlo error"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "words"),
    [("samples", "the draws were given"), ("limit", "max_draws=200 is reached"), ("memory", "GiB")],
)
def test_too_few_draws_are_told(given: str, words: str, caplog: pytest.LogCaptureFixture) -> None:
    case = ConjugateCase.simulated(MEAN, DIAGONAL, individuals=60, seed=6)
    source = case.samples(100, seed=1) if given == "samples" else ExactPosterior(case)
    settings = {"max_draws": 200} if given == "limit" else {"memory": 1e-4} if given == "memory" else {}
    with caplog.at_level(logging.WARNING):
        fit = fit_population(
            source,
            case.observations,
            GaussianPopulation(),
            parameters=case.parameters,
            estimator=PriorRatio(draws=100, **settings),
            generator=seeded(),
            starts=1,
        )
    told = next(warning for warning in fit.warnings if "Monte-Carlo error is above 0.1 standard errors" in warning)
    assert words in told
    assert told in caplog.text


def test_individuals_with_few_effective_draws_are_named() -> None:
    case = ConjugateCase.simulated(MEAN, DIAGONAL, individuals=30, seed=7)
    odd = case.y.clone()
    odd[11] += 6.0  # far from all others, so that its posterior and the population hardly overlap
    fit = fit_population(
        replace(case, y=odd).samples(400, seed=1),
        observations(odd),
        GaussianPopulation(fixed={"sd": {"uptake": 0.3, "decay": 0.3, "sigma": 0.3}}),
        parameters=case.parameters,
        generator=seeded(),
        starts=1,
    )
    told = next(warning for warning in fit.warnings if "effective number of draws below 50 of 400" in warning)
    assert "cell_11" in told
    assert told in str(fit.table())


@pytest.mark.slow
def test_a_population_wider_than_a_gaussian_prior_is_told_with_its_direction() -> None:
    wide = torch.diag(torch.tensor([0.25, 4.0, 0.25], dtype=DOUBLE))
    case = ConjugateCase.simulated([0.0, 0.0, 0.0], wide, individuals=60, seed=8, prior_sd=1.0, noise=0.2)
    fit = fit_population(
        case.samples(500, seed=1),
        case.observations,
        GaussianPopulation(),
        parameters=case.parameters,
        generator=seeded(),
        starts=1,
    )
    told = [warning for warning in fit.warnings if "outgrows the training prior" in warning]
    assert len(told) == 1
    assert "prior in decay: its variance" in told[0]
    narrow = ConjugateCase.simulated(MEAN, DIAGONAL, individuals=60, seed=8)
    quiet = fit_population(
        narrow.samples(500, seed=1),
        narrow.observations,
        GaussianPopulation(),
        parameters=case.parameters,
        generator=seeded(),
        starts=1,
    )
    assert not any("outgrows" in warning or "from the mean of" in warning for warning in quiet.warnings)


def uniform_case(reach: float) -> tuple[PosteriorSamples, Observations]:
    """y = phi + noise under a uniform prior: posteriors are normals cut at the prior's ends."""
    generator = seeded(9)
    phi = torch.tensor([0.5, -0.3, 0.8]) + torch.tensor([0.5, reach, 0.4]) * torch.randn((80, 3), generator=generator)
    y = phi.clamp(-1.9, 1.9) + 0.2 * torch.randn((80, 3), generator=generator)
    prior = UniformPrior({name: {"lower": -2.0, "upper": 2.0} for name in ("uptake", "decay", "sigma")})
    normal = Normal(y[:, None].double(), 0.2)
    low, high = normal.cdf(torch.tensor(-2.0)), normal.cdf(torch.tensor(2.0))
    uniform = torch.rand((80, 500, 3), generator=generator, dtype=DOUBLE)
    draws = normal.icdf(low + (high - low) * uniform).clamp(-2 + 1e-9, 2 - 1e-9)
    log_q = torch.zeros(80, 500, dtype=DOUBLE)
    return PosteriorSamples(names=prior.names, phi=draws, log_q=log_q, prior=prior), observations(y.double())


@pytest.mark.slow
@pytest.mark.parametrize(("reach", "told"), [(1.5, True), (0.3, False)])
def test_a_population_beyond_a_uniform_prior_is_told_by_name(reach: float, told: bool) -> None:
    samples, data = uniform_case(reach)
    fit = fit_population(
        samples, data, GaussianPopulation(), parameters=parameter_space(), generator=seeded(), starts=1
    )
    found = [warning for warning in fit.warnings if "outgrows the training prior in decay:" in warning]
    assert bool(found) == told


@pytest.mark.slow
def test_a_constant_in_somebodys_tail_is_told_by_name() -> None:
    case = ConjugateCase.simulated(MEAN, NO_SIGMA, individuals=40, seed=10)
    odd = case.y.clone()
    odd[17, 2] -= 6.0
    population = GaussianPopulation(constant=("sigma",))

    def told(y: Tensor) -> list[str]:
        samples = replace(case, y=y).samples(800, seed=1)
        fit = fit_population(
            samples, observations(y), population, parameters=case.parameters, generator=seeded(), starts=1
        )
        return [warning for warning in fit.warnings if "common value of sigma lies more than" in warning]

    assert told(case.y) == []
    assert "cell_17" in told(odd)[0]


@dataclass(frozen=True, eq=False)
class LaplacePopulation:
    """A population model that a user could write: Laplace instead of Gaussian, no closed-form M-step."""

    parameters: ParameterSpace
    constant: tuple[int, ...] = ()

    @property
    def varying(self) -> tuple[int, ...]:
        return tuple(range(len(self.parameters)))

    @property
    def unknowns(self) -> ParameterTable:
        names = self.parameters.names
        size = len(names)
        return ParameterTable(
            rows=tuple(Unknown(quantity, name) for quantity in ("mean", "log_scale") for name in names),
            transforms=("identity",) * size + ("log",) * size,
            starts=torch.full((2 * size,), math.nan, dtype=DOUBLE),
            fixed=torch.zeros(2 * size, dtype=torch.bool),
        )

    def log_prob(self, phi: Tensor, theta: Tensor, design: Design) -> Tensor:
        size = len(self.parameters)
        # A smooth Laplace density: its logarithm has a second derivative everywhere.
        scale = theta[size:].exp()
        distance = ((phi - theta[:size]) / scale).square().add(1).sqrt()
        # Normaliser: the integral of exp(-sqrt(1 + z^2)) is 2 K_1(1).
        return (-distance - scale.log() - math.log(2 * 0.6019072301972346)).sum(-1)

    def constants(self, theta: Tensor, design: Design) -> Tensor:
        return theta[:0].expand(len(design), 0)

    def sample(self, theta: Tensor, design: Design, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def from_moments(self, mean: Tensor, covariance: Tensor) -> Tensor:
        return torch.cat([mean, covariance.diagonal().sqrt().log()])

    def statistics(self, weights: Tensor, phi: Tensor, theta: Tensor, design: Design) -> None:
        return None

    def m_step(self, statistics: Tensor, theta: Tensor) -> Tensor:
        return theta

    def mean(self, theta: Tensor) -> Tensor:
        return theta[: len(self.parameters)]

    def covariance(self, theta: Tensor) -> Tensor:
        # Var z = K_2(1)/K_1(1) for this density.
        return torch.diag((2 * theta[len(self.parameters) :]).exp() * (1.6248388986351774 / 0.6019072301972346))


@pytest.mark.slow
def test_a_new_population_model_is_one_class() -> None:
    case = ConjugateCase.simulated([0.5], torch.tensor([[0.36]], dtype=DOUBLE), individuals=60, seed=11)
    model = LaplacePopulation(case.parameters)
    fit = fit_population(case.samples(1500, seed=1), case.observations, model, generator=seeded(), starts=3)
    assert fit.converged, fit.message
    # Oracle: the objective by quadrature over phi, maximal at the estimate.
    grid = torch.linspace(-8, 8, 1601, dtype=DOUBLE)
    likelihood = Normal(grid, case.noise).log_prob(case.y)

    def exact(theta: Tensor) -> Tensor:
        density = model.log_prob(grid[:, None], theta, case.observations.design)
        return torch.logsumexp(likelihood + density, 1).sum()

    slope = torch.func.jacrev(exact)(fit.theta)
    se = torch.linalg.inv(-torch.func.hessian(exact)(fit.theta)).diagonal().sqrt()
    assert bool(((slope * se).abs() < 5 * fit.monte_carlo.se / se + 0.02).all())
    assert "uptake" in str(fit.table())


@pytest.mark.parametrize(
    ("individuals", "population", "words"),
    [
        (1, GaussianPopulation(), "1 individuals cannot determine the variance of 3 varying parameters"),
        (3, GaussianPopulation(covariance="full"), r"at least 4 are needed.*covariance=diagonal"),
    ],
)
def test_too_few_individuals_are_refused(individuals: int, population: GaussianPopulation, words: str) -> None:
    case = ConjugateCase.simulated(MEAN, DIAGONAL, individuals=individuals, seed=12)
    with pytest.raises(ValueError, match=words):
        fit_population(ExactPosterior(case), case.observations, population, generator=seeded())


@pytest.mark.slow
def test_fewer_individuals_than_unknowns_is_told() -> None:
    case = ConjugateCase.simulated(MEAN, DIAGONAL, individuals=5, seed=13)
    fit = fit_population(
        ExactPosterior(case),
        case.observations,
        GaussianPopulation(),
        estimator=PriorRatio(draws=400, max_draws=400),
        generator=seeded(),
        starts=1,
    )
    assert any("5 individuals for 6 unknowns" in warning for warning in fit.warnings)


@pytest.mark.slow
def test_values_outside_the_prior_leave_no_start() -> None:
    samples, data = uniform_case(0.3)
    population = GaussianPopulation(constant=("sigma",), fixed={"mean": {"sigma": math.exp(2.5)}})
    with pytest.raises(ValueError, match=r"not finite at any start, for 80 of 80 individuals\. First: cell_0"):
        fit_population(samples, data, population, parameters=parameter_space(), generator=seeded())


def test_samples_alone_do_not_tell_the_units() -> None:
    case = ConjugateCase.simulated(MEAN, DIAGONAL, individuals=5, seed=14)
    with pytest.raises(ValueError, match=r"parameters=simulator\.parameters"):
        fit_population(case.samples(50, seed=1), case.observations, GaussianPopulation(), generator=seeded())


@pytest.mark.parametrize("settings", [{"starts": 0}, {"accuracy": 0.0}])
def test_impossible_settings_are_refused(settings: dict) -> None:
    case = ConjugateCase.simulated(MEAN, DIAGONAL, individuals=5, seed=14)
    with pytest.raises(ValueError, match="starts must be at least 1 and accuracy above 0"):
        fit_population(ExactPosterior(case), case.observations, GaussianPopulation(), generator=seeded(), **settings)


@pytest.mark.slow
def test_wished_starts_are_taken() -> None:
    case = ConjugateCase.simulated(MEAN, DIAGONAL, individuals=40, seed=15)
    plain, wished = (
        fit_population(
            case.samples(500, seed=1),
            case.observations,
            GaussianPopulation(start=start),
            parameters=case.parameters,
            generator=seeded(),
            starts=1,
        )
        for start in ({}, {"mean": {"uptake": 9.0}, "sd": {"decay": 1.5}})
    )
    # Another way, the same place: a converged fit is within 0.01 SE of its optimum.
    assert float(((plain.theta - wished.theta).abs() / plain.standard_errors).max()) < 0.02
    assert not torch.equal(plain.theta, wished.theta)


@pytest.mark.slow
def test_a_fit_is_plain_numbers() -> None:
    case = ConjugateCase.simulated(MEAN, NO_SIGMA, individuals=12, seed=16)
    fit = fit_population(
        case.samples(300, seed=1),
        case.observations,
        GaussianPopulation(constant=("sigma",), fixed={"sd": {"decay": 0.5}}),
        parameters=case.parameters,
        generator=seeded(),
        starts=2,
    )
    written = json.loads(json.dumps(fit.to_dict(), allow_nan=False))
    assert written["minus_two_log_likelihood"] is None
    assert written["log_likelihood_ratio"] == pytest.approx(fit.objective)
    assert written["estimated_unknowns"] == 4
    deviance = -2 * (fit.objective - fit.monte_carlo.objective_bias)
    assert fit.aic == pytest.approx(deviance + 8)
    assert fit.bic == pytest.approx(deviance + 4 * math.log(12))
    # Two means and one SD of parameters that vary; the value of the one that does not counts with its measurements.
    assert fit.bicc == pytest.approx(deviance + 3 * math.log(12) + math.log(36))
    frame = fit.individuals_frame()
    assert list(frame["id"]) == list(case.observations.ids)
    assert frame["uptake"].tolist() == pytest.approx(fit.individuals.mean[:, 0].exp().tolist())
    assert list(fit.individuals_frame(["cell_3", "cell_1"])["id"]) == ["cell_3", "cell_1"]
    with pytest.raises(ValueError, match=r"No such individuals.*nobody"):
        fit.individuals_frame(["nobody"])


@pytest.mark.slow
def test_a_fit_runs_on_every_device(device: torch.device, generator: torch.Generator) -> None:
    case = ConjugateCase.simulated(MEAN, NO_SIGMA, individuals=30, seed=17)
    samples = case.samples(500, seed=1)
    moved = PosteriorSamples(samples.names, samples.phi.to(device), samples.log_q.to(device), samples.prior)
    population = GaussianPopulation(constant=("sigma",))
    settings = {"parameters": case.parameters, "starts": 2}
    here = fit_population(samples, case.observations, population, generator=seeded(), **settings)
    there = fit_population(moved, case.observations.to(device), population, generator=generator, **settings)
    assert there.theta.device.type == device.type
    torch.testing.assert_close(there.theta.cpu(), here.theta, rtol=1e-3, atol=1e-3)

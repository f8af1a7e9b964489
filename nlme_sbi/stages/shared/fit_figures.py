"""The figures of a population fit: individual fits, pair plots of chosen individuals, population density."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from nlme_sbi.diagnostics.fit.predictive_bands import dense_design, predictive_bands
from nlme_sbi.numerics.weighted_draws import equal_draws
from nlme_sbi.plots.canvas import parameter_labels, save_png
from nlme_sbi.plots.individuals.individual_fits import plot_individual_fits
from nlme_sbi.plots.pairs import plot_pairs
from nlme_sbi.plots.population import plot_population
from nlme_sbi.population.models.interface import is_gaussian
from nlme_sbi.population.objective.individuals import individual_typical
from nlme_sbi.population.results.fit_result import PopulationFit
from nlme_sbi.runs import write_atomically
from nlme_sbi.stages.shared.attempts import attempt_part
from nlme_sbi.stages.shared.trained_posterior import AnyPosterior
from nlme_sbi.types import Observations, TractableSimulator

log = logging.getLogger(__name__)

_DRAWS = 500  # for each individual; what a 95% band needs to look smooth
_POPULATION_INDIVIDUALS = 500  # more would only blacken the panel
_SAMPLED = 50_000  # individuals whose density is drawn for a population that is not normal


def save_figures(
    directory: Path,
    fit: PopulationFit,
    posterior: AnyPosterior,
    observations: Observations,
    *,
    generator: torch.Generator,
    individuals: int,
) -> None:
    """Write ``individual_fits.png``, ``population.png``, ``pairs_typical.png`` and ``pairs_worst.png``.

    The log says which of them cannot be drawn and why.

    Args:
        directory: the run's.
        fit: of these observations.
        posterior: that the fit's draws came from.
        observations: the data.
        generator: for resampling and measurement noise, on the device of the draws.
        individuals: panels of individual fits.
    """
    observations = observations.to(posterior.device)
    shown = spread_rows(len(observations), individuals)
    drawn = fit.individual_draws(_DRAWS, generator)
    simulator, names = posterior.simulator, parameter_labels(posterior.parameters)

    def population() -> Figure:
        means, sds = individual_typical(fit.state, fit.theta)
        some = spread_rows(len(observations), _POPULATION_INDIVIDUALS)
        sampled = None
        if not is_gaussian(fit.population):
            rows = torch.arange(_SAMPLED, device=observations.values.device) % len(observations)
            sampled = fit.population.sample(fit.theta, observations.design[rows], generator)
        return plot_population(names, means, torch.diag_embed(sds.square()), drawn[some], sampled=sampled)

    def pairs(row: int) -> Figure:
        found = posterior.sample(observations[[row]], 4 * _DRAWS, generator)
        before = equal_draws(found.phi, found.log_weights)[0].double()
        name = fit.ids[row]
        # The name comes last, because Matplotlib's legends leave out what begins with "_".
        labels = [f"training prior: {name}", f"given the population: {name}"]
        return plot_pairs([before, drawn[row]], names, labels=labels)

    ranked = torch.argsort(fit.ess)
    typical, worst = int(ranked[len(ranked) // 2]), int(ranked[0])
    if isinstance(simulator, TractableSimulator):
        fits = partial(_fits, observations[shown], drawn[shown], simulator, generator)
        attempt_part("individual_fits.png", partial(_save, directory / "individual_fits.png", fits))
    else:
        log.info("No individual fits: the simulator has no noise-free prediction.")
    for file, made in (
        ("population.png", population),
        ("pairs_typical.png", partial(pairs, typical)),
        ("pairs_worst.png", partial(pairs, worst)),
    ):
        attempt_part(file, partial(_save, directory / file, made))


def spread_rows(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of ``count`` rows, evenly spread, first and last included."""
    return sorted({round(place) for place in torch.linspace(0, count - 1, min(count, wanted)).tolist()})


def _fits(
    observations: Observations, draws: torch.Tensor, simulator: TractableSimulator, generator: torch.Generator
) -> Figure:
    bands = predictive_bands(simulator, draws, dense_design(observations.design), generator=generator)
    return plot_individual_fits(observations, bands, rows=range(len(observations)))


def _save(path: Path, make: Callable[[], Figure]) -> None:
    figure = make()
    write_atomically(path, lambda file: save_png(figure, file))

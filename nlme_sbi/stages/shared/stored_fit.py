"""What a finished fit stores for later stages, and how they load it: no pickles, everything checked."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.compute.devices import choose_device
from nlme_sbi.config.conversion import convert
from nlme_sbi.population.estimators.initialization import in_double
from nlme_sbi.population.models.interface import PopulationModel, PopulationSpecification, VariabilitySpecification
from nlme_sbi.population.results.estimates import FitEstimates
from nlme_sbi.population.results.fit_result import PopulationFit
from nlme_sbi.population.theta_posterior.individuals import LogLikelihood
from nlme_sbi.runs import (
    ChangedSources,
    FinishedRun,
    RunDirectory,
    Sources,
    csv_text,
    find_run,
    load_array,
    load_json,
    load_observations,
    load_run,
    require_same_sources,
    require_unedited,
    save_array,
    save_observations,
    save_text,
    sources_of,
)
from nlme_sbi.runs.remedies import earlier_commands
from nlme_sbi.runs.schema import FIT, FLOATS, check_array
from nlme_sbi.stages.shared.components import stored_part
from nlme_sbi.stages.shared.trained_posterior import (
    AnyPosterior,
    load_posterior,
    posterior_sources,
    untrained_posterior,
)
from nlme_sbi.types import Observations, TractableSimulator

log = logging.getLogger(__name__)

DRAWS, OBSERVATIONS = "individual_draws.npy", "observations"
_OWN_SECTIONS = ("population", "estimator", "simulator", "prior")  # the last two where nothing was trained


@dataclass(frozen=True)
class IndividualSettings:
    """The section ``individuals`` of a fit: stored draws of each (0: none), and whether modes are searched."""

    draws: int
    modes: bool

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> IndividualSettings:
        """Read and check; raises ``ValueError`` with the key."""
        draws = convert(plain["individuals"]["draws"], int, "individuals.draws")
        if draws < 0:
            raise ValueError(f"individuals.draws must be 0 or more; got {draws}.")
        return cls(draws, convert(plain["individuals"]["modes"], bool, "individuals.modes"))


def save_individuals(
    run: RunDirectory, fit: PopulationFit, observations: Observations, *, draws: int, generator: torch.Generator
) -> None:
    """Write ``individuals.csv``, ``individual_draws.npy`` (float32) and ``observations/``.

    Args:
        run: the fit's.
        fit: of these observations, with its modes where they were searched.
        observations: the data.
        draws: of each individual that are kept; none for 0.
        generator: of the resampling, on the device of the fit.
    """
    save_text(run.path / "individuals.csv", csv_text(fit.individuals_frame()))
    if draws > 0:
        save_array(run.path / DRAWS, fit.individual_draws(draws, generator).float())
    save_observations(run.path / OBSERVATIONS, observations.to("cpu"))


@dataclass(frozen=True, eq=False)
class StoredFit:
    """A finished fit with what is needed to go on from it; :func:`load_fit` makes it.

    Args:
        run: its directory.
        posterior: the network or networks that its draws came from; its ``simulator`` is the fit's.
        population: the bound population model.
        observations: the data, on the CPU.
        estimates: of the fit.
        device: where its tensors are, but for the data and the estimates' own.
        draws: ``(I, S, D)`` of ``p(phi | y_i, theta_hat)``, or None where the fit kept none.
        sources: of the code of others behind it, as it was and is.
    """

    run: FinishedRun
    posterior: AnyPosterior
    population: PopulationModel
    observations: Observations
    estimates: FitEstimates
    device: torch.device
    draws: Float[Tensor, "I S D"] | None
    sources: Sources

    @cached_property
    def theta(self) -> Float[Tensor, " P"]:
        """The estimates."""
        return self.estimates.theta.to(self.device)

    @cached_property
    def covariance(self) -> Float[Tensor, "P P"]:
        """Of the estimates; NaN where the fit had none."""
        return self.estimates.covariance.to(self.device)

    def kept_draws(self) -> Float[Tensor, "I S D"]:
        """The :attr:`draws`; raises ``ValueError`` where the fit kept none."""
        if self.draws is None:
            raise ValueError(
                f"{self.run.path} kept no draws of its individuals (individuals.draws=0), which this part is made "
                "from. Fit again with individuals.draws=200."
            )
        return self.draws

    def log_likelihood(self, rows: Sequence[int]) -> LogLikelihood:
        """``log p(y_i | phi)`` of chosen individuals up to a constant: the simulator's, or the network's posterior over
        its prior where the simulator has none."""
        return _Likelihood(self, rows)


class _Likelihood:
    def __init__(self, fit: StoredFit, rows: Sequence[int]) -> None:
        self._observations = in_double(fit.observations[rows], fit.device)
        self._posterior = fit.posterior

    def __call__(self, phi: Float[Tensor, "i n D"], rows: Tensor) -> Float[Tensor, "i n"]:
        some: Observations = self._observations[rows.tolist()]
        simulator = self._posterior.simulator
        if isinstance(simulator, TractableSimulator):
            return simulator.log_likelihood(some, phi)
        return self._posterior.log_prob(phi, some).to(phi) - self._posterior.prior.log_prob(phi)


def find_fit(plain: Mapping[str, Any]) -> FinishedRun:
    """The run that ``fit`` names in a plain configuration; raises ``ValueError`` as :func:`find_run`."""
    run = find_run(
        convert(plain["fit"], str, "fit"),
        stage="fit_population",
        experiment=plain["experiment"]["name"],
        root=Path(plain["output_root"]),
    )
    log.info("Fit: %s", run.path)
    return run


def find_any_fit(plain: Mapping[str, Any]) -> FinishedRun:
    """The run that ``fit`` names in a plain configuration, of ``fit_population`` or of ``train_hierarchical``.

    ``latest`` is the newest of both.

    Raises:
        ValueError: there is none, with the command that makes one.
    """
    reference, experiment = convert(plain["fit"], str, "fit"), plain["experiment"]["name"]
    stages = ("fit_population", "train_hierarchical")
    found: list[FinishedRun] = []
    refused: list[ValueError] = []
    for stage in stages if not plain.get("hierarchy") else reversed(stages):
        try:
            found.append(find_run(reference, stage=stage, experiment=experiment, root=Path(plain["output_root"])))
        except ValueError as problem:
            refused.append(problem)
    if not found:
        # A run of the other stage is refused for its stage first; what is wrong with it is the other sentence.
        raise next((one for one in refused if "but a run of" not in str(one)), refused[0])
    run = max(found, key=lambda one: str(one.manifest["created"]))
    log.info("Fit: %s", run.path)
    return run


def load_fit(run: str | Path | FinishedRun, *, device: str = "auto", trust: tuple[str, ...] = ()) -> StoredFit:
    """A finished fit, checked by its hashes, with the posterior that it was made from.

    Args:
        run: directory of a ``fit_population`` run.
        device: auto, cpu, cuda or cuda:N.
        trust: module prefixes, beside the project's own, that simulator and population may come from.

    Raises:
        ValueError: the run is unfinished, edited, of another stage, or of a version that stored less; or its posterior
            is no longer there or was changed; or code of others, the simulator's or the fit's, has changed since.
    """
    finished = run if isinstance(run, FinishedRun) else load_run(Path(run), stage="fit_population")
    if not finished.has(OBSERVATIONS):
        raise ValueError(
            f"{finished.path} holds no data ({OBSERVATIONS}/): it was made before fits kept what later stages need. "
            "Run its command again with this nlme_sbi."
        )
    upstream = posterior_runs(finished)
    try:
        posterior: AnyPosterior = (
            load_posterior(upstream, device, trust)
            if upstream
            else untrained_posterior(
                {name: finished.section(name) for name in ("prior", "simulator")}, choose_device(device), trust
            )
        )
    except ChangedSources as problem:
        raise problem.and_then(earlier_commands(finished.manifest, finished.path)[-1]) from None
    own = [name for name in _OWN_SECTIONS if name in finished.config]  # the network's are compared when it is loaded
    require_unedited(finished, own, trust=trust)
    estimates = stored_estimates(finished)
    specification = _fitted_specification(finished, estimates, trust)
    require_same_sources(finished, own, trust=trust)
    observations = stored_observations(finished)
    population: PopulationModel = specification.bind(posterior.parameters, observations)
    _require_same_unknowns(finished, estimates, population)
    where = posterior.device
    draws = None
    if finished.has(DRAWS):
        draws = stored_draws(finished, observations.ids, len(posterior.parameters)).to(where)
    return StoredFit(
        run=finished,
        posterior=posterior,
        population=population,
        observations=observations,
        estimates=estimates,
        device=where,
        draws=draws,
        sources={**posterior_sources(upstream, trust), **sources_of(finished.config, _OWN_SECTIONS, trust=trust)},
    )


def stored_observations(run: FinishedRun) -> Observations:
    """The data that a fit keeps; raises ``ValueError`` where they are damaged or not covered by its manifest."""
    run.folder(f"{OBSERVATIONS}/design")
    return load_observations(run.folder(OBSERVATIONS))


def stored_draws(run: FinishedRun, ids: Sequence[str], parameters: int) -> Float[Tensor, "I S D"]:
    """The draws of ``p(phi | y_i, theta_hat)`` that a fit keeps, double precision.

    Raises:
        ValueError: where they are of other individuals or parameters, or not finite: predictions from those would be
            empty or wrong.
    """
    path = run.file(DRAWS)
    found = load_array(path)
    check_array(found, FLOATS, 3, path)
    if (found.shape[0], found.shape[2]) != (len(ids), parameters) or found.shape[1] < 1:
        raise ValueError(
            f"{path} holds draws of shape {found.shape}, but the fit has {len(ids)} individuals and {parameters} "
            "parameters; run the fit's command again with fresh=true."
        )
    broken = ~np.isfinite(found).all(axis=(1, 2))
    if broken.any():
        raise ValueError(
            f"{path}: {int(broken.sum())} of {len(ids)} individuals have draws that are not finite numbers, first "
            f"{ids[int(np.argmax(broken))]}; nothing can be predicted from them. Run the fit's command again with "
            "fresh=true."
        )
    return torch.from_numpy(np.array(found)).double()


def stored_estimates(run: FinishedRun) -> FitEstimates:
    """The estimates of a fit's run, from its ``fit.json``.

    Raises:
        ValueError: where the file is missing or damaged, with the place in it.
    """
    path = run.file("fit.json")
    plain = load_json(path, FIT)
    try:
        return FitEstimates.from_dict(plain)
    except ValueError as problem:
        raise ValueError(f"{path} is damaged: {problem} Run the fit's command again with fresh=true.") from None


def _fitted_specification(run: FinishedRun, estimates: FitEstimates, trust: tuple[str, ...]) -> PopulationSpecification:
    """The population model of a fit, in which parameters whose variance was estimated at 0 are constant."""
    specification: PopulationSpecification = stored_part(
        run.section("population"), PopulationSpecification, where="population", trust=trust
    )
    for name in estimates.vanished:
        if isinstance(specification, VariabilitySpecification):
            specification = specification.without_variability(name)
    return specification


def _require_same_unknowns(run: FinishedRun, estimates: FitEstimates, population: PopulationModel) -> None:
    if estimates.names != population.unknowns.names:
        raise ValueError(
            f"{run.path} estimated {', '.join(estimates.names)}, but its population model now has "
            f"{', '.join(population.unknowns.names)}: another version of nlme_sbi made it. Run its command again."
        )


def posterior_runs(fit: FinishedRun) -> list[FinishedRun]:
    """The runs that a fit's draws came from, found again by their hashes; raises ``ValueError`` where one is gone."""
    inputs = fit.manifest["inputs"]
    names = [name for name in inputs if name == "posterior" or name.startswith("posterior_")]
    return [_locate(fit, inputs[name]) for name in names]


def _locate(fit: FinishedRun, entry: Mapping[str, Any]) -> FinishedRun:
    """The posterior's run: where it lay, else beside the fit in the same output root; recognised by its hash."""
    beside = fit.path.parent.parent / "train_flow"
    recorded = None if entry.get("path") is None else Path(entry["path"])
    places = [] if recorded is None else [recorded, beside / recorded.name]
    places += sorted(beside.iterdir()) if beside.is_dir() else []
    for path in places:
        try:
            found = load_run(path, stage="train_flow", verify=False)
        except ValueError:
            continue
        if found.sha256 == entry["sha256"]:
            return load_run(path, stage="train_flow")
    hint = "" if recorded is None else f" It was {recorded}."
    raise ValueError(
        f"The posterior that {fit.path} was made from is not there any more, or was changed.{hint} Put it back below "
        f"{beside}, or fit again with another posterior."
    )

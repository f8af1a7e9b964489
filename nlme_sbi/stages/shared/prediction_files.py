"""What stages that predict have in common: their settings, bands of groups of individuals, files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.config.conversion import convert
from nlme_sbi.diagnostics.fit.predictive_bands import PredictiveBands, outcomes, predictive_bands
from nlme_sbi.plots.canvas import save_png
from nlme_sbi.plots.predictions import SignalNames, plot_predictions
from nlme_sbi.runs import RunDirectory, csv_text, save_array, save_text, write_atomically
from nlme_sbi.runs.remedies import typed
from nlme_sbi.stages.shared.fit_figures import spread_rows
from nlme_sbi.types import Design, Observations, Simulator

Kind = Literal["individual", "new individual"]
_FILES: Mapping[Kind, str] = {"individual": "individuals", "new individual": "new_individuals"}
_MOST_NUMBERS = 2**27  # predictions that are kept as .npy, 1 GiB


@dataclass(frozen=True)
class PredictionSettings:
    """The section ``predict`` and its neighbours."""

    draws: int
    quantiles: tuple[float, ...]
    save_draws: bool
    panels: int
    theta: str
    individuals: Literal["all", "none"] | tuple[str, ...]
    new: Literal["auto"] | bool

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> PredictionSettings:
        """Read and check; raises ``ValueError`` with the key."""
        section = plain["predict"]
        draws = convert(section["draws"], int, "predict.draws")
        quantiles = convert(section["quantiles"], tuple[float, ...], "predict.quantiles")
        panels = convert(plain["figures"]["individuals"], int, "figures.individuals")
        for key, value in (("predict.draws", draws), ("figures.individuals", panels)):
            if value < 1:
                raise ValueError(f"{key} must be at least 1; got {value}.")
        increasing = all(low < high for low, high in pairwise(quantiles))
        if not quantiles or not increasing or not 0 < quantiles[0] <= quantiles[-1] < 1:
            raise ValueError(f"predict.quantiles must increase between 0 and 1, at least one; got {list(quantiles)}.")
        return cls(
            draws=draws,
            quantiles=quantiles,
            save_draws=convert(section["save_draws"], bool, "predict.save_draws"),
            panels=panels,
            theta=convert(plain["theta"], str, "theta"),
            individuals=_read_individuals(plain["individuals"]),
            new=_read_new(plain["new"]),
        )


@dataclass(frozen=True, eq=False)
class Scale:
    """From a model's scale back to the data's: ``factors (C,)`` times what is predicted, plus ``shift (I, 1, C)``."""

    factors: Float[Tensor, " C"]
    shift: Float[Tensor, "I 1 C"]

    def apply(self, values: Float[Tensor, "I N T C"]) -> Float[Tensor, "I N T C"]:
        """Values on the data's scale."""
        return values * self.factors.to(values) + self.shift[:, None].to(values)


@dataclass(frozen=True, eq=False)
class Predictions:
    """One group of predictions: who, draws of their parameters, their bands; ``scale`` is that of a model whose data
    were prepared, whose bands are on the data's own scale already."""

    kind: Kind
    ids: tuple[str, ...]
    design: Design
    phi: Float[Tensor, "I K D"]
    bands: PredictiveBands
    scale: Scale | None = None


def _read_individuals(given: Any) -> Literal["all", "none"] | tuple[str, ...]:
    if given in ("all", "none"):
        return given  # type: ignore[no-any-return]
    # True and 1.0 in a YAML were not typed so: which id is meant is not known.
    if isinstance(given, list) and given and all(type(one) in (str, int) for one in given):
        return tuple(str(one) for one in given)
    raise ValueError(
        f"individuals must be all, none, or a list of ids such as {typed('individuals', ['1', '5'])}, in a YAML "
        f"between quotation marks; got {given!r}."
    )


def _read_new(given: Any) -> Literal["auto"] | bool:
    if isinstance(given, bool):
        return given
    if given == "auto":
        return "auto"
    raise ValueError(f"new must be true, false or auto; got {given!r}.")


def predict_group(
    kind: Kind,
    ids: tuple[str, ...],
    design: Design,
    phi: Tensor,
    simulator: Simulator,
    settings: PredictionSettings,
    generator: torch.Generator,
    scale: Scale | None = None,
) -> Predictions:
    """Bands of individuals whose parameters were drawn.

    Args:
        kind: who they are.
        ids: their names.
        design: theirs.
        phi: of every draw.
        simulator: of these parameters.
        settings: quantiles.
        generator: of the measurement noise.
        scale: back to the data's, where the model has another.
    """
    bands = predictive_bands(simulator, phi, design, generator=generator, probabilities=settings.quantiles)
    if scale is not None:
        curves = None if bands.noise_free is None else scale.apply(bands.noise_free)
        bands = replace(bands, noise_free=curves, with_noise=scale.apply(bands.with_noise))
    return Predictions(kind, ids, design, phi, bands, scale)


def failure_warnings(group: Predictions) -> list[str]:
    """What to say of draws without a finite prediction; raises ``ValueError`` where no one has any."""
    broken = torch.nonzero(group.bands.failed)[:, 0]
    if len(broken) == 0:
        return []
    first = int(broken[0])
    lost = torch.nonzero(group.bands.failed >= group.phi.shape[1])[:, 0]
    if len(lost) == len(group.ids):
        raise ValueError(
            f"No prediction is finite for any {group.kind}, whatever the draw: nothing is left to take quantiles of. "
            "Look at the fit's table and at the times and doses that are asked for."
        )
    if len(lost):
        return [
            f"{len(lost)} of {len(group.ids)} ({group.kind}) have no prediction at all, because that of every draw is "
            f"not finite; their quantiles are empty. First: {group.ids[int(lost[0])]}."
        ]
    return [
        f"{len(broken)} of {len(group.ids)} ({group.kind}) have draws whose prediction is not finite, which are left "
        f"out of the quantiles; first: {group.ids[first]}, {int(group.bands.failed[first])} of {group.phi.shape[1]}."
    ]


def save_predictions(
    run: RunDirectory,
    made: Sequence[Predictions],
    names: SignalNames,
    settings: PredictionSettings,
    *,
    data: Observations | None,
) -> None:
    """``predictions.csv`` and the figures.

    Args:
        run: of the predictions.
        made: groups of them.
        names: signals and units of what is predicted.
        settings: quantiles, panels.
        data: measurements of the individuals, where they belong into the same picture.
    """
    text = csv_text(pd.concat([_frame(group, names, settings) for group in made]), float_format="%.8g")
    save_text(run.path / "predictions.csv", text)
    for group in made:
        shown = spread_rows(len(group.ids), settings.panels)
        some = None
        if group.kind == "individual" and data is not None:
            some = data[[data.ids.index(group.ids[row]) for row in shown]]
        titles = [group.ids[row] if group.kind == "individual" else f"new: {group.ids[row]}" for row in shown]
        figure = plot_predictions(_some(group.bands, shown), titles, names, data=some)
        path = run.path / f"{_FILES[group.kind]}.png"
        write_atomically(path, lambda file, figure=figure: save_png(figure, file))  # type: ignore[misc]


def save_draws(
    run: RunDirectory, made: Sequence[Predictions], simulator: Simulator, generators: Sequence[torch.Generator]
) -> None:
    """``draws/``: parameters, and what the model predicts for them, draw by draw.

    Args:
        run: of the predictions.
        made: groups of them.
        simulator: of their parameters.
        generators: of the measurement noise, one a group.
    """
    for group, generator in zip(made, generators, strict=True):
        name = _FILES[group.kind]
        count = group.phi.shape[0] * group.phi.shape[1] * group.design.times.shape[1] * group.design.observed.shape[2]
        if count > _MOST_NUMBERS:
            raise ValueError(
                f"predict.save_draws would keep {count} predictions of the {name}; take fewer of them "
                f"({typed('individuals', ['ID', 'ID'])}), fewer times or fewer predict.draws."
            )
        found = outcomes(simulator, group.phi, group.design, generator)
        scaled = group.scale.apply if group.scale is not None else lambda values: values
        save_array(run.path / "draws" / f"{name}_phi.npy", group.phi)
        save_array(run.path / "draws" / f"{name}_measurements.npy", scaled(found.with_noise))
        if found.noise_free is not None:
            save_array(run.path / "draws" / f"{name}_predictions.npy", scaled(found.noise_free))


def _some(bands: PredictiveBands, rows: list[int]) -> PredictiveBands:
    noise_free = None if bands.noise_free is None else bands.noise_free[rows]
    return replace(
        bands,
        times=bands.times[rows],
        noise_free=noise_free,
        with_noise=bands.with_noise[rows],
        failed=bands.failed[rows],
    )


def _frame(group: Predictions, names: SignalNames, settings: PredictionSettings) -> pd.DataFrame:
    """One row for each id, time, signal and quantity, with a column a quantile."""
    kinds = [("prediction", group.bands.noise_free), ("measurement", group.bands.with_noise)]
    there = [(name, values.cpu().numpy()) for name, values in kinds if values is not None]
    individuals, _, times, signals = there[-1][1].shape
    shape = (individuals, times, signals, len(there))
    who, when, what, quantity = (place.reshape(-1) for place in np.indices(shape))
    values = np.stack([numbers for _, numbers in there], -1).transpose(0, 2, 3, 4, 1).reshape(len(who), -1)
    columns: dict[str, Any] = {
        "who": group.kind,
        "id": np.array(group.ids)[who],
        "time": group.bands.times.cpu().numpy()[who, when],
        "signal": np.array(names.signals)[what],
        "quantity": np.array([name for name, _ in there])[quantity],
    }
    columns |= {f"q{100 * level:g}": values[:, place] for place, level in enumerate(settings.quantiles)}
    columns |= {"unit": np.array(names.signal_units)[what], "time_unit": names.time_unit}
    # Rows of a data file are padded with their last time.
    return pd.DataFrame(columns).drop_duplicates(["id", "time", "signal", "quantity"])


def prediction_results(
    made: Sequence[Predictions], settings: PredictionSettings, warnings: Sequence[str]
) -> dict[str, Any]:
    """What the manifest says of predictions."""
    counts = {group.kind: len(group.ids) for group in made}
    return {
        "individuals": counts.get("individual", 0),
        "new_individuals": counts.get("new individual", 0),
        "draws": settings.draws,
        "warnings": list(warnings),
    }

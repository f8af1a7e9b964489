"""Hold out each fold, or each level of a grouping variable, in turn, and score the predictions of who was held out."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from scipy import stats

from nlme_sbi.config.conversion import convert
from nlme_sbi.config.wording import as_names, did_you_mean, listed, quoted
from nlme_sbi.designs import Reader
from nlme_sbi.hierarchical.batches import levels_and_codes, read_folds
from nlme_sbi.hierarchical.references import model_free_references
from nlme_sbi.runs import FinishedRun, csv_text, load_run, open_run, save_text
from nlme_sbi.stages.shared.components import part
from nlme_sbi.stages.shared.trained_hierarchy import load_hierarchy
from nlme_sbi.stages.train_hierarchical import make_hierarchy
from nlme_sbi.types import Observations

log = logging.getLogger(__name__)

_MODEL = "given the population"
_COLUMNS = ("predicted_rmse", "predicted_crps", "predicted_coverage_90")


@dataclass(frozen=True, eq=False)
class Split:
    """A part of the data that is held out: its name, what ``held_out`` says for it, and the run that leaves it out."""

    name: str
    held_out: Mapping[str, Any]
    run: FinishedRun | None = None


def cross_validate(cfg: DictConfig) -> float:
    """Fit the model once for each part that is held out, and table how its individuals were predicted.

    Each fit is a run of ``train_hierarchical`` of its own: the same command goes on where it was interrupted.

    Args:
        cfg: composed configuration of ``train_hierarchical`` with ``by``, ``folds``, ``levels`` and ``references``.

    Returns:
        Minus the mean log density of held-out individuals given the population, in nats, which sweepers minimise.

    Raises:
        ValueError: one sentence for each wrong input, before training starts.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    with_references = convert(plain["references"], bool, "references")
    observations: Observations = part(plain["data"], Reader, where="data", trust=tuple(plain["trust"])).read()
    splits = _splits(plain, observations)
    made = []
    for place, split in enumerate(splits):
        log.info("Held out: %s (%d of %d)", split.name, place + 1, len(splits))
        made.append(Split(split.name, split.held_out, make_hierarchy({**plain, "held_out": dict(split.held_out)})))
    run = open_run(
        stage="cross_validate",
        experiment=plain["experiment"]["name"],
        config={"by": plain["by"], "references": with_references, "splits": [split.name for split in made]},
        inputs={f"fit_{place}": _run(split).sha256 for place, split in enumerate(made)},
        root=Path(plain["output_root"]),
        fresh=plain["fresh"],
        input_paths={f"fit_{place}": _run(split).path for place, split in enumerate(made)},
    )
    with run:
        if run.finished:
            log.info("This table is finished already: %s (fresh=true makes it again)", run.path)
        else:
            individuals, signals = _individual_scores(made), _signal_scores(made)
            if with_references:
                theirs = [_reference_scores(split, tuple(plain["trust"])) for split in made]
                individuals = pd.concat([individuals, *(one for one, _ in theirs)], ignore_index=True)
                signals = pd.concat([signals, *(one for _, one in theirs)], ignore_index=True)
            table, gains = summarise(individuals, signals), paired_gains(individuals)
            for name, frame in (
                ("individuals", individuals),
                ("signals", signals),
                ("table", table),
                ("paired", gains),
            ):
                save_text(run.path / f"{name}.csv", csv_text(frame))
            whole = table[(table.split == "all") & (table.prediction == _MODEL)]
            run.finish({"log_density": float(whole.log_density.iloc[0]), "splits": len(made)})
    found = load_run(run.path, stage="cross_validate")
    for name in ("table", "paired"):
        log.info("%s", pd.read_csv(found.file(f"{name}.csv")).to_string(index=False, float_format="%.4g", na_rep=""))
    log.info("Results: %s (table.csv, paired.csv, signals.csv, individuals.csv)", found.path)
    return -found.number("log_density")


def _run(split: Split) -> FinishedRun:
    if split.run is None:
        raise ValueError(f"{split.name} was not fitted.")
    return split.run


def _splits(plain: Mapping[str, Any], observations: Observations) -> list[Split]:
    """What is held out in turn."""
    by, given = convert(plain["by"], str, "by"), plain["held_out"]
    own: dict[str, Any] = dict.fromkeys(("fold", "group", "level", "parts", "part"))
    fixed = [f"held_out.{key}={given[key]}" for key in own if given.get(key) is not None]
    if fixed:
        raise ValueError(f"cross_validate holds out every part in turn; leave {listed(fixed)} out.")
    if by != "fold":
        levels, codes = levels_and_codes(observations, by, "by")
        present = [level for code, level in enumerate(levels) if bool((codes == code).any())]
        chosen = _chosen_levels(plain["levels"], present, by)
        if len(present) < 2:
            raise ValueError(f"by={by}: all individuals are in one level, {quoted(present[0])}; nothing would be left.")
        chosen = [level for level in chosen if _is_known_elsewhere(plain, observations, by, level)]
        if not chosen:
            raise ValueError(f"by={by}: no level can be left out and predicted from the others.")
        base = {**given, **own, "folds": None, "group": by}
        return [Split(f"{by}={level}", {**base, "level": level}) for level in chosen]
    if plain["levels"] != "all":
        raise ValueError("levels names levels of a grouping variable; say which: by=NAME.")
    if given.get("folds") is not None:
        names = sorted(set(read_folds(given["folds"], observations.ids)))
        return [Split(f"fold {name}", {**given, **own, "fold": name}) for name in names]
    count = convert(plain["folds"], int, "folds")
    if not 2 <= count <= len(observations):
        raise ValueError(f"folds must lie between 2 and the {len(observations)} individuals; got {count}.")
    return [Split(f"fold {place}", {**given, **own, "parts": count, "part": place}) for place in range(1, count + 1)]


def _is_known_elsewhere(plain: Mapping[str, Any], observations: Observations, by: str, level: str) -> bool:
    """Whether all that parameters have effects of in this level is in others, too; else that is said, or refused where
    the level was asked for by name."""
    levels, codes = levels_and_codes(observations, by, "by")
    out = codes == levels.index(level)
    parameters: Mapping[str, Mapping[str, Any]] = (plain.get("hierarchy") or {}).get("parameters", {})
    for name, entry in parameters.items():
        for factor in as_names(f"hierarchy.parameters.{name}.by", entry["by"]) if "by" in entry else ():
            names, of_factor = levels_and_codes(observations, factor, f"hierarchy.parameters.{name}.by")
            given = entry.get("reference")
            reference = given.get(factor) if isinstance(given, Mapping) else given
            lost = set(of_factor[out].tolist()) - set(of_factor[~out].tolist())
            unknown = [names[code] for code in sorted(lost) if names[code] != str(reference)]
            if unknown:
                sentence = (
                    f"{by}={level} cannot be predicted from the others: {factor} {listed(unknown)} is in no other, and "
                    f"{name} has an effect of it."
                )
                if plain["levels"] != "all":
                    raise ValueError(f"{sentence} Leave it out of levels.")
                log.warning("%s It is not held out.", sentence)
                return False
    return True


def _chosen_levels(asked: Any, present: Sequence[str], by: str) -> list[str]:
    if asked == "all":
        return list(present)
    if not isinstance(asked, list) or not asked:
        raise ValueError(f"levels must be all, or a list of levels of {by}; got {asked!r}.")
    wrong = [str(level) for level in asked if str(level) not in present]
    if wrong:
        raise ValueError(
            f"levels names {listed(wrong)}; {by} has {listed(list(present))}.{did_you_mean(wrong[0], present)}"
        )
    return [str(level) for level in asked]


def _individual_scores(made: Sequence[Split]) -> pd.DataFrame:
    """Log densities of held-out individuals: the network's bound, then from refined posteriors under the priors that it
    was trained with, and given the population."""
    found = []
    for split in made:
        bounds = pd.read_csv(_run(split).file("bounds.csv"), dtype={"id": str})
        out = bounds[bounds.side == "held_out"]
        columns = (("network alone", "bound"), ("under the priors", "under_priors"), (_MODEL, "given_population"))
        for name, column in columns:
            found.append(
                pd.DataFrame({"split": split.name, "prediction": name, "id": out.id, "log_density": out[column]})
            )
    return pd.concat(found, ignore_index=True)


def _signal_scores(made: Sequence[Split]) -> pd.DataFrame:
    found = []
    for split in made:
        scores = pd.read_csv(_run(split).file("scores.csv"))
        out = scores[scores.side == "held_out"].reset_index(drop=True)
        columns = {name.removeprefix("predicted_"): out[name] for name in _COLUMNS}
        found.append(pd.DataFrame({"split": split.name, "prediction": _MODEL, "signal": out.signal, **columns}))
    return pd.concat(found, ignore_index=True)


def _reference_scores(split: Split, trust: tuple[str, ...]) -> tuple[pd.DataFrame, pd.DataFrame]:
    prepared = load_hierarchy(_run(split).path, trust=trust).prepared
    ids, signals = prepared.held_out.observations.ids, prepared.held_out.observations.signals
    individuals, of_signals = [], []
    for one in model_free_references(prepared.fitted, prepared.held_out):
        name = f"no model: {one.name}"
        individuals.append(
            pd.DataFrame({"split": split.name, "prediction": name, "id": ids, "log_density": one.correlated.numpy()})
        )
        scores = {"rmse": one.rmse.numpy(), "crps": one.crps.numpy(), "coverage_90": one.coverage.numpy()}
        of_signals.append(pd.DataFrame({"split": split.name, "prediction": name, "signal": signals, **scores}))
    return pd.concat(individuals, ignore_index=True), pd.concat(of_signals, ignore_index=True)


def summarise(individuals: pd.DataFrame, signals: pd.DataFrame) -> pd.DataFrame:
    """A row for every split and prediction, and "all" over the splits: log density (mean of individuals, nats), RMSE
    and 90% coverage by signal, CRPS summed over signals."""
    order = list(dict.fromkeys(individuals.split))
    rows = []
    for prediction in dict.fromkeys(individuals.prediction):
        ours = individuals[individuals.prediction == prediction]
        scored = signals[signals.prediction == prediction]
        counts = ours.groupby("split").size()
        for split in [*(one for one in order if one in counts.index), "all"]:
            inside = ours if split == "all" else ours[ours.split == split]
            row: dict[str, Any] = {"split": split, "prediction": prediction, "individuals": len(inside)}
            row["log_density"] = inside.log_density.mean()
            here = scored if split == "all" else scored[scored.split == split]
            if len(here):
                weights = here.split.map(counts).to_numpy(float)
                row["crps"] = sum(_average(here.crps, weights, here.signal).values())
                row |= {
                    f"rmse {name}": math.sqrt(value)
                    for name, value in _average(here.rmse**2, weights, here.signal).items()
                }
                row |= {
                    f"coverage {name}": value
                    for name, value in _average(here.coverage_90, weights, here.signal).items()
                }
            rows.append(row)
    table = pd.DataFrame(rows)
    places = {name: place for place, name in enumerate([*order, "all"])}
    return table.sort_values("split", key=lambda column: column.map(places), kind="stable").reset_index(drop=True)


def _average(values: pd.Series, weights: np.ndarray, signals: pd.Series) -> dict[str, float]:
    """Mean over splits, each counted by its individuals, of every signal."""
    frame = pd.DataFrame({"signal": signals, "value": values * weights, "weight": weights})
    found = frame.groupby("signal", sort=False)[["value", "weight"]].sum()
    return {str(name): float(row.value / row.weight) for name, row in found.iterrows()}


def paired_gains(individuals: pd.DataFrame) -> pd.DataFrame:
    """What the population is worth against every other prediction: mean difference of the log density of the same
    individuals in nats, its standard error, and the two-sided p of a paired t test."""
    wide = individuals.pivot(index=["split", "id"], columns="prediction", values="log_density")
    splits = list(dict.fromkeys(individuals.split))
    rows = []
    for other in [name for name in dict.fromkeys(individuals.prediction) if name != _MODEL]:
        difference = (wide[_MODEL] - wide[other]).dropna()
        for split in [*splits, *(["all"] if len(splits) > 1 else [])]:
            inside = difference if split == "all" else difference[difference.index.get_level_values("split") == split]
            count = len(inside)
            if count == 0:
                continue
            error = float(inside.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
            mean = float(inside.mean())
            p = 2 * float(stats.t.sf(abs(mean) / error, count - 1)) if count > 1 and error > 0 else math.nan
            row = {
                "split": split,
                "against": other,
                "individuals": count,
                "gain": mean,
                "standard_error": error,
                "p": p,
            }
            rows.append(row)
    return pd.DataFrame(rows)

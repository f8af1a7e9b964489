"""After several fits of the same data: criteria, differences and likelihood-ratio tests in one table."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nlme_sbi.config.conversion import convert
from nlme_sbi.population.results.model_comparison import ComparedFit, compare_models
from nlme_sbi.runs import FinishedRun, csv_text, load_run, open_run, save_json, save_text
from nlme_sbi.runs.files import sha256_of_plain
from nlme_sbi.stages.shared.stored_fit import stored_estimates

log = logging.getLogger(__name__)


def compare_fits(cfg: DictConfig) -> None:
    """Compare fits; the run holds ``comparison.txt``, ``.csv`` and ``.json``.

    Args:
        cfg: composed configuration with ``fits`` (run directories of fit_population, at least two), ``output_root``
            and ``fresh``.

    Raises:
        ValueError: where a run is missing, unfinished or edited, or likelihoods are not comparable.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    named = convert(plain["fits"], list[str], "fits")
    if len(named) < 2:
        raise ValueError(
            f"A comparison needs at least two fits; got {len(named)}. For example: python scripts/compare_fits.py "
            "outputs/fit_population/RUN outputs/fit_population/RUN"
        )
    root = Path(plain["output_root"])
    runs = [_find_runs(reference, root) for reference in named]
    if len({run.sha256 for run in runs}) < len(runs):
        raise ValueError("The same fit was named twice; a comparison is between different ones.")
    # Fits that were made before runs kept the source of their simulators are compared by configuration alone.
    kept = all("sources" in run.manifest for run in runs)
    found = compare_models([_read(run, by_source=kept) for run in runs])
    made = open_run(
        stage="compare_fits",
        experiment=runs[0].manifest["experiment"],
        config={"fits": [run.path.name for run in runs]},
        inputs={f"fit_{place}": run.sha256 for place, run in enumerate(runs)},
        root=root,
        fresh=plain["fresh"],
    )
    with made as run:
        if not run.finished:
            texts = {"comparison.txt": found.text(), "comparison.csv": csv_text(found.frame())}
            for name, text in texts.items():
                save_text(run.path / name, text)
            tests = found.tests_frame().to_dict("records")
            content = {
                "fits": found.frame().to_dict("records"),
                "tests": tests,
                "contradictions": [asdict(one) for one in found.contradictions],
                "notes": [*(one.sentence for one in found.contradictions), *found.notes],
            }
            save_json(run.path / "comparison.json", content)
            run.finish(
                {
                    "best_aic": found.fits[0].label,
                    "fits": len(runs),
                    "tests": len(tests),
                    "contradictions": len(found.contradictions),
                }
            )
    log.info("%s\nWritten: %s (comparison.txt, comparison.csv, comparison.json)", found.text(), made.path)


def _find_runs(reference: str, root: Path) -> FinishedRun:
    below = root / "fit_population" / reference
    path = below if not Path(reference).exists() and below.exists() else Path(reference)
    return load_run(path, stage="fit_population")


def _read(run: FinishedRun, *, by_source: bool) -> ComparedFit:
    estimates = stored_estimates(run)
    simulator = estimates.simulator
    if by_source and simulator is not None:
        source = (run.manifest.get("sources") or {}).get("simulator")
        simulator = {"config": simulator, "source": source}
    inputs = run.manifest["inputs"]
    networks = {name: value["sha256"] for name, value in inputs.items() if name.startswith("posterior")}
    return ComparedFit(
        run.path.name,
        estimates,
        data=run.input("data"),
        posterior=sha256_of_plain(networks),
        simulator="" if simulator is None else str(simulator),
    )

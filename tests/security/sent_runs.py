"""Small finished runs of the first three stages, made once a session, and what a recipient does with each."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from nlme_sbi.networks.posterior import AmortizedPosterior
from nlme_sbi.report.inputs.reported_fit import read_individuals
from nlme_sbi.report.sections.provenance import origins
from nlme_sbi.runs import load_run
from nlme_sbi.simulation.stored import StoredSimulations
from nlme_sbi.stages.compare_fits import _read
from nlme_sbi.stages.shared.stored_fit import load_fit, stored_estimates

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))
from tiny_runs import SIMULATED, TRAINED

EXPERIMENT = "theophylline"
STAGES = ("simulate", "train_flow", "fit_population")
# For `made_once` and `run_commands`.
SENT = (
    SIMULATED,
    TRAINED,
    ("fit_population", "theophylline", "individuals.modes=false", "individuals.draws=20", "estimator=prior_ratio"),
)


def run_of(root: Path, stage: str) -> Path:
    """The one run of a stage."""
    (path,) = (root / stage).iterdir()
    return path


def copy_of(root: Path, folder: Path) -> Path:
    """The three runs, to be changed."""
    return Path(shutil.copytree(root, folder, symlinks=True))


def use(stage: str, path: Path) -> None:
    """Everything that later stages read of a run, as they read it."""
    run = load_run(path, stage=stage)
    _ = run.sha256
    if stage == "simulate":
        stored = StoredSimulations.open(run)
        stored.rows(stored.good[:5])
    elif stage == "train_flow":
        AmortizedPosterior.load(run, device="cpu")
    else:
        load_fit(run, device="cpu")
        stored_estimates(run).table().text()
        read_individuals(run)
        _read(run, by_source=False)
        origins(run)


USES: dict[str, Callable[[Path], None]] = {stage: (lambda path, stage=stage: use(stage, path)) for stage in STAGES}
__all__ = ["EXPERIMENT", "SENT", "STAGES", "USES", "copy_of", "run_of", "use"]

"""The three stages on settings that take fractions of a second, as a user's overrides would give them."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig

from nlme_sbi.cli import compose_config
from nlme_sbi.runs import FinishedRun, load_run, save_json, sha256_of_file
from nlme_sbi.runs.directory import sealed

ROOT = Path(__file__).resolve().parents[2]
THEOPHYLLINE = ROOT / "data" / "theophylline" / "theophylline.csv"

SIMULATION = ["simulation.n=200", "simulation.shard_size=80", "simulation.workers=1"]
TRAINING = [
    "training.steps=20",
    "training.batch_size=32",
    "training.warmup_steps=2",
    "training.validation_size=40",
    "training.validate_every=5",
    "training.pilot_size=100",
    "flow.couplings=2",
    "flow.hidden=8",
    "summary.hidden=8",
    "summary.width=8",
    "summary.layers=1",
]
FIT = ["fit.starts=1", "figures.individuals=2"]
ESTIMATORS = {"mrna_two_rate": "prior_ratio", "theophylline": "exact"}
EXPERIMENTS = {
    "mrna_two_rate": [],
    "theophylline": [f"data.path={THEOPHYLLINE}"],
}
SUMMARIES = {"mrna_two_rate": [], "theophylline": ["summary.row_hidden=8", "summary.row_width=4", "summary.nodes=6"]}


def tiny(stage: str, experiment: str, root: Path, *overrides: str) -> DictConfig:
    """The configuration of a tiny run; ``overrides`` come last."""
    own = {
        "simulate": SIMULATION,
        "train_flow": [*TRAINING, *SUMMARIES[experiment]],
        "fit_population": FIT,
    }[stage]
    if stage == "fit_population":
        own = [*own, f"estimator={ESTIMATORS[experiment]}", "estimator.draws=200", "estimator.max_draws=200"]
    chosen = [f"experiment={experiment}", f"output_root={root}", "device=cpu", *own, *EXPERIMENTS[experiment]]
    return compose_config(stage, [*chosen, *overrides])


def only_run(root: Path, stage: str) -> FinishedRun:
    """The one run of a stage, checked by its hashes."""
    (path,) = (root / stage).iterdir()
    return load_run(path, stage=stage)


def bytes_of(run: FinishedRun) -> dict[str, str]:
    """The hash of every result, as the manifest's table has it."""
    return {name: output["sha256"] for name, output in run.manifest["outputs"].items()}


def forge(run: FinishedRun, **config: object) -> None:
    """Change a run's configuration and files as an attacker would: with a manifest that seals them again."""
    manifest = json.loads((run.path / "manifest.json").read_text())
    for place, value in config.items():
        section, _, key = place.partition("__")
        manifest["config"][section][key] = value
    for name, output in manifest["outputs"].items():
        path = run.path / name
        output.update(sha256=sha256_of_file(path), bytes=path.stat().st_size)
    save_json(run.path / "manifest.json", sealed(manifest))

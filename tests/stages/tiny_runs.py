"""All stages on settings that take fractions of a second, as a user's overrides would give them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.figure import Figure
from omegaconf import DictConfig

from nlme_sbi.cli import compose_config
from nlme_sbi.runs import FinishedRun, load_run, save_json, sha256_of_file
from nlme_sbi.runs.directory import seal

ROOT = Path(__file__).resolve().parents[2]
THEOPHYLLINE = ROOT / "data" / "theophylline" / "theophylline.csv"
# In an order in which each finds what it needs.
STAGES = (
    *("simulate", "train_flow", "fit_population", "sample_theta"),
    *("predict", "diagnose", "check_fit", "report", "compare_fits"),
)

# What several modules begin with, for `made_once`.
SIMULATED = ("simulate", "theophylline")
TRAINED = ("train_flow", "theophylline")
TRAINED_ONLINE = ("train_flow", "theophylline", "simulations=online")
FITTED = ("fit_population", "theophylline", "individuals.draws=400")
# Networks that have learned a little, for fits that rest on them.
_BETTER = (
    "simulations=online",
    "training.steps=60",
    "training.validate_every=30",
    "flow.hidden=16",
    "summary.hidden=32",
)
CELLS_LEARNED = ("train_flow", "mrna_two_rate", *_BETTER)
THEOPHYLLINE_LEARNED = ("train_flow", "theophylline", *_BETTER)

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
FIT = ["fit.starts=1", "figures.individuals=2", "predictions.simulations=240"]  # 20 for each of 11 measurements
AFTER_THE_FIT = {
    "sample_theta": [
        *("sampler.ensembles=2", "sampler.walkers=14", "sampler.warmup=10"),
        *("sampler.steps=50", "sampler.ess=10000", "sampler.effective=40"),
    ],
    "predict": ["predict.draws=50", "figures.individuals=2"],
    "diagnose": [
        *("fit=latest", "diagnose.simulations=50", "diagnose.draws=40"),
        *("diagnose.local=0", "diagnose.exact=0", "diagnose.chains=0"),
    ],
    "check_fit": ["check_fit.replicates=20", "check_fit.each=1"],
    "report": ["check_fit.replicates=20", "check_fit.each=1"],
    "compare_fits": [],
}
ESTIMATORS = {"mrna_two_rate": "prior_ratio", "theophylline": "exact"}
DATA = {"mrna_two_rate": [], "theophylline": [f"data.path={THEOPHYLLINE}"]}
SUMMARIES = {"mrna_two_rate": [], "theophylline": ["summary.row_hidden=8", "summary.row_width=4", "summary.nodes=6"]}


def overrides(stage: str, experiment: str, root: Path) -> list[str]:
    """What is typed for a tiny run of a stage below ``root``; compare_fits takes the first two fits that are there."""
    if stage == "compare_fits":
        fits = [path.parent.name for path in sorted((root / "fit_population").glob("*/manifest.json"))]
        return [f"fits=[{','.join(fits[:2])}]", f"output_root={root}"]
    own = {
        "simulate": SIMULATION,
        "train_flow": [*TRAINING, *SUMMARIES[experiment]],
        "fit_population": [
            *FIT,
            f"estimator={ESTIMATORS[experiment]}",
            "estimator.draws=200",
            "estimator.max_draws=200",
        ],
    }
    common = [f"experiment={experiment}", f"output_root={root}", "device=cpu"]
    if stage in AFTER_THE_FIT:
        return [*common, *AFTER_THE_FIT[stage]]
    return [*common, *own[stage], *DATA[experiment]]


def tiny(stage: str, experiment: str, root: Path, *more: str) -> DictConfig:
    """The configuration of a tiny run; ``more`` overrides come last."""
    return compose_config(stage, [*overrides(stage, experiment, root), *more])


def function_of(stage: str) -> Callable[[DictConfig], object]:
    """The stage; imported when it is asked for, because some bring all figures with them."""
    function: Callable[[DictConfig], object] = getattr(import_module(f"nlme_sbi.stages.{stage}"), stage)
    return function


@contextlib.contextmanager
def shared_folder(base: Path, name: str) -> Iterator[Path]:
    """A folder that all workers of a session share; inside the ``with`` one has it for itself, to fill it once.

    ``base`` is what ``tmp_path_factory.getbasetemp()`` gives, which is each worker's own.
    """
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def made_once(temporary: pytest.TempPathFactory, *commands: tuple[str, ...]) -> Path:
    """An output root in which these have run one after another, without the figures of fits; not to be written to.

    Whichever test of a session asks first makes it, for all workers; what two of them begin with is made once, too.

    Args:
        commands: stage, experiment and overrides of each.
    """
    name = "tiny-" + hashlib.sha256(repr(commands).encode()).hexdigest()[:12]
    with shared_folder(temporary.getbasetemp(), name) as folder:
        root = folder / "outputs"
        if not (folder / "made").exists():
            shutil.rmtree(root, ignore_errors=True)
            if len(commands) > 1:
                shutil.copytree(made_once(temporary, *commands[:-1]), root)
            run_commands(root, commands[-1])
            (folder / "made").touch()
    return root


def bare_figure(*_: object, **__: object) -> Figure:
    """Stands for a figure where it matters that there is one, not what it shows: drawing takes longer than a stage."""
    return Figure()


def draw_bare(patched: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Put bare figures in the places of all that a module draws."""
    for name in [name for name in vars(module) if name.startswith("plot_")]:
        patched.setattr(module, name, bare_figure)


def run_commands(root: Path, *commands: tuple[str, ...]) -> None:
    """Run stages below ``root``: stage, experiment and overrides of each. Fits leave out their figures, which take ten
    times as long as they do; those of training are bare."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("nlme_sbi.stages.fit_population.save_figures", lambda *_, **__: None)
        draw_bare(patched, import_module("nlme_sbi.stages.train_flow"))
        for stage, experiment, *more in commands:
            function_of(stage)(tiny(stage, experiment, root, *more))


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
    save_json(run.path / "manifest.json", seal(manifest))

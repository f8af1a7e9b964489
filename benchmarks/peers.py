"""sbi and BayesFlow against nlme_sbi on the two-rate model: the same CPU seconds, the same test pairs, in one run.

Every training is a process of its own with one thread, one after the other, seed by seed. What a contender is, is in
`CONTENDERS`; how it was chosen, in docs/peers.md. The peers are no dependencies of nlme_sbi and live in an environment
of their own, with nlme_sbi in it:

    python3 -m venv PEERS && PEERS/bin/pip install -e . -r benchmarks/peers-requirements.txt -c constraints.txt
    python benchmarks/peers.py --python PEERS/bin/python [--cpu-seconds 240] [--seeds 0 1 2] [--resume]

Each training's figures are kept in --keep as soon as it ends; --resume takes those made with the same settings
and versions of the packages; whether nlme_sbi's own code has changed since is for you to know.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from record import ROOT, write_result

Settings = Mapping[str, object]
Figures = dict[str, tuple[float | str, str]]

CONTENDERS: dict[str, Settings] = {
    "nlme_sbi, affine": {"package": "nlme_sbi", "flow": "affine_coupling"},
    "BayesFlow, affine": {
        "package": "bayesflow",
        "backend": "jax",
        "flow_options": {"transform": "affine", "depth": 6, "subnet_kwargs": {"dropout": 0.0}},
        "summary": "perceptron",
        "summary_options": {"summary_dim": 32, "widths": [256, 256], "dropout": 0.0},
        "batch_size": 256,
        "learning_rate": 2e-3,
    },
    "sbi, MAF": {
        "package": "sbi",
        "model": "maf",
        "embedding": "fc",
        "embedding_options": {"num_layers": 3, "num_hiddens": 256, "output_dim": 64},
        "z_score_x": "structured",
        "pairs": 300_000,
        "batch_size": 256,
        "learning_rate": 1e-3,
        "validation_fraction": 0.05,
    },
    "nlme_sbi, spline": {"package": "nlme_sbi", "flow": "spline_coupling"},
    "sbi, NSF": {
        "package": "sbi",
        "model": "nsf",
        "embedding": "fc",
        "embedding_options": {"num_layers": 3, "num_hiddens": 256, "output_dim": 64},
        "z_score_x": "structured",
        "pairs": 300_000,
        "batch_size": 256,
        "learning_rate": 1e-3,
        "validation_fraction": 0.05,
    },
}
# What must be importable, and whose versions are told.
MODULES = {
    "nlme_sbi": ("torch", "nflows", "hydra"),
    "sbi": ("sbi", "torch", "nflows", "hydra"),
    "bayesflow": ("bayesflow", "keras", "jax", "torch", "hydra"),
}
VERSIONS = ("sbi", "bayesflow", "keras", "jax", "torch", "numpy")
METRICS = {
    "nlp": ("mean", "nats"),
    "nlp_test_se": ("se", "nats, over test pairs"),
    "median": ("median", "nats, median over test pairs"),
    "steps": ("steps", "steps"),
    "set_up_cpu_seconds": ("set_up_cpu_seconds", "CPU s before the first step, not in the budget"),
    "draws_per_s": ("draws_per_s", "draws per CPU s"),
    "draws_with_densities_per_s": ("draws_with_densities_per_s", "draws per CPU s, with log densities"),
    "training_peak": ("training_peak_mebibytes", "MiB, peak of the process"),
    "sampling_peak": ("sampling_peak_mebibytes", "MiB, peak of the process"),
    "calibration": ("calibration_cpu_seconds", "CPU s, the machine's speed just before each training"),
    "log_normalisation": ("log_normalisation", "log of the densities' integral, should be 0"),
}


def missing_modules(python: str, packages: Iterable[str]) -> list[str]:
    """What an interpreter cannot import of what the packages need."""
    wanted = sorted({module for package in packages for module in MODULES[package]})
    code = "import importlib.util, sys; print(*[n for n in sys.argv[1:] if importlib.util.find_spec(n) is None])"
    done = subprocess.run([python, "-c", code, *wanted], check=True, capture_output=True, text=True)
    return done.stdout.split()


def refuse_incomplete(python: str, packages: Iterable[str]) -> None:
    """End with a sentence where the environment lacks packages."""
    try:
        missing = missing_modules(python, packages)
    except (OSError, subprocess.CalledProcessError) as problem:
        raise SystemExit(f"--python {python} is no Python interpreter that runs: {problem}") from problem
    if missing:
        raise SystemExit(
            f"{python} lacks {', '.join(missing)}, which this comparison needs. Make an environment for it (python3 -m "
            "venv PEERS && PEERS/bin/pip install -e . -r benchmarks/peers-requirements.txt -c constraints.txt) and "
            "pass --python PEERS/bin/python, or choose --contenders without them."
        )


def versions(python: str) -> str:
    code = (
        "import sys; from importlib.metadata import version as v; print(', '.join(f'{n} {v(n)}' for n in sys.argv[1:]))"
    )
    done = subprocess.run([python, "-c", code, *VERSIONS], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def run_child(python: str, folder: Path, work: str, *arguments: str, backend: str = "jax") -> str:
    """Run ``peer_trainings.py`` on one thread in the folder; the last line that it prints."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "KERAS_BACKEND": backend,
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "JAX_PLATFORMS": "cpu",
    }
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"), "1")
    script = str(Path(__file__).resolve().parent / "peer_trainings.py")
    command = [python, script, work, str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout.splitlines()[-1] if done.stdout else ""


def prepare(python: str, folder: Path, seeds: Sequence[int], pairs: int) -> None:
    """Simulate what is stored, once."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        done = folder / f"stored-{seed}-{pairs}.done"
        if not done.exists():
            run_child(python, folder, "prepare", "--seed", str(seed), "--pairs", str(pairs))
            done.touch()


def kept_result(path: Path, asked: Mapping[str, object]) -> dict[str, float] | None:
    """The figures of an earlier training where all that decides them is the same; else None."""
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    return content["found"] if content["asked"] == asked else None


def one_result(
    python: str,
    folder: Path,
    settings: Settings,
    seed: int,
    cpu_seconds: float,
    *,
    asked: dict[str, object],
    path: Path,
) -> dict[str, float]:
    """Train in a process of its own and keep the figures at once."""
    arguments = (json.dumps(settings), "--seed", str(seed), "--cpu-seconds", str(cpu_seconds))
    line = run_child(python, folder, "train", *arguments, backend=str(settings.get("backend", "jax")))
    found = json.loads(line)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"asked": asked, "found": found}, indent=2) + "\n")
    partial.rename(path)
    return found


def figures_of(name: str, settings: Settings, results: Sequence[Mapping[str, float]]) -> Figures:
    """The figures of one contender over its seeds: means; peaks and CPU seconds are the largest."""
    figures: Figures = {}
    for figure, (key, unit) in METRICS.items():
        values = [result[key] for result in results]
        figures[f"{figure}[{name}]"] = (max(values) if "peak" in figure else statistics.fmean(values), unit)
    if len(results) > 1:
        spread = statistics.stdev(result["mean"] for result in results) / len(results) ** 0.5
        figures[f"nlp_seed_se[{name}]"] = (spread, "nats, over training seeds")
    figures[f"cpu_seconds[{name}]"] = (max(result["cpu_seconds"] for result in results), "CPU s, longest training")
    figures[f"settings.{name}"] = (json.dumps(settings), "")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--cpu-seconds", type=float, default=240.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--keep", type=Path, default=ROOT / "outputs" / "peers")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    chosen = {name: CONTENDERS[name] for name in options.contenders}
    refuse_incomplete(options.python, {str(settings["package"]) for settings in chosen.values()})
    folder = options.keep.resolve()
    pairs = max((int(str(settings.get("pairs", 0))) for settings in chosen.values()), default=0) or 10_000
    told = versions(options.python)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    prepare(options.python, folder, options.seeds, pairs)
    for seed in options.seeds:
        for name, settings in chosen.items():
            asked = {"settings": settings, "seed": seed, "cpu_seconds": options.cpu_seconds, "versions": told}
            path = folder / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}.json"
            found = kept_result(path, asked) if options.resume else None
            found = found or one_result(
                options.python, folder, settings, seed, options.cpu_seconds, asked=asked, path=path
            )
            print(f"{name}, seed {seed}: {found['mean']:.3f} nats, {found['steps']:.0f} steps", flush=True)
            results[name].append(found)
    figures: Figures = {"versions": (told, "")}
    for name, settings in chosen.items():
        figures |= figures_of(name, settings, results[name])
    title = f"Two-rate model, {options.cpu_seconds:g} CPU seconds a training, {len(options.seeds)} training seed(s)."
    write_result("peers", figures, title=title)


if __name__ == "__main__":
    main()

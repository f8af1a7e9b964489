"""Which faults of a network the diagnosis finds: shares of 20 seeds in which each check accuses each of four networks.

Networks of the two-rate model: `trained` (flow=spline_coupling, ten CPU-minutes of fresh simulations), `undertrained`
(300 steps), and the trained one with draws contracted to SD/1.5 about their mean (`contracted`) or shifted by 0.5 SD
(`shifted`), log densities transformed with them. Every seed simulates and draws anew; 1000 individuals x 300 draws, the
exact posterior on 100 of them, error rate 5%, tolerance 0.1, as scripts/diagnose.py has them. A check accuses where its
light is not green; `any_test` is stricter: any test of uniform ranks rejected, whether the difference matters or not.

    python benchmarks/diagnostics_power.py [--weights FILE.safetensors] [--seeds 20] [--keep FOLDER]

``--weights`` takes a training of two_rate_training.py --keep; ``--keep`` stores every seed there and takes up what is
there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from record import write_result
from two_rate_training import NETWORKS, configuration, fresh, trained

from nlme_sbi.compute.random_streams import seeded
from nlme_sbi.diagnostics.network.agreement_findings import agreement_finding
from nlme_sbi.diagnostics.network.agreement_with_exact import agreement
from nlme_sbi.diagnostics.network.calibration import calibration
from nlme_sbi.diagnostics.network.calibration_findings import calibration_findings
from nlme_sbi.diagnostics.network.simulated_posteriors import PosteriorPairs, observations_of, posterior_pairs
from nlme_sbi.networks.posterior import AmortizedPosterior
from nlme_sbi.networks.stored_weights import load_weights
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.simulation.shards import simulate_batch
from nlme_sbi.training.loop import train
from nlme_sbi.training.pairs import OnlinePairs
from nlme_sbi.types import Observations

INDIVIDUALS, DRAWS, EXACT = 1000, 300, 100
ERROR_RATE, TOLERANCE = 0.05, 0.1
CONTRACTION, SHIFT = 1.5, 0.5
CASES = ("trained", "undertrained", "contracted", "shifted")
CHECKS = ("width", "bias", "ranks", "coverage", "tarp", "agreement")


def networks(weights: Path | None, cpu_minutes: float) -> dict[str, AmortizedPosterior]:
    parts = configuration(NETWORKS["best"])
    source = OnlinePairs(parts["prior"], parts["design"], parts["simulator"], 512, 0, torch.device("cpu"))
    if weights is None:
        good, parts, _ = trained(NETWORKS["best"], 0, cpu_minutes)
    else:
        good = fresh(parts, source, 0)
        load_weights(good, weights)
    poor = fresh(parts, source, 0)
    train(poor, source, replace(parts["training"], steps=300, validate_every=300), progress=False)
    rest = (parts["simulator"], parts["prior"], parts["design"])
    return {"trained": AmortizedPosterior(good.eval(), *rest), "undertrained": AmortizedPosterior(poor.eval(), *rest)}


def transformed(
    pairs: PosteriorPairs, posterior: AmortizedPosterior, observations: Observations, case: str
) -> PosteriorPairs:
    """The posterior of phi' = middle + (phi - middle) / c + shift, exactly, with densities."""
    middle, spread = pairs.draws.mean(1, keepdim=True), pairs.draws.std(1, keepdim=True)
    factor, shift = (CONTRACTION, 0.0) if case == "contracted" else (1.0, SHIFT)
    moved = middle + (pairs.draws - middle) / factor + shift * spread
    back = middle + factor * (pairs.truth[:, None] - shift * spread - middle)
    log_volume = pairs.draws.shape[2] * math.log(factor)
    return replace(
        pairs,
        draws=moved,
        log_q=pairs.log_q + log_volume,
        log_q_of_truth=posterior.log_prob(back, observations)[:, 0] + log_volume,
    )


def accused(pairs: PosteriorPairs, posterior: AmortizedPosterior, observations: Observations, seed: int) -> dict:
    """Light of each check, and whether any test rejected."""
    found = calibration(pairs, seeded("cpu", seed, 2), error_rate=ERROR_RATE)
    findings = calibration_findings(found, tolerance=TOLERANCE, where="prior")
    some = slice(0, EXACT)
    drawn = PosteriorSamples(pairs.names, pairs.draws[some], pairs.log_q[some], posterior.prior)
    near = agreement(
        posterior.simulator,
        observations[some],
        drawn,
        truth=pairs.truth[some],
        generator=seeded("cpu", seed, 3),
    )
    findings.append(agreement_finding(near, error_rate=ERROR_RATE, where="prior"))
    lights = {check: finding.light for check, finding in zip(CHECKS, findings, strict=True)}
    return {
        **lights,
        "rejected": bool((found.adjusted < ERROR_RATE).any()),
        "dispersion": findings[0].numbers["dispersion"],
        "bias_found": findings[1].numbers["worst_bias"],
        "share": findings[-1].numbers["median_share"],
    }


def one_seed(made: dict[str, AmortizedPosterior], seed: int) -> dict[str, dict]:
    found = {}
    for name, posterior in made.items():
        simulated = simulate_batch(
            posterior.prior, posterior.designs, posterior.simulator, INDIVIDUALS, seeded("cpu", seed, 0)
        )
        observations = observations_of(simulated, posterior.simulator)
        pairs = posterior_pairs(posterior, observations, simulated.phi, draws=DRAWS, generator=seeded("cpu", seed, 1))
        cases = {name: pairs}
        if name == "trained":
            cases |= {case: transformed(pairs, posterior, observations, case) for case in ("contracted", "shifted")}
        found |= {case: accused(given, posterior, observations, seed) for case, given in cases.items()}
    return found


def shares(seeds: list[dict[str, dict]]) -> dict[str, tuple[float, str]]:
    """One figure for each check and case, and the numbers behind them."""
    figures: dict[str, tuple[float, str]] = {}
    for case in CASES:
        rows = [seed[case] for seed in seeds]
        accusing = {check: [row[check] in ("amber", "red") for row in rows] for check in CHECKS}
        told = {check: (flags, f"share of {len(rows)} seeds, not green") for check, flags in accusing.items()}
        every = [any(flags) for flags in zip(*accusing.values(), strict=True)]
        told["any_check"] = (every, f"share of {len(rows)} seeds, any check not green")
        told["any_test"] = ([row["rejected"] for row in rows], f"share of {len(rows)} seeds, any test rejects")
        told["dispersion"] = ([row["dispersion"] for row in rows], "spread of truths over that of posteriors, mean")
        told["largest_bias"] = ([abs(row["bias_found"]) for row in rows], "posterior SDs, mean over seeds")
        told["median_share"] = ([row["share"] for row in rows], "effective share of draws, mean over seeds")
        for name, (values, unit) in told.items():
            figures[f"{name}[{case}]"] = (sum(map(float, values)) / len(rows), unit)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--cpu-minutes", type=float, default=10.0, help="of the training, without --weights")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--show", action="store_true", help="print, and leave the results file alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = []
    stored = [options.keep / f"{seed}.json" if options.keep else None for seed in range(options.seeds)]
    missing = [path for path in stored if path is None or not path.exists()]
    made = networks(options.weights, options.cpu_minutes) if missing else {}
    for seed, path in enumerate(stored):
        if path is not None and path.exists():
            seeds.append(json.loads(path.read_text()))
            continue
        seeds.append(one_seed(made, seed))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(seeds[-1]))
        print(seed, seeds[-1], flush=True)
    figures = shares(seeds)
    if options.show:
        print({name: round(value, 3) for name, (value, _) in figures.items()})
        return
    title = f"Checks that accuse a network, {INDIVIDUALS} individuals x {DRAWS} draws, error rate {ERROR_RATE:g}."
    write_result("diagnostics_power", figures, title=title)


if __name__ == "__main__":
    main()

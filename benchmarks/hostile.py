"""Attacks on everything that is read: targets, manifests, descriptions, arrays, bombs; nothing may run, write or ask.

    python benchmarks/hostile.py [--targets 2000] [--changes 400] [--seed 1]

The attacks are those of ``tests/security``, more of them and from another seed. Code that ran, files that were written
and requests that were made are counted by Python's own audit events; a traceback is whatever is neither a sentence
(``ValueError``, ``OSError``) nor a result.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from record import ROOT, write_result

sys.path.insert(0, str(ROOT / "tests" / "security"))
from attacks import (
    ARGUMENTS,
    alias_bomb,
    claimed_array,
    gzip_bomb,
    modules_of_ours,
    mutated,
    odd_array,
    outcome,
    sealed_again,
    section,
    targets,
    watched,
    wide_claim,
    workbook_bomb,
    write_sealed,
)
from sent_runs import SENT, STAGES, USES, copy_of, run_of
from tiny_runs import run_commands

from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.config.targets import STORED_ROLES
from nlme_sbi.io import LongTable, WideSheet
from nlme_sbi.runs import load_array, open_run


class Tally:
    """What happened in all attacks together."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def attack(self, kind: str, attempt: Callable[[], object], what: str) -> None:
        """Count one attack."""
        with watched() as seen:
            found = outcome(attempt)
        self.counts[kind] += 1
        self.counts[f"{kind}_{found.kind}"] += 1
        for name, events in (("code_ran", seen.code), ("files_written", seen.files), ("requests_made", seen.requests)):
            self.counts[name] += bool(events)
            if events:
                print(name, kind, what, events[:2], flush=True)
        if found.kind == "bug":
            print("traceback", kind, what, found.words, flush=True)
            self.counts["tracebacks"] += 1


def attack_targets(tally: Tally, count: int, seed: int, folder: Path) -> None:
    """Sections that name everything that can be imported."""
    for name in modules_of_ours():
        importlib.import_module(name)
    chosen = random.Random(seed)
    for target in targets(count, seed):
        node = section(target, chosen.choice(ARGUMENTS), folder)
        tally.attack("targets", lambda node=node: instantiate(node, roles=STORED_ROLES), target)


def attack_runs(tally: Tally, count: int, seed: int, root: Path) -> None:
    """Runs whose manifest, descriptions or arrays were changed and sealed again, as often each."""
    chosen = random.Random(seed)
    for number in range(count):
        stage = STAGES[number % len(STAGES)]
        path = run_of(root, stage)
        manifest = (path / "manifest.json").read_text()
        write_sealed(path, mutated(json.loads(manifest), chosen))
        tally.attack("manifests", lambda path=path, stage=stage: USES[stage](path), f"{stage}, change {number}")
        (path / "manifest.json").write_text(manifest)
        for kind, ending in (("descriptions", "*.json"), ("arrays", "*.npy")):
            files = sorted(file for file in path.rglob(ending) if file.name not in ("manifest.json", "clock.json"))
            if not files:
                continue
            file = chosen.choice(files)
            kept = file.read_bytes()
            if kind == "arrays":
                np.save(file, odd_array(chosen, np.array(load_array(file))))
            else:
                try:
                    file.write_text(json.dumps(mutated(json.loads(kept), chosen)))
                except RecursionError:
                    file.write_text("[" * 4000 + "]" * 4000)
            sealed_again(path)
            tally.attack(kind, lambda path=path, stage=stage: USES[stage](path), f"{stage}, {file.name}, {number}")
            file.write_bytes(kept)
            (path / "manifest.json").write_text(manifest)


def attack_readers(tally: Tally, folder: Path, root: Path) -> float:
    """Bombs and claims; the memory in MiB that they took beyond what was there."""
    gzip_bomb(folder / "bomb.csv.gz", 1000)
    workbook_bomb(folder / "bomb.xlsx", 1000)
    wide_claim(folder / "claim.xlsx")
    command = {"stage": "simulate", "experiment": "pk", "config": {"seed": 3}, "inputs": {}, "root": folder / "outputs"}
    run = open_run(**command)
    run.close()
    (run.path / "config.yaml").write_text(alias_bomb())
    array = run_of(root, "fit_population") / "individual_draws.npy"
    claimed_array(array, "(100000000000, 8)")
    sealed_again(array.parent)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with watched():  # what is written here is ours: a lock
        found = [
            outcome(LongTable(folder / "bomb.csv.gz").read),
            outcome(WideSheet(folder / "bomb.xlsx").read),
            outcome(WideSheet(folder / "claim.xlsx").read),
            outcome(lambda: open_run(**command)),
            outcome(lambda: USES["fit_population"](array.parent)),
        ]
    tally.counts["bombs"] += len(found)
    tally.counts["tracebacks"] += sum(one.kind == "bug" for one in found)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=2000)
    parser.add_argument("--changes", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    tally = Tally()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_commands(folder / "made", *SENT)
        root = copy_of(folder / "made", folder / "sent")
        attack_targets(tally, given.targets, given.seed, folder)
        attack_runs(tally, given.changes, given.seed, root)
        memory = attack_readers(tally, folder, root)
    counts = tally.counts
    write_result(
        "hostile",
        {
            "targets": (counts["targets"], "sections that name what can be imported"),
            "targets_refused": (counts["targets_refused"], "of these, the others being parts of a run"),
            "manifests": (counts["manifests"], "manifests changed at a random place and sealed again"),
            "descriptions": (counts["descriptions"], "other JSON files changed at a random place"),
            "arrays": (counts["arrays"], "arrays of other types, shapes and numbers"),
            "runs_refused": (
                counts["manifests_refused"] + counts["descriptions_refused"] + counts["arrays_refused"],
                "changed runs, the others having changed nothing that matters",
            ),
            "bombs": (counts["bombs"], "of 1000-fold packing, aliases and claimed sizes"),
            "bomb_mebibytes": (memory, "MiB that the bombs took"),
            "code_ran": (counts["code_ran"], "attacks"),
            "files_written": (counts["files_written"], "attacks"),
            "requests_made": (counts["requests_made"], "attacks"),
            "tracebacks": (counts["tracebacks"], "attacks"),
        },
        title="Attacks on everything that is read from disk: what ran, was written, was asked, ended in a traceback.",
    )


if __name__ == "__main__":
    main()

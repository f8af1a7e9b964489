"""Where a fit came from: every run behind it with hashes, seeds, versions and commit, and the commands to repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nlme_sbi.diagnostics.findings import Finding, Light
from nlme_sbi.report.inputs.commands import command_of
from nlme_sbi.report.page.content import Block, Cell, Section, Table, Words
from nlme_sbi.runs import FinishedRun, load_run

_STAGES_OF = {
    "posterior": ("train_flow",),
    "simulations": ("simulate",),
    "fit": ("fit_population", "train_hierarchical"),
    "diagnosis": ("diagnose",),
    "checks": ("check_fit",),
}


@dataclass(frozen=True, eq=False)
class Origin:
    """A run behind the report, and the runs that it was made from by the key that names them in its command."""

    run: FinishedRun
    inputs: Mapping[str, str]


def origins(run: FinishedRun, *, after: tuple[str, ...] = ()) -> tuple[list[Origin], list[str]]:
    """The run and everything that it was made from, first things first; and what is missing, in words.

    ``after`` holds the hashes of what was made from it: a manifest that names one of those, or itself, is not followed.
    """
    found: list[Origin] = []
    lost: list[str] = []
    named: dict[str, list[str]] = {}
    for name, entry in run.manifest["inputs"].items():
        key = name.split("_")[0]  # posterior_0, posterior_1 of an ensemble
        if key not in _STAGES_OF:
            continue
        circle = entry["sha256"] in (*after, run.sha256)
        upstream = None if circle else _locate(run, entry, _STAGES_OF[key])
        if upstream is None:
            where = entry.get("path") or f"hash {entry['sha256'][:12]}"
            lost.append(f"the run of {' or '.join(_STAGES_OF[key])} that {run.path.name} was made from ({where})")
            continue
        earlier, missing = origins(upstream, after=(*after, run.sha256))
        found += [one for one in earlier if all(one.run.sha256 != other.run.sha256 for other in found)]
        lost += missing
        named.setdefault(key, []).append(upstream.path.name)
    inputs = {key: names[0] if len(names) == 1 else f"[{','.join(names)}]" for key, names in named.items()}
    return [*found, Origin(run, inputs)], lost


def _locate(run: FinishedRun, entry: Mapping[str, Any], stages: tuple[str, ...]) -> FinishedRun | None:
    """By its hash: where it lay, else beside the run in the same output root."""
    for stage in stages:
        beside = run.path.parent.parent / stage
        places = [] if entry.get("path") is None else [Path(entry["path"])]
        places += sorted(beside.iterdir()) if beside.is_dir() else []
        for path in places:
            try:
                found = load_run(path, stage=stage, verify=False)
            except ValueError:
                continue
            if found.sha256 == entry["sha256"]:
                return found
    return None


def provenance_section(runs: Sequence[FinishedRun]) -> Section:
    """Of the fit, and where there is one the diagnosis."""
    chain: list[Origin] = []
    lost: list[str] = []
    for run in runs:
        found, missing = origins(run)
        chain += [one for one in found if all(one.run.sha256 != other.run.sha256 for other in chain)]
        lost += [word for word in missing if word not in lost]
    blocks: list[Block] = [_table(chain), *_commands(chain)]
    blocks += [
        Words(
            yaml.safe_dump(one.run.config, sort_keys=False, allow_unicode=True, width=100).rstrip(),
            code=True,
            folded=f"Configuration of {one.run.manifest['stage']}",
        )
        for one in chain
    ]
    return Section(
        "provenance",
        "Where this comes from",
        lead="Every number above follows from these runs. Equal hashes mean equal bytes.",
        findings=(_finding(chain, lost),),
        blocks=tuple(blocks),
    )


def _finding(chain: Sequence[Origin], lost: Sequence[str]) -> Finding:
    rule = (
        "Green: every run behind the report is there, and made from committed code; amber: some was made from code "
        "with uncommitted changes; grey: a run is not there any more, or was made outside git."
    )
    title = "Reproducibility"
    states = [one.run.manifest.get("git") for one in chain]
    dirty = [one.run.path.name for one, state in zip(chain, states, strict=True) if state and state.get("dirty")]
    light: Light = "green"
    sentence = f"All {len(chain)} runs behind this report are there, and made from committed code."
    if lost or not all(states):
        light = "grey"
        outside = [one.run.path.name for one, state in zip(chain, states, strict=True) if not state]
        parts = [f"Not found any more: {', '.join(lost)}."] if lost else []
        parts += [f"Made outside a git checkout: {', '.join(outside)}."] if outside else []
        sentence = " ".join(parts)
    if dirty:
        light = "amber"
        sentence = (
            f"Made from code with uncommitted changes: {', '.join(dirty)}; commit and run again before publishing."
        )
        sentence += f" Not found any more: {', '.join(lost)}." if lost else ""
    return Finding("provenance", title, light, sentence, rule, {"runs": len(chain), "missing": len(lost)})


def _table(chain: Sequence[Origin]) -> Table:
    """A column a run."""
    facts = [_run_facts(one.run) for one in chain]
    rows = tuple((Cell(name), *(Cell(column[name]) for column in facts)) for name in facts[0])
    headings = ("", *(str(one.run.manifest["stage"]) for one in chain))
    note = "Hashes are SHA-256, shortened; each run's manifest.json has them whole, with every file and every version."
    return Table("runs", "Runs behind this report", headings, rows, note=note)


def _run_facts(run: FinishedRun) -> dict[str, str]:
    manifest = run.manifest
    git, versions = manifest.get("git") or {}, manifest.get("versions") or {}
    machine = manifest.get("machine") or {}
    data = (manifest["inputs"].get("data") or {}).get("sha256")
    return {
        "run": run.path.name,
        "made (UTC)": str(manifest["created"])[:19].replace("T", " "),
        "took": f"{manifest['seconds']:.1f} s",
        "git commit": str(git["commit"])[:12] if git else "none",
        "uncommitted changes": ("yes" if git.get("dirty") else "no") if git else "unknown",
        "seeds": ", ".join(str(value) for value in (manifest.get("seeds") or {}).values()) or "–",
        "hash of the results": run.sha256[:16],
        "hash of the data": data[:16] if data else "–",
        "nlme_sbi": str(versions.get("nlme_sbi")),
        "Python": str(versions.get("python")),
        "torch": str(versions.get("torch")),
        "machine": str(machine.get("gpu") or machine.get("processor") or "–"),
    }


def _named_runs(one: Origin, chain: Sequence[Origin]) -> Mapping[str, str]:
    """The runs that a command names; a diagnosis of a fit's network and data names the fit, which brings both."""
    data = one.run.manifest["inputs"].get("data")
    if one.run.manifest["stage"] != "diagnose" or data is None:
        return one.inputs
    for other in chain:
        theirs = other.run.manifest["inputs"].get("data")
        if other.run.manifest["stage"] == "fit_population" and theirs and theirs["sha256"] == data["sha256"]:
            return {"fit": other.run.path.name}
    return one.inputs


def _commands(chain: Sequence[Origin]) -> list[Block]:
    lines, notes = [], []
    for one in chain:
        command = command_of(one.run, _named_runs(one, chain))
        lines.append(command.text)
        if command.note:
            notes.append(f"{one.run.manifest['stage']}: {command.note}")
    blocks: list[Block] = [Words("\n".join(lines), code=True, heading="Commands that make all of it again")]
    sentence = (
        "Runs are named by the hash of their configuration and inputs, so the same commands give the same names. "
        "The path of a data file is not part of a run (only its content is): add data.path=FILE where it is not the "
        "experiment's own."
    )
    return [*blocks, Words(" ".join([sentence, *notes]))]

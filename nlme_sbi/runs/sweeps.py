"""Sweeps (``-m``): what each job was asked for and which run it made, and one table of them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from nlme_sbi.runs.directory import MANIFEST, record_opened_runs
from nlme_sbi.runs.files import load_json, save_json
from nlme_sbi.runs.finished import load_run
from nlme_sbi.runs.schema import JOB


@contextmanager
def record_job(directory: Path, number: int, overrides: Sequence[str]) -> Iterator[None]:
    """Around a job of a sweep: write ``job_000.json`` with its overrides, its run and how it ended.

    Args:
        directory: the sweep's.
        number: the job's, from 0.
        overrides: ``KEY=VALUE`` as the sweep gives them to the job.
    """
    record: dict[str, Any] = {"overrides": list(overrides), "run": None, "ended": "interrupted"}
    with record_opened_runs() as runs:
        try:
            yield
            record["ended"] = "finished"
        except Exception as error:
            record["ended"] = f"failed: {error}"
            raise
        finally:
            if runs:
                record["run"] = str(runs[-1].absolute())
            save_json(directory / f"job_{number:03d}.json", record)


def find_sweep(reference: str, root: Path) -> Path:
    """The directory of a sweep: a path, or ``latest`` of those under ``root/multirun``.

    Raises ``ValueError`` where there is none.
    """
    if reference != "latest":
        path = Path(reference)
        if not list(path.glob("job_*.json")):
            raise ValueError(
                f"{path} is no directory of a sweep: it holds no job_*.json. Give one below {root}/multirun."
            )
        return path
    found = sorted({path.parent for path in root.glob("multirun/*/job_*.json")})
    if not found:
        raise ValueError(
            f"There is no sweep under {root / 'multirun'}; make one with -m, for example "
            "python scripts/train_flow.py -m flow.couplings=4,6"
        )
    return found[-1]


def sweep_table(directory: Path) -> pd.DataFrame:
    """One row a job: what was varied, the results from the run's manifest, seconds, how it ended, the run's directory.

    Raises:
        ValueError: for a run that was edited or damaged.
    """
    records = [load_json(path, JOB) for path in sorted(directory.glob("job_*.json"))]
    asked = [dict(_key_and_value(word) for word in record["overrides"]) for record in records]
    keys = list(dict.fromkeys(key for overrides in asked for key in overrides))
    varied = [key for key in keys if len({overrides.get(key) for overrides in asked}) > 1]
    rows = []
    for record, overrides in zip(records, asked, strict=True):
        row = {key: _number(overrides.get(key, "")) for key in varied}
        rows.append({**row, **_results(record), "ended": record["ended"], "run": record.get("run")})
    table = pd.DataFrame(rows)
    last = ["ended", "run"]
    return table[[*(name for name in table.columns if name not in last), *last]]


def _results(record: dict[str, Any]) -> dict[str, Any]:
    """Single numbers, words and truths of the manifest; nothing where the job did not finish its run."""
    if record.get("run") is None or not (Path(record["run"]) / MANIFEST).exists():
        return {}
    manifest = load_run(record["run"], verify=False).manifest
    single = {key: value for key, value in manifest["results"].items() if isinstance(value, (bool, int, float, str))}
    return {**single, "seconds": manifest["seconds"]}


def _key_and_value(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

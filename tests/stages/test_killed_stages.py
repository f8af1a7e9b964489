"""SIGKILL at random moments, again and again in every stage: the same command ends as an undisturbed run."""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nlme_sbi.runs import find_run

sys.path.insert(0, str(Path(__file__).parent))
from tiny_runs import STAGES, bytes_of

pytestmark = pytest.mark.slow

EXPERIMENT = "theophylline"
KEEPS_WHAT_IS_DONE = ("simulate", "train_flow")  # shards and checkpoints; the others keep nothing but whole files


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_killed_again_and_again_ends_with_the_bytes_of_an_undisturbed_run(
    run_stage: Callable[..., dict[str, Any]],
    inputs_of: Callable[..., Path],
    undisturbed: Path,
    stage: str,
    kills: int,
) -> None:
    whole = run_stage(stage, inputs_of(stage, "whole"))
    assert whole["code"] == 0, whole["refusal"]
    expected = bytes_of(find_run("latest", stage=stage, experiment=EXPERIMENT, root=undisturbed))
    moments = random.Random(STAGES.index(stage) + 100 * kills)
    longest = 0.6 if stage in KEEPS_WHAT_IS_DONE else 1.0
    killed, ended, root = 0, 0, inputs_of(stage, "0")
    while True:
        # A stage that keeps what it has done ends early after some kills, and then begins anew.
        seconds = moments.uniform(0, longest * whole["seconds"]) if killed < kills else 120
        found = run_stage(stage, root, seconds=seconds)
        if found["code"] == -signal.SIGKILL:
            killed += 1
            continue
        assert found["code"] == 0, found["refusal"]
        (path,) = (root / stage).iterdir()
        assert [name for name in path.rglob(".*") if name.name != ".lock"] == []
        assert bytes_of(find_run(path, stage=stage, experiment=EXPERIMENT, root=root)) == expected
        if killed == kills:
            return
        ended += 1
        root = inputs_of(stage, str(ended))

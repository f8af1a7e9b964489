"""The comparison with other packages: what can be checked without them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a script of benchmarks/."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def loaded(name: str) -> ModuleType:
        return importlib.import_module(name)

    return loaded


def test_a_budget_ends_when_its_seconds_are_spent_and_not_before(load) -> None:
    trainings = load("peer_trainings")
    now = 100.0
    budget = trainings.Budget(10.0, clock=lambda: now)
    now = 130.0
    budget.check()
    assert budget.share() == 0.0
    budget.begin()
    now = 139.9
    budget.begin()
    budget.check()
    assert budget.share() == pytest.approx(0.99)
    assert budget.set_up() == pytest.approx(30.0)
    now = 140.0
    with pytest.raises(trainings.OutOfTime):
        budget.check()
    now = 180.0
    assert budget.share() == 1.0
    assert budget.spent() == pytest.approx(50.0)
    with pytest.raises(ValueError, match="positive number of CPU seconds"):
        trainings.Budget(0.0)


def test_pairs_stop_with_the_budget_and_count_the_steps_before(load) -> None:
    trainings = load("peer_trainings")

    class Source:
        def batch(self, step: int) -> int:
            return step * step

    now = 0.0
    budget = trainings.Budget(1.0, clock=lambda: now)
    budget.begin()
    pairs = trainings.StoppingPairs(Source(), budget)
    assert [pairs.batch(step) for step in range(3)] == [0, 1, 4]
    now = 2.0
    with pytest.raises(trainings.OutOfTime):
        pairs.batch(3)
    assert pairs.steps == 3
    assert pairs.asked == [0.0, 0.0, 0.0]


def test_the_schedule_warms_up_from_a_tenth_and_ends_at_zero(load) -> None:
    rate = load("peer_trainings").scheduled_rate
    assert rate(0.0, 2.0) == pytest.approx(0.2)
    assert rate(0.025, 2.0) == pytest.approx(1.1)
    assert rate(0.05, 2.0) == pytest.approx(2.0)
    assert rate(0.525, 2.0) == pytest.approx(1.0)
    assert rate(1.0, 2.0) == pytest.approx(0.0)


def test_the_integral_of_a_density_is_one_and_a_forgotten_jacobian_shows(load) -> None:
    # Oracle: two Gaussians of known density, far apart, as posteriors with mirror modes are.
    log_normalisation = load("peer_trainings").log_normalisation
    generator = np.random.default_rng(5)
    sd = np.array([0.02, 3.0, 0.5])
    centre = np.where(generator.random(4_000)[:, None] < 0.5, -20.0, 20.0) * sd
    draws = centre + sd * generator.standard_normal((4_000, 3))
    white = np.stack([(draws + 20 * sd) / sd, (draws - 20 * sd) / sd])
    parts = -0.5 * np.square(white).sum(-1) - np.log(sd).sum() - 1.5 * np.log(2 * np.pi) + np.log(0.5)
    log_densities = np.logaddexp(*parts)
    # g's ratio to q has a second moment of about 10 here, so the mean of 4000 has an SE of 0.05.
    assert abs(log_normalisation(draws, log_densities)) < 0.2
    assert abs(log_normalisation(draws, log_densities + np.log(sd).sum())) > 2.0
    assert abs(log_normalisation(draws, generator.permutation(log_densities))) > 0.5


def test_an_environment_without_the_packages_is_refused_with_the_remedy(load, monkeypatch) -> None:
    peers = load("peers")
    monkeypatch.setitem(peers.MODULES, "sbi", ("json", "no_such_package_anywhere"))
    with pytest.raises(SystemExit, match=r"lacks no_such_package_anywhere, .*peers-requirements\.txt.*--python"):
        peers.refuse_incomplete(sys.executable, ["sbi"])
    monkeypatch.setitem(peers.MODULES, "sbi", ("json",))
    peers.refuse_incomplete(sys.executable, ["sbi"])
    with pytest.raises(SystemExit, match="no Python interpreter"):
        peers.refuse_incomplete("/no/such/python", ["sbi"])


def test_a_kept_training_counts_only_for_the_same_settings(load, tmp_path: Path) -> None:
    peers = load("peers")
    path = tmp_path / "sbi-0.json"
    asked = {"settings": {"package": "sbi"}, "seed": 0, "cpu_seconds": 240.0}
    assert peers.kept_result(path, asked) is None
    path.write_text(json.dumps({"asked": asked, "found": {"mean": -1.0}}))
    assert peers.kept_result(path, asked) == {"mean": -1.0}
    assert peers.kept_result(path, asked | {"cpu_seconds": 60.0}) is None


def test_figures_are_means_over_seeds_and_the_table_sets_contenders_side_by_side(load) -> None:
    peers, table = load("peers"), load("table")
    keys = [key for key, _ in peers.METRICS.values()] + ["cpu_seconds"]
    results = [dict.fromkeys(keys, value) for value in (1.0, 2.0, 6.0)]
    figures = peers.figures_of("sbi, nsf", {"package": "sbi"}, results)
    assert figures["nlp[sbi, nsf]"][0] == pytest.approx(3.0)
    # SD of 1, 2, 6 is sqrt(7).
    assert figures["nlp_seed_se[sbi, nsf]"][0] == pytest.approx((7 / 3) ** 0.5)
    assert figures["training_peak[sbi, nsf]"][0] == 6.0
    assert figures["cpu_seconds[sbi, nsf]"][0] == 6.0
    assert json.loads(figures["settings.sbi, nsf"][0]) == {"package": "sbi"}
    shown = {"nlp[a]": {"value": 1.0, "unit": "nats"}, "nlp[b]": {"value": 2.5, "unit": "nats"}}
    rows = table.compared_rows(shown | {"steps[b]": {"value": 7.0, "unit": "steps"}})
    assert rows[0] == "| figure | a | b | unit |"
    assert rows[2:] == ["| `nlp` | 1 | 2.5 | nats |", "| `steps` |  | 7 | steps |"]

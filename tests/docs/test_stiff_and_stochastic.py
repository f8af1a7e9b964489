"""The models on the page about stiff and stochastic models run as printed, and its overrides are understood."""

from __future__ import annotations

import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from nlme_sbi import Design, Rosenbrock
from nlme_sbi.cli import compose_config
from nlme_sbi.config.instantiate import instantiate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "stiff_and_stochastic.md"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The classes of the page, as modules in a folder that Python looks in."""
    shown = dict(
        re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found: dict[str, object] = {}
    for name, text in shown.items():
        (tmp_path / Path(name).name).write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
        found |= vars(__import__(Path(name).stem))
    return found


def test_noisy_growth_keeps_the_mean_of_its_early_phase(models: dict[str, object], generator: torch.Generator) -> None:
    """Far below capacity it is geometric Brownian motion: mean N0 exp(r t), log-normal."""
    count, rate, start, size, time = 8000, 0.6, 0.01, 0.4, 2.0
    phi = torch.tensor([rate, 1e6, start, size, 1e-9]).log().expand(count, 5)
    simulator = models["NoisyGrowth"]()  # type: ignore[operator]
    values = simulator.simulate(phi, Design.regular(torch.tensor([time]), count), generator).values[:, 0, 0].double()
    mean = start * math.exp(rate * time)
    relative = math.sqrt(math.expm1(size**2 * time) / count)
    # 4.5 standard errors, and the scheme's own bias of about r^2 h t / 2 = 2%.
    assert abs(float(values.mean()) / mean - 1) < 4.5 * relative + 0.02
    spread = float(values.log().std())
    assert abs(spread / (size * math.sqrt(time)) - 1) < 4.5 / math.sqrt(2 * count) + 0.01


def test_bursts_have_the_known_mean_and_fano_factor(models: dict[str, object], generator: torch.Generator) -> None:
    """Stationary telegraph model: mean of on-share times production over decay, and its Fano factor."""
    count, on, off, make, decay = 4000, 0.5, 1.0, 20.0, 1.0
    phi = torch.tensor([on, off, make, decay]).log().expand(count, 4)
    simulator = models["Bursts"]()  # type: ignore[operator]
    values = simulator.simulate(phi, Design.regular(torch.tensor([15.0]), count), generator).values[:, 0, 0].double()
    share = on / (on + off)
    mean = share * make / decay
    fano = 1 + (1 - share) * make / (on + off + decay)
    assert abs(float(values.mean()) - mean) < 4.5 * math.sqrt(fano * mean / count)
    # The variance's relative error is below sqrt(3/n) at this kurtosis.
    assert abs(float(values.var()) / (fano * mean) - 1) < 4.5 * math.sqrt(3 / count)


def test_every_override_of_the_page_composes() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("python scripts/simulate.py")]
    assert len(lines) == 2
    solvers = []
    for line in lines:
        cfg = compose_config("simulate", shlex.split(line)[2:])
        solvers.append(instantiate(cfg.simulator, where="simulator").solver)
    assert solvers == [Rosenbrock(), Rosenbrock(relative_tolerance=1e-6, method="rodas5p")]


@pytest.mark.parametrize("experiment", ["mrna_ribosome", "mrna_langevin"])
def test_the_bundled_experiments_simulate(experiment: str, generator: torch.Generator) -> None:
    cfg = compose_config("simulate", [f"experiment={experiment}"])
    prior, design, simulator = (instantiate(cfg[key], where=key) for key in ("prior", "design", "simulator"))
    output = simulator.simulate(prior.sample(20, generator), design.sample(20, generator), generator)
    assert output.values.shape == (20, 180, 1)
    assert not output.status.any()


def test_arguments_of_the_page_reach_the_models() -> None:
    cfg = compose_config("simulate", ["experiment=mrna_langevin", "simulator.step=0.02"])
    assert instantiate(cfg.simulator, where="simulator").step == 0.02

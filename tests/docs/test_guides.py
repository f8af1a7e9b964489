"""What the guides show is what the program does: quoted refusals, the model of one's own, links between terms."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from nlme_sbi import Design, Observations
from nlme_sbi.cli import compose_config
from nlme_sbi.config.instantiate import instantiate

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ROOT / "docs" / "guides"


def examples(page: str) -> dict[str, str]:
    """The code blocks that follow a marker ``<!-- example: NAME -->``."""
    text = (GUIDES / page).read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE))


# Refusals.


def sentences() -> str:
    """All texts of the package, one a line; what a format string fills in is an ellipsis."""
    found = []
    for path in sorted((ROOT / "nlme_sbi").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def quoted() -> list[str]:
    """The pieces, between ellipses, of everything in code in the first column of the page's tables."""
    pieces = []
    for line in (GUIDES / "refusals.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith("| the sentence"):
            for code in re.findall(r"`([^`]+)`", line.split(" | ")[0]):
                # X, M, N and names in parentheses stand for what the sentence fills in.
                pieces += [
                    piece.strip(" ;") for piece in re.split(r"…|\b[XMN]\b|\([A-Z]+\)|\"[A-Z]+\"|CENS/LIMIT", code)
                ]
    return [piece for piece in pieces if len(piece) > 5]


def test_every_quoted_refusal_is_one_that_the_program_prints() -> None:
    pieces, known = quoted(), sentences()
    assert len(pieces) > 80
    assert [piece for piece in pieces if piece not in known] == []


# The model of one's own.


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The two classes of the page, as modules in a folder that Python looks in."""
    found: dict[str, object] = {}
    for name, text in examples("own_model.md").items():
        if name.startswith("simulators/"):
            (tmp_path / Path(name).name).write_text(text.replace("from simulators.", "from "), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("logistic_growth", "logistic_growth_ode"):
        monkeypatch.delitem(sys.modules, module, raising=False)
        found |= vars(__import__(module))
    return found


def test_the_page_shows_every_file_that_it_needs() -> None:
    assert set(examples("own_model.md")) == {
        "simulators/logistic_growth.py",
        "simulators/logistic_growth_ode.py",
        "conf/experiment/logistic_growth.yaml",
        "make_wells.py",
        "commands",
    }


def test_both_models_solve_the_equation_that_they_state(model: dict[str, object]) -> None:
    closed, solved = model["LogisticGrowth"](), model["LogisticGrowthOde"]()  # type: ignore[operator]
    natural = torch.tensor([[0.7, 1.2, 0.02, 0.005, 0.03], [0.3, 0.9, 0.05, 0.005, 0.03]], dtype=torch.float64)
    phi, times = natural.log(), torch.arange(0.0, 16.5, 0.5, dtype=torch.float64)
    design = Design.regular(times, individuals=2)
    found = closed.predict(phi, design)[..., 0]
    rate, capacity, start = natural[:, :3, None].unbind(1)
    # The textbook's other form of the same solution.
    growth = (rate * times).exp()
    expected = capacity * start * growth / (capacity + start * (growth - 1))
    torch.testing.assert_close(found, expected)
    # Runge and Kutta's error over 4 steps of 1/8 h is of order (0.7/8)^4 = 6e-5, times a small constant.
    torch.testing.assert_close(solved.predict(phi, design)[..., 0], expected, rtol=1e-5, atol=1e-7)


def test_its_experiment_composes_and_reads_its_wells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = examples("own_model.md")
    section = yaml.safe_load(shown["conf/experiment/logistic_growth.yaml"])
    assert section["simulator"]["_target_"] == "simulators.logistic_growth.LogisticGrowth"
    monkeypatch.chdir(tmp_path)
    exec(compile(shown["make_wells.py"], "make_wells.py", "exec"), {})
    reader = compose_config(
        "fit_population",
        ["data=long_table", "data.path=wells.csv", "data.signals=[density]", "data.signal_units={density: OD}"],
    ).data
    wells = instantiate(reader, where="data").read()
    assert isinstance(wells, Observations)
    assert wells.values.shape == (24, 33, 1)


# Commands.


def commands() -> list[tuple[str, str]]:
    """Every command with scripts/ in a block of a guide, with the page."""
    found = []
    for page in sorted(GUIDES.glob("*.md")):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line) for line in lines if "scripts/" in line]
    return found


def test_every_script_and_experiment_in_the_guides_is_there() -> None:
    assert len(commands()) > 20
    own = set(examples("own_model.md"))
    for page, line in commands():
        script = re.findall(r"scripts/\w+\.py", line)
        assert script, (page, line)
        assert all((ROOT / name).is_file() for name in script), (page, line)
        for group, choice in re.findall(r"\b(experiment|population|estimator|data|design|summary)=(\w+)", line):
            name = f"conf/{group}/{choice}.yaml"
            assert (ROOT / name).is_file() or name in own, (page, line)


# Vectors without times.


@pytest.mark.slow
def test_the_page_on_vectors_does_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import nlme_sbi

    train = nlme_sbi.train_on_pairs
    tiny = {"budget": nlme_sbi.PairBudget(epochs=1), "flow": nlme_sbi.AffineCouplingFlow(hidden=8), "progress": False}
    monkeypatch.setattr(nlme_sbi, "train_on_pairs", lambda *given, **named: train(*given, **named, **tiny))
    shown: dict[str, object] = {}
    for text in examples("plain_simulators.md").values():
        exec(compile(text, "plain_simulators.md", "exec"), shown)
    assert shown["draws"].phi.shape == (1, 1000, 2)  # type: ignore[attr-defined]
    simulator, generator = shown["simulator"], torch.Generator().manual_seed(1)
    design = nlme_sbi.Points(entries=2).sample(5, generator)
    made = simulator.simulate(torch.tensor([[2.0, 0.0]]).expand(5, 2), design, generator)  # type: ignore[attr-defined]
    assert torch.allclose(made.values.square().sum((1, 2)), torch.full((5,), 4.0), atol=1e-4)


@pytest.mark.slow
def test_the_page_on_single_individuals_does_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import nlme_sbi

    infer = nlme_sbi.infer_individual
    tiny = {"budget": nlme_sbi.PairBudget(epochs=1), "flow": nlme_sbi.AffineCouplingFlow(couplings=2, hidden=8)}
    monkeypatch.setattr(nlme_sbi, "infer_individual", lambda *given, **named: infer(*given, **named, **tiny))
    shown: dict[str, object] = {}
    exec(compile(examples("single_individuals.md")["python"], "single_individuals.md", "exec"), shown)
    refined = shown["refined"]
    assert refined.samples.phi.shape == (1, 1000, 2)  # type: ignore[attr-defined]
    mean = refined.samples.phi[0].mean(0)  # type: ignore[attr-defined]
    error = 5 * 0.5 / refined.effective**0.5  # type: ignore[attr-defined]
    assert torch.allclose(mean, torch.tensor([0.5, -0.5]), atol=error)

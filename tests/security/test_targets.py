"""A section of a run can build parts of a run, and nothing else: no code, no file, no request, no traceback."""

from __future__ import annotations

import importlib
import inspect
import random
import sys
from pathlib import Path

import pytest
import yaml

from nlme_sbi.config.instantiate import instantiate, locate
from nlme_sbi.config.targets import READER, ROLES, STORED_ROLES
from nlme_sbi.types import Prior, Simulator

sys.path.insert(0, str(Path(__file__).parent))
from attacks import ARGUMENTS, modules_of_ours, outcome, section, targets, watched

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.fixture(scope="module", autouse=True)
def everything_is_imported() -> None:
    """Imports read and may write files of their own; they are not what is tested here."""
    for name in modules_of_ours():
        importlib.import_module(name)


def test_no_target_of_400_runs_code_writes_a_file_or_asks_a_network(tmp_path: Path) -> None:
    chosen = random.Random(0)
    bugs, built = [], []
    for target in targets(400, seed=0):
        for arguments in chosen.sample(ARGUMENTS, 2):
            with watched() as seen:
                found = outcome(lambda t=target, a=arguments: instantiate(section(t, a, tmp_path), roles=STORED_ROLES))
            assert (seen.code, seen.files, seen.requests) == ([], [], []), target
            bugs += [(target, found.words)] if found.kind == "bug" else []
            built += [target] if found.kind == "fine" else []
    assert bugs == []
    assert list(tmp_path.iterdir()) == []
    roles = {role.name for role in ROLES}
    assert all(any(role.fits(locate(target)) for role in STORED_ROLES) for target in built), roles


def test_the_watcher_sees_what_it_is_there_for(tmp_path: Path) -> None:
    """The oracle of this file: programs, files and addresses that are touched are counted."""
    import os
    import socket

    with watched() as seen:
        os.system("true")
        (tmp_path / "x").write_text("x")
        with socket.socket() as opened:
            opened.settimeout(0.1)
            opened.connect_ex(("127.0.0.1", 9))
    assert len(seen.code) == len(seen.files) == 1
    assert seen.requests


def test_every_class_that_can_be_a_target_is_a_part_of_a_run() -> None:
    """The list by name: a new entry is a decision, not an accident of what a class happens to have."""
    found = set()
    for name in modules_of_ours():
        for key, value in vars(importlib.import_module(name)).items():
            if inspect.isclass(value) and outcome(lambda path=f"{name}.{key}": locate(path)).kind == "fine":
                found.add(value.__name__)
    handlers = {"AmortizedPosterior", "PosteriorEnsemble", "RunDirectory", "FinishedRun", "StoredDesign", "_LogFile"}
    assert not found & handlers
    assert {"GaussianPrior", "MrnaTwoRate", "Theophylline", "PriorRatio", "Exact", "WideSheet", "FixedGrid"} <= found
    assert {"NeuralSd", "Midpoint", "ModifiedEuler"} <= found
    assert len(found) < 85


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nlme_sbi.AmortizedPosterior.load", "no class in a module|is a function or a method|something inside"),
        ("nlme_sbi.networks.posterior.AmortizedPosterior.load", "something inside AmortizedPosterior"),
        ("nlme_sbi.networks.ensembles.PosteriorEnsemble.load", "something inside PosteriorEnsemble"),
        ("nlme_sbi.networks.posterior.AmortizedPosterior", "is no part that a section may build"),
        ("nlme_sbi.runs.log_files._LogFile", "is private"),
        ("nlme_sbi.runs.directory.RunDirectory", "is no part that a section may build"),
        ("nlme_sbi.io.download.download", "is a function or a method"),
        ("nlme_sbi.io.download.PublishedFile", "is no part that a section may build"),
        ("nlme_sbi.io.event_tables.event_table.EventTable", "is no part that a section may build"),
        ("nlme_sbi.io.describe", "is a function or a method"),
        ("nlme_sbi.types.Prior", "cannot be built"),
        ("nlme_sbi.individual_model.mechanistic.OdeModel", "cannot be built"),
        ("nlme_sbi.runs.stored_designs.StoredDesign", "is no part that a section may build"),
        ("nlme_sbi.logging.FileHandler", "comes from|there is no module|has no"),
        ("nlme_sbi.runs.directory.logging.FileHandler", "comes from logging"),
        ("nlme_sbi.individual_model.priors.GaussianPrior.sample", "something inside GaussianPrior"),
        ("nlme_sbi.individual_model.priors.GaussianPrior.__init__", "is private"),
    ],
)
def test_what_a_stored_section_cannot_name(target: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        locate(target, roles=STORED_ROLES)


def test_trust_is_of_the_user_and_never_of_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sent_model.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass M: pass"
    )
    monkeypatch.syspath_prepend(tmp_path)
    inner = {"_target_": "sent_model.M"}
    for hidden in (
        {"_target_": "simulators.theophylline.Theophylline", "trust": ["sent_model"], "noise": inner},
        {
            "_target_": "nlme_sbi.individual_model.priors.MixturePrior",
            "components": [inner],
            "weights": [1.0],
            "trust": ["sent_model"],
        },
        [inner],
        {"trust": ["sent_model"], "part": inner},
    ):
        with pytest.raises(ValueError, match=r"comes from sent_model, which is neither part of nlme_sbi nor trusted"):
            instantiate(hidden)
    assert not (tmp_path / "ran").exists()
    instantiate(inner, trust=["sent_model"])
    assert (tmp_path / "ran").exists()


def test_our_own_package_cannot_be_trusted_into_more() -> None:
    with pytest.raises(ValueError, match="is no part that a section may build"):
        locate("nlme_sbi.runs.directory.RunDirectory", trust=["nlme_sbi", "nlme_sbi.runs"])


def test_nothing_is_built_before_every_target_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    import nlme_sbi.individual_model.priors

    made = []
    monkeypatch.setattr(
        nlme_sbi.individual_model.priors.GaussianPrior, "__post_init__", lambda self: made.append(self), raising=False
    )
    good = {"_target_": "nlme_sbi.individual_model.priors.GaussianPrior", "parameters": {"a": {"mean": 0.0, "sd": 1.0}}}
    with pytest.raises(ValueError, match="comes from os"):
        instantiate([good, {"_target_": "os.system"}])
    assert made == []


def test_a_role_is_checked_on_the_class_before_it_is_called() -> None:
    grid = {
        "_target_": "nlme_sbi.designs.FixedGrid",
        "start": 0.0,
        "stop": 1.0,
        "count": -5,
    }  # refuses when it is built
    with pytest.raises(ValueError, match=r"prior is a FixedGrid, which is no Prior: it lacks log_prob"):
        instantiate(grid, where="prior", role=Prior)
    with pytest.raises(ValueError, match=r"simulator is a FixedGrid, which is no Simulator: it lacks simulate"):
        instantiate(grid, where="simulator", role=Simulator)


def test_a_section_that_nests_without_end_is_a_sentence() -> None:
    node: object = {"_target_": "nlme_sbi.individual_model.priors.GaussianPrior"}
    for _ in range(5000):
        node = {"_target_": "nlme_sbi.individual_model.priors.MixturePrior", "components": [node]}
    with pytest.raises(ValueError, match="nests more than 50 sections"):
        instantiate(node)


def test_every_target_of_the_configuration_can_be_named() -> None:
    """The other side of the list: nothing that the product itself writes into a configuration is refused."""
    named = []
    for path in CONF.rglob("*.yaml"):
        text = path.read_text()
        named += [line.split("_target_:")[1].split("#")[0].strip() for line in text.splitlines() if "_target_:" in line]
    ours = {target for target in named if target.startswith(("nlme_sbi.", "simulators."))}
    assert len(ours) > 20
    for target in ours:
        locate(target)
    readers = {target for target in ours if READER.fits(locate(target))}
    assert {outcome(lambda target=target: locate(target, roles=STORED_ROLES)).kind for target in readers} == {"refused"}
    assert yaml.safe_load((CONF / "base.yaml").read_text())["trust"] == []

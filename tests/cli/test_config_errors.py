"""Every mistake on the command line is one sentence that names the valid choices."""

from __future__ import annotations

import pytest
import yaml
from omegaconf import OmegaConf

from nlme_sbi.cli import CONFIG_DIRECTORY, compose_config, sentence_for
from nlme_sbi.config.hydra_errors import config_sentence

STAGES = ("simulate", "train_flow", "fit_population")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("experiment=theophyline", r'^experiment has no choice "theophyline"; choices: .*Did you mean theophylline\?$'),
        (
            "simulator=zzz",
            r'^simulator has no choice "zzz"; choices: black_box, compartments, .*mrna_two_rate, .*theophylline\.$',
        ),
        ("training.stepz=3", r"^training\.stepz is not a key of training; keys: steps, .* Did you mean steps\?$"),
        ("sed=3", r"^sed is not a key of the configuration; keys: .*simulator.* Did you mean seed\?$"),
        ("prior.parameters.delta.men=2", r"keys: mean, variance\. Did you mean mean\?$"),
        (
            "population.covariates.CL=power",
            r"^population\.covariates\.CL is not a key of population\.covariates, which is empty; add it with a plus: "
            r"\+population\.covariates\.CL=\.\.\.$",
        ),
        ("seed==", r'^"seed==" cannot be read; write KEY=VALUE'),
        ("seed", r'^"seed" cannot be read; write KEY=VALUE'),
        ("training.steps=[1", r"cannot be read; write KEY=VALUE"),
        ("seed=abc", r"^seed must be an integer; got 'abc' \(text\)\.$"),
        ("seed=-1", r"^seed must not be negative; got -1\.$"),
        ("fresh=maybe", r"^fresh must be true or false; got 'maybe' \(text\)\.$"),
        ("trust=mymodule", r"^trust must be a list \(text each\)"),
        ("output_root=null", r"^output_root must be text; got null"),
        ("experiment.name=3", r"^experiment\.name must be text; got 3"),
        ("device=???", r"^device has no value; give it as device=\.\.\.$"),
        ("output_root=${nowhere}", r"^output_root cannot be worked out: Interpolation key 'nowhere' not found\.$"),
        ("experiment@foo=x", r"^Could not override 'experiment@foo'\.$"),
        ("~seed=7", r"Could not delete"),
    ],
)
def test_a_mistake_is_one_sentence(override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        compose_config("simulate", [override])
    assert "\n" not in str(refusal.value)


def test_a_mistaken_script_name() -> None:
    with pytest.raises(ValueError, match="no configuration simulat; look into the folder conf/"):
        compose_config("simulat")


def test_an_ambiguous_value_names_the_sweep_flag() -> None:
    from hydra.errors import ConfigCompositionException

    error = ConfigCompositionException("Ambiguous value for argument 'seed=1,2'\n1. To use it as a list, ...")
    assert config_sentence(error) == (
        "seed=1,2 names several values; add -m to run them one after another, or write a list as KEY=[A,B]."
    )


def test_errors_that_a_user_can_mend_are_sentences_and_bugs_are_not() -> None:
    assert sentence_for(ValueError("cells.csv: no rows.")) == "cells.csv: no rows."
    assert sentence_for(PermissionError(13, "Permission denied", "x")) == "[Errno 13] Permission denied: 'x'"
    assert "memory is full" in sentence_for(MemoryError())
    assert sentence_for(ValueError()) == "ValueError"
    for bug in (ZeroDivisionError("1/0"), RuntimeError("mat1 and mat2"), TypeError("x"), KeyError("x")):
        assert sentence_for(bug) is None
    missing = OmegaConf.create({"data": {"path": "???"}})
    try:
        missing.data.path  # noqa: B018
    except Exception as error:
        assert sentence_for(error) == "data.path has no value; give it as data.path=..."  # noqa: PT017


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_experiment_composes_in_every_script(stage: str) -> None:
    experiments = sorted(path.stem for path in (CONFIG_DIRECTORY / "experiment").glob("*.yaml"))
    assert {"mrna_two_rate", "theophylline"} <= set(experiments)
    for experiment in experiments:
        cfg = compose_config(stage, [f"experiment={experiment}"])
        assert cfg.experiment.name == experiment
        assert "hydra" not in cfg
        OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.slow
def test_the_default_experiment_and_a_name_of_ones_own() -> None:
    assert compose_config("simulate").experiment.name == "mrna_two_rate"
    cfg = compose_config("simulate", ["experiment=theophylline", "experiment.name=wide", "prior.parameters.V.sd=2"])
    assert cfg.experiment.name == "wide"
    assert cfg.simulator._target_ == "simulators.theophylline.Theophylline"
    assert cfg.prior.parameters.V.sd == 2
    assert compose_config("simulate", ["~experiment"]).experiment.name == "custom"


def test_every_choice_has_a_target_that_exists_and_takes_its_keys() -> None:
    import inspect

    from nlme_sbi.config.instantiate import locate

    groups = ("simulator", "prior", "design", "data", "summary", "flow", "training", "population", "estimator")
    groups += ("hierarchy", "encoder")
    for path in [path for group in groups for path in sorted((CONFIG_DIRECTORY / group).glob("*.yaml"))]:
        section = yaml.safe_load(path.read_text())
        assert path.read_text().startswith("# "), f"{path.name} begins with a comment that says what it is"
        if section is None:  # data=none, hierarchy=none
            assert path.stem == "none"
            continue
        if set(section) - {"defaults", "parameters"} == set() and "defaults" in section:  # another choice, changed
            continue
        name = section.pop("_target_")
        if name == "???":  # to be filled in by the user
            continue
        target = locate(name, where=str(path))
        assert set(section) <= set(inspect.signature(target).parameters), path

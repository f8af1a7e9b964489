"""The tests' quick compositions are Hydra's own, refusals as well."""

from __future__ import annotations

import pytest
import quick_compositions
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf

from nlme_sbi.cli import compose_config

GIVEN = {
    "values": ("fit_population", ["seed=7", "fit.starts=2", "data.skip={C: C}", "individuals.draws=0"]),
    "groups and values": ("train_flow", ["experiment=theophylline", "summary=pooled", "training.steps=7"]),
    "a value of a choice": ("simulate", ["simulator=compartments", "simulator.lag=true", "design=of_data"]),
    "a group left out": ("simulate", ["~experiment", "seed=3"]),
    "a value left out": ("fit_population", ["data=event_table", "data.path=a.csv", "~data.signal_units"]),
    "a whole section": ("simulate", ["simulator={_target_: own.Model}", "trust=[own]"]),
    "the same again, otherwise": ("fit_population", ["seed=8", "fit.starts=3"]),
}
REFUSED = {
    "no such choice": ("simulate", ["experiment=theophyline", "seed=1"]),
    "no such key": ("train_flow", ["experiment=theophylline", "training.stepz=3"]),
    "several values": ("simulate", ["seed=1,2"]),
    "no override": ("simulate", ["seed=="]),
    "a value of another kind": ("simulate", ["seed=abc"]),
    "nothing to leave out": ("simulate", ["~seed=7"]),
}


def composed(case: tuple[str, list[str]]) -> object:
    return OmegaConf.to_container(compose_config(*case))


@pytest.mark.slow
@pytest.mark.parametrize("case", GIVEN)
def test_they_are_what_hydra_composes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ConfigLoaderImpl._load_configuration_impl is not quick_compositions._compose
    quick = [composed(GIVEN[case]) for _ in range(2)]  # the second time from what is kept
    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", quick_compositions._compose)
    assert quick == [composed(GIVEN[case])] * 2


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_they_are_refused_as_hydra_refuses_them(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r".") as quick:
        composed(REFUSED[case])
    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", quick_compositions._compose)
    with pytest.raises(ValueError, match=r".") as whole:
        composed(REFUSED[case])
    assert str(quick.value) == str(whole.value)

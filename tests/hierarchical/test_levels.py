"""Levels of parameters: which unknowns they give, how those make up an individual's parameters, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_hierarchy import PARAMETERS, Sums, simulated

from nlme_sbi.hierarchical.levels import Hierarchy
from nlme_sbi.types import Groups

OBSERVATIONS = simulated(6, 2)
GROUPS = OBSERVATIONS.design.groups


def bound(shared: bool = True, groups: Groups | None = GROUPS, **changed: dict):
    return Hierarchy({**PARAMETERS, **changed}, shared=shared).bind(Sums().parameters, groups)


def test_unknowns_and_what_an_individual_is_the_sum_of() -> None:
    hierarchy = bound()
    assert [latent.name for latent in hierarchy.own] == ["own"]
    assert [latent.name for latent in hierarchy.shared] == ["common", "device[device=b]", "device[device=c]"]
    codes = hierarchy.codes_of(GROUPS, 6)
    together = torch.einsum("h,ihd->id", torch.tensor([1.0, 10.0, 100.0]), hierarchy.shared_map(codes))
    assert together[:, 1].tolist() == [1.0] * 6
    assert together[:, 2].tolist() == [0.0, 10.0, 100.0] * 2
    torch.testing.assert_close(hierarchy.base, torch.tensor([0.0, 0.0, 0.5, -0.2231435513], dtype=torch.float64))


def test_nothing_shared_gives_every_individual_its_own() -> None:
    hierarchy = bound(shared=False)
    assert not hierarchy.shared
    assert [latent.parameter for latent in hierarchy.own] == ["own", "common", "device"]
    active = hierarchy.own_active(hierarchy.codes_of(GROUPS, 6))
    assert active[:, 2].tolist() == [False, True, True] * 2
    assert bool(active[:, :2].all())


def test_random_effects_of_a_group_on_individual_values() -> None:
    hierarchy = bound(own={**PARAMETERS["own"], "by": "device", "effect_sd": 0.2})
    effects = [latent for latent in hierarchy.shared if latent.parameter == "own"]
    assert [(latent.level, latent.mean, latent.sd) for latent in effects] == [(level, 0.0, 0.2) for level in "abc"]


def test_groups_of_other_data_are_translated_and_new_levels_refused() -> None:
    hierarchy = bound()
    other = Groups(("device",), torch.tensor([[0], [1]]), (("c", "a"),))
    assert hierarchy.codes_of(other, 2)[:, 0].tolist() == [2, 0]
    with pytest.raises(ValueError, match='device "d" was not among the data that were fitted'):
        hierarchy.codes_of(Groups(("device",), torch.tensor([[0]]), (("d",),)), 1)
    with pytest.raises(ValueError, match="These individuals have no device"):
        hierarchy.codes_of(None, 1)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"own": {"level": "indvidual", "mean": 0, "sd": 1}}, 'must be one of .*got "indvidual".*Did you mean'),
        ({"own": {"level": "global", "mean": 0}}, "needs mean, sd; missing: sd"),
        ({"own": {"level": "global", "mean": 0, "sd": 1, "by": "x"}}, "unknown: by"),
        ({"own": {"level": "individual", "mean": 0, "sd": 0}}, "own.sd must be positive; got 0"),
        ({"owns": {"level": "constant", "value": 0}}, 'names .*owns.*Did you mean "own"'),
        ({"device": {**PARAMETERS["device"], "by": "divice"}}, 'by names "divice".*Did you mean "device"'),
        ({"device": {**PARAMETERS["device"], "reference": "z"}}, 'reference is "z", and device has the levels'),
        ({"own": {**PARAMETERS["own"], "by": "device"}}, "needs effect_sd"),
    ],
)
def test_refusals(changed: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        bound(**changed)


def test_missing_parameters_and_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"says nothing of .*common"):
        Hierarchy({"own": PARAMETERS["own"]}).bind(Sums().parameters, GROUPS)
    with pytest.raises(ValueError, match="the data have the groups none"):
        bound(groups=None)


def test_levels_of_nobody_who_is_fitted_are_unknown_but_for_the_reference() -> None:
    groups = replace(GROUPS, codes=torch.tensor([[1]] * 6))  # b alone; a is the reference
    hierarchy = bound(groups=groups)
    assert hierarchy.levels == {"device": ("a", "b")}
    assert hierarchy.codes_of(replace(GROUPS, codes=torch.tensor([[0], [1]])), 2)[:, 0].tolist() == [0, 1]
    with pytest.raises(ValueError, match='device "c" was not among the data that were fitted'):
        hierarchy.codes_of(replace(GROUPS, codes=torch.tensor([[2]])), 1)


def test_aliased_factors_are_refused_and_crossed_ones_are_not() -> None:
    codes = torch.tensor([[0, 0], [1, 1], [2, 0], [0, 0], [1, 1], [2, 0]])
    aliased = Groups(("device", "site"), codes, (("a", "b", "c"), ("x", "y")))
    entry = {**PARAMETERS["device"], "by": ["device", "site"], "reference": {"device": "a", "site": "x"}}
    with pytest.raises(ValueError, match=r"the factors .*device.*site.* are aliased"):
        bound(groups=aliased, device=entry)
    crossed = replace(aliased, codes=torch.tensor([[0, 0], [1, 1], [2, 0], [0, 1], [1, 0], [2, 1]]))
    assert len(bound(groups=crossed, device=entry).shared) == 1 + 2 + 1

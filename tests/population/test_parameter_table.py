"""What the entries of theta are: looked up by fields, named and labelled from them, refused where they are not one."""

from __future__ import annotations

import math

import pytest
import torch

from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.population import GaussianPopulation
from nlme_sbi.population.models.interface import ParameterTable, Unknown

# Names with dots, one the beginning of another: whoever takes a name to pieces confuses them.
NAMES = ("rate", "rate.rate", "shift", "loss")
SPACE = ParameterSpace(tuple(Parameter(name, "1/h") for name in NAMES))


def _table() -> ParameterTable:
    return GaussianPopulation(covariance="full", constant=("loss",)).bind(SPACE).unknowns


def test_entries_are_found_by_what_they_are() -> None:
    table = _table()
    means, sds, pairs = (table.entries(quantity) for quantity in ("mean", "log_sd", "partial_correlation"))
    assert (means, sds, pairs) == ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))
    assert table.entries("log_sd", "mean") == (0, 1, 2, 3, 4, 5, 6)
    assert [table.entry("mean", name) for name in NAMES] == [0, 1, 2, 3]
    assert [table.entry("log_sd", name) for name in NAMES] == [4, 5, 6, None]
    assert table.entry("partial_correlation", "rate", "shift") == 8
    assert table.entry("partial_correlation", "shift", "rate") is None  # the first parameter comes first
    assert table.entry("effect", "rate", "WT") is None


def test_names_and_labels_follow_from_the_fields() -> None:
    table = _table()
    assert table.names[4:8] == ("log_sd.rate", "log_sd.rate.rate", "log_sd.shift", "partial_correlation.rate.rate.rate")
    assert table.labels == (
        *NAMES,
        "omega(rate)",
        "omega(rate.rate)",
        "omega(shift)",
        "corr(rate, rate.rate)",
        "corr(rate, shift)",
        "corr(rate.rate, shift | rate)",
    )
    own = ParameterTable(
        rows=(Unknown("mean", "rate"), Unknown("log_df"), Unknown("log_sd_effect", "rate", "sex", "f")),
        transforms=("identity", "log", "identity"),
        starts=torch.full((3,), math.nan, dtype=torch.float64),
        fixed=torch.zeros(3, dtype=torch.bool),
    )
    assert own.names == ("mean.rate", "log_df", "log_sd_effect.rate.sex.f")
    assert own.labels == ("rate", "log_df", "sex f on log SD of rate")


@pytest.mark.parametrize("rows", [(Unknown("mean", "a"), Unknown("mean", "a")), (Unknown("mean", "a"),)])
def test_rows_that_are_no_table_are_refused(rows: tuple[Unknown, ...]) -> None:
    with pytest.raises(ValueError, match="one different name, transform, start and flag"):
        ParameterTable(
            rows=rows,
            transforms=("identity", "identity"),
            starts=torch.zeros(2, dtype=torch.float64),
            fixed=torch.zeros(2, dtype=torch.bool),
        )

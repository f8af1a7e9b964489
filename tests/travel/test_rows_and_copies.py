"""What users hold can be pickled, copied and sent to another process, and rows are chosen by positions or masks."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import pickle
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from nlme_sbi import FixedGrid, GaussianPopulation, GaussianPrior, Observations, ResampledDesigns
from nlme_sbi.designs import Schedule
from nlme_sbi.population import Exact, Laplace, PriorRatio, Saem
from nlme_sbi.population.theta_posterior.prior import ThetaPriors
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.rows import ReadOnlyMapping, row_positions
from nlme_sbi.types import Covariates, Design, Events, Groups, Simulations, SimulatorOutput
from simulators.mrna_two_rate import MrnaTwoRate
from simulators.theophylline import Theophylline

PEOPLE = 5
COPIES = {"pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "deepcopy": copy.deepcopy}


def design(*, shared: bool = False) -> Design:
    """Five people with everything that a design can have; ``shared``: one row of times for all, expanded."""
    number = torch.arange(PEOPLE, dtype=torch.float32)
    times = torch.tensor([[0.5, 1.0, 2.0]])
    return Design(
        times=times.expand(PEOPLE, -1) if shared else times + number[:, None],
        observed=torch.ones((PEOPLE, 3, 1), dtype=torch.bool),
        covariates=Covariates(
            ("WT", "SEX"),
            torch.stack([60 + number, number % 2], dim=1),
            levels={"SEX": ("f", "m")},
        ),
        groups=Groups(("plate",), (number[:, None] % 3).long(), (("a", "b", "c"),)),
        occasion=torch.ones((PEOPLE, 3), dtype=torch.int64),
        events=Events.single_dose(number, 100 + number),
    )


def observations(*, shared: bool = False) -> Observations:
    values = torch.arange(PEOPLE * 3, dtype=torch.float32).reshape(PEOPLE, 3, 1)
    return Observations(
        ids=tuple("abcde"),
        values=values,
        design=design(shared=shared),
        signals=("concentration",),
        signal_units=("mg/L",),
        time_unit="h",
        censoring=torch.zeros((PEOPLE, 3, 1), dtype=torch.int64),
        lower=values - 1,
        upper=values + 1,
    )


def simulations() -> Simulations:
    rows = torch.arange(PEOPLE)
    return Simulations(rows[:, None].float(), observations().values, design(), rows)


def prior() -> GaussianPrior:
    return GaussianPrior({"rate": {"mean": -1.0, "sd": 1.0}})


HELD: dict[str, Callable[[], Any]] = {
    "observations": observations,
    "observations of one grid": lambda: observations(shared=True),
    "design": design,
    "covariates": lambda: design().covariates,
    "groups": lambda: design().groups,
    "events": lambda: design().events,
    "simulations": simulations,
    "output of a simulator": lambda: SimulatorOutput(torch.zeros((2, 3, 1)), torch.zeros(2, dtype=torch.int64)),
    "draws": lambda: PosteriorSamples(("rate",), torch.zeros((5, 4, 1)), torch.zeros((5, 4)), prior()),
    "prior": prior,
    "designs of data": lambda: ResampledDesigns(design(), covariates=("WT",)),
    "grid": lambda: FixedGrid(start=0.0, stop=1.0, count=4),
    "schedule": lambda: Schedule(points=5, dose=100, covariates={"WT": 70}),
    "schedule as it comes": Schedule,
    "population": lambda: GaussianPopulation(constant=["sigma"]),
    "population with everything": lambda: GaussianPopulation(
        covariance="full",
        fixed={"mean": {"V": 30.0}},
        start={"sd": {"CL": 0.3}},
        covariates={"CL": {"WT": {"form": "power", "reference": 70}}},
        log_sd_covariates={"CL": {"SEX": "categorical"}},
    ),
    "priors of theta": ThetaPriors,
    "prior ratio": PriorRatio,
    "exact": Exact,
    "saem": Saem,
    "laplace": Laplace,
    "theophylline": Theophylline,
    "cells": MrnaTwoRate,
}


def same(one: Any, other: Any) -> bool:
    """Equal in every field, to the bit; what has no fields and no equality of its own by the text of its pickle."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if is_dataclass(one):
        return type(one) is type(other) and all(
            same(getattr(one, item.name), getattr(other, item.name)) for item in fields(one)
        )
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or pickle.dumps(one) == pickle.dumps(other)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("what", HELD)
def test_what_users_hold_is_the_same_after_a_journey(what: str, how: str) -> None:
    thing = HELD[what]()
    assert same(COPIES[how](thing), thing)


@pytest.mark.slow
def test_observations_come_back_from_a_process_that_shares_nothing_with_this_one() -> None:
    there = [observations(), GaussianPopulation(constant=["sigma"])]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        back = pool.apply(copy.deepcopy, (there,))
    assert same(back[0], there[0])
    assert back[1] == there[1]


def test_a_read_only_mapping_is_a_mapping_and_stays_as_it_is() -> None:
    given = {"SEX": ("f", "m")}
    held = ReadOnlyMapping(given)
    given["SEX"] = ("x",)
    assert held == {"SEX": ("f", "m")}
    assert (dict(held), repr(held), len(held)) == ({"SEX": ("f", "m")}, "{'SEX': ('f', 'm')}", 1)
    with pytest.raises(TypeError):
        held["SEX"] = ("y",)
    for make in COPIES.values():
        assert make(held) == held


MASK = [True, False, True, False, True]
CHOSEN = {
    "tensor mask": torch.tensor(MASK),
    "array mask": np.array(MASK),
    "list mask": MASK,
    "tuple mask": tuple(MASK),
    "list of NumPy's truths": list(np.array(MASK)),
    "positions": [0, 2, 4],
    "tensor of positions": torch.tensor([0, 2, 4]),
    "small tensor of positions": torch.tensor([0, 2, 4], dtype=torch.uint8),
    "array of positions": np.array([0, 2, 4], dtype=np.uint16),
    "from the end": [-5, -3, -1],
    "range": range(0, 5, 2),
    "slice": slice(None, None, 2),
}
CARRIERS = [name for name in HELD if name in {"design", "covariates", "groups", "events", "simulations"}]


@pytest.mark.parametrize("rows", CHOSEN)
@pytest.mark.parametrize("what", ["observations", "observations of one grid", *CARRIERS])
def test_every_way_to_name_rows_chooses_the_same_ones(what: str, rows: str) -> None:
    whole = HELD[what]()
    some = whole[CHOSEN[rows]]
    assert len(some) == 3

    def check(part: Any, all_of_it: Any) -> None:
        if isinstance(part, Tensor):
            # torch's own list indexing is the oracle.
            assert torch.equal(part, all_of_it[torch.tensor([0, 2, 4])])
        elif is_dataclass(part):
            for item in fields(part):
                check(getattr(part, item.name), getattr(all_of_it, item.name))

    check(some, whole)
    if isinstance(some, Observations):
        assert some.ids == ("a", "c", "e")


def test_no_rows_and_all_rows_can_be_chosen() -> None:
    whole = observations()
    assert len(whole[[]]) == len(whole[[False] * 5]) == len(whole[torch.zeros(5, dtype=torch.bool)]) == 0
    assert whole[[]].values.shape == (0, 3, 1)
    assert whole[[True] * 5].ids == whole.ids


def test_a_column_of_pandas_is_a_mask_whatever_its_index() -> None:
    told = pd.Series(MASK, index=[3, 4, 0, 1, 2])
    assert inspect.unwrap(row_positions)(told, 5).tolist() == [0, 2, 4]


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "short mask": ([True, False], IndexError, r"^A mask needs one truth for each of the 5 rows; got 2\.$"),
    "long mask": (torch.ones(6, dtype=torch.bool), IndexError, r"for each of the 5 rows; got 6\.$"),
    "empty mask": (np.zeros(0, dtype=bool), IndexError, r"for each of the 5 rows; got 0\.$"),
    "mask of two dimensions": (torch.ones((5, 3), dtype=torch.bool), TypeError, "in one dimension"),
    "positions and truths": ([True, 2], TypeError, r"not both; got \[True, 2\]"),
    "numbers with a point": (np.array([0.0, 1.0]), TypeError, r"whole numbers or a mask; got float64"),
    "tensor with a point": (torch.tensor([0.0, 1.0]), TypeError, r"whole numbers or a mask"),
    "a word": ("ab", TypeError, "Rows are chosen by a slice, a list of positions or a mask"),
    "a single number": (2, TypeError, r"for example \[0, 2\]; got 2\.$"),
    "too far": ([0, 5, 7], IndexError, r"^There are 5 rows, from 0; row 5 is asked for\.$"),
    "too far back": ([0, -6], IndexError, r"row -6 is asked for\.$"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_are_not_there_are_refused(case: str) -> None:
    rows, kind, sentence = REFUSED[case]
    # As a user calls it: without the checks of annotations that all tests run under.
    with pytest.raises(kind, match=sentence):
        inspect.unwrap(row_positions)(rows, 5)
    if case in ("short mask", "long mask", "empty mask"):
        for what in CARRIERS:
            with pytest.raises(IndexError, match=sentence):
                HELD[what]()[rows]

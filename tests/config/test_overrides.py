"""Names on the command line arrive as they were typed; everything else is what Hydra makes of it."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from nlme_sbi.cli import compose_config
from nlme_sbi.config.overrides import rewrite_overrides

TYPED = [
    "007",
    "1E2",
    "true",
    "null",
    "1_000",
    "1.0",
    "+3",
    "-3",
    ".5",
    "5.",
    "nan",
    "inf",
    "NULL",
    "0x1",
    "a b",
    "12:30",
]


@pytest.mark.slow
@pytest.mark.parametrize("text", TYPED)
def test_an_id_is_the_text_that_was_typed(text: str) -> None:
    # Oracle: the characters between the brackets.
    assert list(compose_config("predict", [f"individuals=[{text}]"]).individuals) == [text]
    assert list(compose_config("report", [f"check_fit.individuals=[x,{text} , 7]"]).check_fit.individuals) == [
        "x",
        text,
        "7",
    ]


@pytest.mark.parametrize("text", ["'007'", '"1_000"'])
def test_what_is_quoted_stays_what_it_was(text: str) -> None:
    assert list(compose_config("predict", [f"individuals=[{text}]"]).individuals) == [text[1:-1]]


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("data.missing=[-99,NA,null]", "data.missing", ["-99", "NA", "null"]),
        ("data.signals=[1,2]", "data.signals", ["1", "2"]),
        ("data.sheet=2024", "data.sheet", "2024"),
        ("data.sheet=null", "data.sheet", None),
        ("data.skip={C: C, EXCL: [1, 2]}", "data.skip", {"C": "C", "EXCL": ["1", "2"]}),
        ("data.only.STUDY=007", "data.only", {"STUDY": "007"}),
        ("data.columns={id: 7, dv: 1E2}", "data.columns.dv", "1E2"),
        ("data.signal_scale={c: 1e-3}", "data.signal_scale", {"c": 0.001}),
        ("data.time_scale=2", "data.time_scale", 2),
        ("+data.time_scale=2", "data.time_scale", 2),
        ("data.signal_units.c=mg/L", "data.signal_units.c", "mg/L"),
        ("data.categorical={d: [2,10]}", "data.categorical", {"d": ["2", "10"]}),
        ("data.signals={1: c, 2: e}", "data.signal_levels", {1: "c", 2: "e"}),
        ("individuals.draws=10", "individuals.draws", 10),
        ("seed=7", "seed", 7),
    ],
)
def test_options_of_the_data_keep_their_texts_and_open_sections_take_keys(
    override: str, key: str, expected: object
) -> None:
    config = compose_config("fit_population", ["data=event_table", "data.path=t.csv", override])
    found = OmegaConf.select(config, key)
    assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == expected


@pytest.mark.parametrize(
    "argument", ["--cfg", "-m", "data=egfp", "individuals=choice([1],[2])", "training.steps=100", "~data.signal_units"]
)
def test_what_names_nothing_is_left_alone(argument: str) -> None:
    assert rewrite_overrides([argument]) == [argument]

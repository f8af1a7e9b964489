"""Tokens of an individual do not depend on how it is written down, and say what was recorded."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from dosed import regimens, written_out

from nlme_sbi.individual_model.dosing.doses import MODELLED_RATE
from nlme_sbi.limits import Limits
from nlme_sbi.networks.token_features import TokenFeatures
from nlme_sbi.networks.tokens import TokenKind, Tokens, last_before, tokens_of
from nlme_sbi.types import Censoring, Design, EventKind, Events


def equal(one: Tokens, other: Tokens) -> bool:
    return all(torch.equal(getattr(one, item.name), getattr(other, item.name)) for item in fields(Tokens))


def one_individual(kind: list[EventKind], time: list[float], **columns: list[float]) -> Events:
    """Boluses of 1 into compartment 1 but for what ``columns`` say."""
    count = len(time)
    number = {name: torch.tensor([columns.get(name, [0.0] * count)]) for name in ("rate", "interval")}
    whole = {name: torch.tensor([columns.get(name, [0] * count)]) for name in ("additional", "steady_state")}
    return Events(
        time=torch.tensor([time]),
        kind=torch.tensor([[int(code) for code in kind]]),
        amount=torch.tensor([columns.get("amount", [1.0] * count)]),
        compartment=torch.tensor([columns.get("compartment", [1] * count)]).long(),
        **number,
        **{name: column.long() for name, column in whole.items()},
    )


def test_additional_doses_are_what_the_same_doses_written_out_are(generator: torch.Generator) -> None:
    design = regimens(200, generator)
    assert design.events is not None
    assert int((design.events.additional > 0).sum()) > 50
    values = torch.randn(200, 6, 1, generator=generator)
    assert equal(tokens_of(values, design, takes_doses=True), tokens_of(values, written_out(design), takes_doses=True))


def test_padding_and_the_order_of_records_change_nothing(generator: torch.Generator) -> None:
    design = regimens(200, generator)
    values = torch.randn(200, 6, 1, generator=generator)
    # Two doses at one time, and two measurements of one signal at one time, in both orders.
    assert design.events is not None
    same = replace(design.events, time=design.events.time[:, :1].expand(-1, 3).clone())
    twice = design.times.clone()
    twice[:, 1] = twice[:, 0]
    design = replace(design, times=twice.cummax(1).values, events=same)
    expected = tokens_of(values, design, takes_doses=True)
    backwards = replace(same, **{item.name: getattr(same, item.name).flip(1) for item in fields(Events)[:-1]})
    swapped = [1, 0, 2, 3, 4, 5]
    other = replace(design, observed=design.observed[:, swapped], events=backwards)
    assert equal(expected, tokens_of(values[:, swapped], other, takes_doses=True))
    longer = Design(
        torch.cat((design.times, design.times[:, -1:].expand(-1, 3)), 1),
        torch.cat((design.observed, torch.zeros(200, 3, 1, dtype=torch.bool)), 1),
        events=design.events,
    )
    junk = torch.cat((values, torch.full((200, 3, 1), 7.0)), 1)
    assert equal(expected, tokens_of(junk, longer, takes_doses=True))


def test_a_dose_comes_before_a_measurement_of_its_time_unless_it_was_recorded_after_it() -> None:
    events = one_individual([EventKind.DOSE, EventKind.DOSE], [0.0, 1.0])
    design = Design(torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, 1, dtype=torch.bool), events=events)
    values = torch.tensor([[[5.0], [6.0]]])
    dose, measured = int(TokenKind.DOSE), int(TokenKind.MEASUREMENT)
    assert tokens_of(values, design, takes_doses=True).kind.tolist() == [[dose, measured, dose, measured]]
    after = replace(design, events=replace(events, follows=torch.tensor([[False, True]])))
    assert tokens_of(values, after, takes_doses=True).kind.tolist() == [[dose, measured, measured, dose]]
    assert tokens_of(values, design, takes_doses=False).kind.tolist() == [[measured, measured]]


def test_tokens_say_what_was_recorded() -> None:
    events = one_individual(
        [EventKind.DOSE, EventKind.RESET_DOSE, EventKind.NONE],
        [0.0, 2.0, 0.0],
        amount=[3.0, 4.0, 9.0],
        rate=[1.5, MODELLED_RATE, 0.0],
        compartment=[2, 1, 1],
        steady_state=[0, 1, 0],
        interval=[0.0, 12.0, 0.0],
    )
    limits = Limits(torch.tensor([[[-torch.inf], [1.0], [2.0]]]), torch.tensor([[[0.5], [2.0], [torch.inf]]]))
    design = Design(
        torch.tensor([[1.0, 3.0, 4.0]]), torch.ones(1, 3, 1, dtype=torch.bool), events=events, limits=limits
    )
    told = tokens_of(torch.tensor([[[0.1], [1.7], [1.9]]]), design, takes_doses=True)
    dose, reset, measured = int(TokenKind.DOSE), int(TokenKind.RESET), int(TokenKind.MEASUREMENT)
    assert told.kind.tolist() == [[dose, measured, reset, dose, measured, measured]]
    assert told.amount.tolist() == [[3.0, 0.0, 0.0, 4.0, 0.0, 0.0]]
    assert told.rate.tolist() == [[1.5, 0.0, 0.0, -1.0, 0.0, 0.0]]
    assert told.channel.tolist() == [[1, 0, 0, 0, 0, 0]]
    assert told.interval.tolist() == [[0.0, 0.0, 0.0, 12.0, 0.0, 0.0]]
    left, between, plain = int(Censoring.LEFT), int(Censoring.INTERVAL), int(Censoring.NONE)
    # 0.1 and 1.7 lie within their limits and are not told; 1.9 lies below the one above which nothing is.
    assert told.censoring.tolist() == [[0, left, 0, 0, between, plain]]
    torch.testing.assert_close(told.value, torch.tensor([[0.0, 0.5, 0.0, 0.0, 2.0, 1.9]]))
    torch.testing.assert_close(told.other, torch.tensor([[0.0, 0.5, 0.0, 0.0, 1.0, 1.9]]))


def test_the_last_one_before_is_found_by_a_loop_too(generator: torch.Generator) -> None:
    mark = torch.rand(20, 9, generator=generator) < 0.4
    column = torch.randn(20, 9, generator=generator)
    known, (found,) = last_before(mark, column)
    for row in range(20):
        for place in range(9):
            earlier = [other for other in range(place) if mark[row, other]]
            assert bool(known[row, place]) == bool(earlier)
            assert float(found[row, place]) == (float(column[row, earlier[-1]]) if earlier else 0.0)


def test_what_was_given_is_forgotten_at_a_reset() -> None:
    events = one_individual([EventKind.DOSE, EventKind.RESET, EventKind.DOSE], [0.0, 1.0, 2.0], amount=[8.0, 0.0, 2.0])
    design = Design(torch.tensor([[0.5, 1.5, 2.5]]), torch.ones(1, 3, 1, dtype=torch.bool), events=events)
    tokens = tokens_of(torch.ones(1, 3, 1), design, takes_doses=True)
    features = TokenFeatures(1, takes_doses=True, compartments=1, censored=False)
    total = features._of_doses(tokens)[-1]
    measured = tokens.of_kind(TokenKind.MEASUREMENT)
    assert total.applies[measured].tolist() == [True, False, True]
    torch.testing.assert_close(total.number[measured][[0, 2]].exp(), torch.tensor([8.0, 2.0]))


def test_doses_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="needs doses, but the design has none"):
        tokens_of(torch.zeros(1, 2, 1), Design.regular(torch.arange(2.0), 1), takes_doses=True)

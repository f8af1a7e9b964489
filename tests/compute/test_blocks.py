"""Blocks side by side give what one after the other gives, and leave torch's settings alone."""

from __future__ import annotations

import threading

import pytest
import torch

from nlme_sbi.compute.blocks import over_blocks, torch_threads

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_results_come_in_order_from_other_threads_with_one_core_each() -> None:
    where = set()

    def square(number: int) -> tuple[int, int]:
        where.add(threading.current_thread().name)
        return number**2, torch.get_num_threads()

    assert over_blocks(square, range(50), CPU) == [(number**2, 1) for number in range(50)]
    assert threading.main_thread().name not in where
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_single_block_has_one_core_too() -> None:
    assert over_blocks(lambda _: torch.get_num_threads(), [0], CPU) == [1]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_gradients_are_recorded_where_the_caller_records_them() -> None:
    def recording(_: int) -> bool:
        return torch.is_grad_enabled()

    with torch.no_grad():
        assert over_blocks(recording, range(3), CPU) == [False] * 3
    with torch.enable_grad():
        assert over_blocks(recording, range(3), CPU) == [True] * 3


@pytest.mark.usefixtures("two_threads")
def test_blocks_within_a_block_start_no_threads_of_their_own() -> None:
    def names(_: int) -> set[str]:
        return {threading.current_thread().name, *over_blocks(lambda _: threading.current_thread().name, range(4), CPU)}

    assert all(len(found) == 1 for found in over_blocks(names, range(4), CPU))


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_block_reaches_the_caller_and_threads_are_as_before() -> None:
    def fails_at_three(number: int) -> int:
        if number == 3:
            raise ValueError("block 3")
        return number

    with pytest.raises(ValueError, match="block 3"):
        over_blocks(fails_at_three, range(9), CPU)
    assert torch.get_num_threads() == 2


def test_with_one_core_the_caller_does_the_work() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert over_blocks(lambda _: threading.current_thread().name, range(3), CPU) == ["MainThread"] * 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_are_as_before_after_a_block_with_others() -> None:
    def fails_inside() -> None:
        with torch_threads(1):
            assert torch.get_num_threads() == 1
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails_inside()
    assert torch.get_num_threads() == 2

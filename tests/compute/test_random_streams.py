"""Streams of random numbers: one number for each purpose, and nobody uses a number of their own."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import torch

import nlme_sbi
from nlme_sbi.compute.random_streams import Stream, seeded

PACKAGE = Path(nlme_sbi.__file__).parent


def test_no_two_streams_share_a_number() -> None:
    numbers = [int(stream) for stream in Stream.__members__.values()]
    assert len(set(numbers)) == len(numbers)
    assert all(member.name == name for name, member in Stream.__members__.items())  # an alias has another's name


def test_other_streams_of_a_seed_are_other_numbers() -> None:
    first = {float(torch.rand(1, generator=seeded("cpu", 0, stream))) for stream in Stream}
    assert len(first) == len(Stream)


def test_a_stream_is_its_number() -> None:
    state = np.random.SeedSequence((7, 10, 3)).generate_state(1, dtype=np.uint64)[0]
    assert seeded("cpu", 7, Stream.FIT_DRAWS, 3).initial_seed() == int(state) >> 1


def test_generators_are_made_of_named_streams() -> None:
    """After device and seed, a call names a stream: a bare number there could be somebody else's."""
    wrong, seen = [], 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "seeded"):
                continue
            seen += 1
            after = node.args[2:] or [one for one in node.args[1:] if isinstance(one, ast.Starred)]
            purpose = after[0] if after else None
            while isinstance(purpose, ast.Starred):  # handed on by a method whose callers name it
                purpose = purpose.value
            named = isinstance(purpose, ast.Attribute) and getattr(purpose.value, "id", "") == "Stream"
            if not (named or isinstance(purpose, ast.Name)):
                wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert seen > 10
    assert wrong == []

"""Headers of ``.npy`` files that are no headers: a sentence, whatever Python's own parser makes of them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from nlme_sbi.runs import load_array

GOOD = "{'descr': '<f8', 'fortran_order': False, 'shape': (8,), }"
SHAPE = GOOD.replace("(8,)", "%s")


@pytest.mark.parametrize(
    "header",
    [
        pytest.param("-" * 9000 + "1", id="minus signs without end"),
        pytest.param("(" * 5000 + ")" * 5000, id="nested"),
        pytest.param("{[]: 1}", id="a list as a key"),
        pytest.param("{1, 2}", id="a set"),
        pytest.param("", id="empty"),
        pytest.param(SHAPE % "(9**9**9,)", id="a power"),
        pytest.param(SHAPE % "(0,)*10**9", id="a product"),
        pytest.param(SHAPE % ("9" * 5000), id="a number of 5000 digits"),
        pytest.param(SHAPE % "(8.0,)", id="a length that is no integer"),
        pytest.param(SHAPE % "(True,)", id="a length that is true"),
        pytest.param(SHAPE % "__import__('os').getcwd()", id="a call"),
        pytest.param(GOOD.replace("<f8", "|O"), id="objects"),
        pytest.param(GOOD.replace("<f8", "|V99999999999"), id="a type of gigabytes"),
        pytest.param(GOOD.replace("False", "5"), id="an order that is none"),
    ],
)
@pytest.mark.parametrize("version", [b"\x01\x00", b"\x02\x00"])
def test_a_header_that_is_none_is_a_sentence(tmp_path: Path, header: str, version: bytes) -> None:
    path = tmp_path / "values.npy"
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header))
    path.write_bytes(b"\x93NUMPY" + version + length + header.encode() + b"\0" * 64)
    with pytest.raises(ValueError, match=r"values\.npy .*Run the stage that wrote it again with fresh=true"):
        load_array(path)


def test_the_header_that_the_others_spoil_is_read(tmp_path: Path) -> None:
    path = tmp_path / "values.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(GOOD)) + GOOD.encode() + b"\0" * 64)
    assert load_array(path).tolist() == [0.0] * 8

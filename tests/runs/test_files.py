"""A file is either the old one or the whole new one, and nothing that is read can run code."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nlme_sbi.runs import load_array, load_json, save_array, save_json, sha256_of_file, sha256_of_plain
from nlme_sbi.runs.files import plain, write_atomically


def test_a_failing_writer_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")

    def fail(file):
        file.write(b"half of the new")
        raise RuntimeError("the power is gone")

    with pytest.raises(RuntimeError, match="power"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["table.csv"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EACCES, "you have no permission"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "nput/output error"),
    ],
)
def test_an_error_of_the_disk_becomes_a_sentence(tmp_path, monkeypatch, code, words) -> None:
    def full(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("nlme_sbi.runs.files.os.fsync", full)
    with pytest.raises(OSError, match=words) as refusal:
        save_array(tmp_path / "phi.npy", np.zeros(3))
    assert "phi.npy" in str(refusal.value)
    assert "run the same command again" in str(refusal.value)
    assert os.listdir(tmp_path) == []


def test_a_device_that_is_full_becomes_a_sentence() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    from nlme_sbi.runs.files import _write_array

    # Unbuffered, so that the refusal comes where the array is written and not where the file is closed.
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "wb", buffering=0) as file:
        _write_array(file, np.zeros(10))


def test_a_directory_that_cannot_be_made_becomes_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file where a directory must be")
    with pytest.raises(OSError, match="could not be written"):
        save_json(tmp_path / "outputs" / "x.json", {})


KINDS = st.sampled_from([np.float32, np.float64, np.int64, np.bool_, np.uint8])


@pytest.mark.slow
@given(hnp.arrays(dtype=KINDS, shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0)))
def test_arrays_come_back_as_they_were(tmp_path_factory, array) -> None:
    path = tmp_path_factory.mktemp("arrays") / "array.npy"
    save_array(path, array)
    # NumPy's own reader is the oracle for the bytes; ours must then agree, mapped or not.
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), array)
    for mmap in (True, False):
        found = load_array(path, mmap=mmap)
        assert found.dtype == array.dtype
        assert found.shape == array.shape
        np.testing.assert_array_equal(found, array)


def test_tensors_and_strided_arrays_are_stored_in_order(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    save_array(tmp_path / "t.npy", tensor)
    np.testing.assert_array_equal(load_array(tmp_path / "t.npy"), tensor.numpy())
    expanded = torch.tensor([[1.0, 2.0]]).expand(5, 2)
    save_array(tmp_path / "e.npy", expanded)
    np.testing.assert_array_equal(load_array(tmp_path / "e.npy"), expanded.numpy())


def test_numpys_own_files_are_read_too(tmp_path: Path) -> None:
    np.save(tmp_path / "fortran.npy", np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    np.testing.assert_array_equal(load_array(tmp_path / "fortran.npy"), np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("keep", [0, 4, 9, 60, 127, 128, 131, 200])
def test_a_truncated_array_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "values.npy"
    save_array(path, np.arange(20.0))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"values\.npy is damaged.*fresh=true"):
        load_array(path)


def test_what_is_not_an_array_is_refused(tmp_path: Path) -> None:
    longer, text, zipped = tmp_path / "longer.npy", tmp_path / "text.npy", tmp_path / "zip.npy"
    save_array(longer, np.arange(20.0))
    longer.write_bytes(longer.read_bytes() + b"0")
    text.write_text("time,value\n1,2\n")
    with zipped.open("wb") as file:
        np.savez(file, a=np.zeros(2))
    for path in (longer, text, zipped):
        with pytest.raises(ValueError, match=f"{path.name} is damaged"):
            load_array(path)
    with pytest.raises(ValueError, match=r"gone\.npy is missing"):
        load_array(tmp_path / "gone.npy")


class _Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.environ["NLME_SBI_TEST_BOMB"],))


def test_an_array_of_objects_runs_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NLME_SBI_TEST_BOMB", str(tmp_path / "exploded"))
    path = tmp_path / "bomb.npy"
    np.save(path, np.array([_Bomb()], dtype=object), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ValueError, match="Python objects, which could run code"):
        load_array(path)
    with pytest.raises(ValueError, match="damaged"):
        load_array(tmp_path / "pickle.npy")
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(TypeError, match="Python objects cannot be stored"):
        save_array(tmp_path / "x.npy", np.array([object()]))


def test_plain_data_is_named_where_it_is_not_plain() -> None:
    assert plain({"a": (1, np.float32(2.0)), 3: torch.tensor([1, 2]), "p": Path("x")}) == {
        "a": [1, 2.0],
        "3": [1, 2],
        "p": "x",
    }
    with pytest.raises(TypeError, match=r"training\.steps\[1\] cannot be written: object"):
        plain({"training": {"steps": [1, object()]}})


def test_json_is_strict_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    save_json(path, {"aic": float("nan"), "omega": [1.5, float("inf")], "name": "σ"})
    # A parser that knows no NaN is the oracle.
    found = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert found == {"aic": None, "omega": [1.5, None], "name": "σ"} == load_json(path)
    path.write_text(path.read_text()[:-5])
    with pytest.raises(ValueError, match="damaged: it is not JSON"):
        load_json(path)
    with pytest.raises(ValueError, match="missing"):
        load_json(tmp_path / "gone.json")


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # Published test vector of SHA-256 (FIPS 180-2, B.1).
    published = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of_file(tmp_path / "a") == published
    assert sha256_of_plain("abc") == hashlib.sha256(b'"abc"').hexdigest()
    assert sha256_of_plain({"a": 1, "b": [1, 2]}) == sha256_of_plain({"b": (1, 2), "a": 1})
    assert sha256_of_plain({"a": 1}) != sha256_of_plain({"a": 2})

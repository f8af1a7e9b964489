"""A config section builds exactly what it names, refuses what does not fit in words, and cannot run foreign code."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float
from omegaconf import OmegaConf
from torch import Tensor

from nlme_sbi.config.conversion import convert
from nlme_sbi.config.instantiate import instantiate, locate
from nlme_sbi.parameters import Parameter

HERE = __name__


@dataclass(frozen=True)
class Optimiser:
    rate: float
    kind: Literal["adam", "sgd"] = "adam"

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate must be positive; got {self.rate}.")


@dataclass(frozen=True)
class Settings:
    steps: int
    optimiser: Optimiser
    widths: tuple[int, ...] = (64, 64)
    limits: tuple[float, float] | None = None
    path: Path | None = None
    resume: bool = False
    names: list[str] = field(default_factory=list)
    scales: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LongerSettings(Settings):
    patience: int = 3


class Anything:
    def __init__(self, first, *, tensor: Float[Tensor, " D"] | None = None, **options: Any) -> None:
        self.first, self.tensor, self.options = first, tensor, options


@runtime_checkable
class Named(Protocol):
    names: tuple[str, ...]


def takes_named(source: Named) -> Named:
    return source


SECTION = {
    "_target_": f"{HERE}.Settings",
    "steps": 100,
    "optimiser": {"_target_": f"{HERE}.Optimiser", "rate": 1},
}


def build(changes: dict | None = None, **options):
    return instantiate({**SECTION, **(changes or {})}, trust=[HERE], where="training", **options)


def test_nested_sections_are_built_and_converted() -> None:
    found = build({"widths": [32, 16], "limits": [0, 1], "path": "a/b", "names": ["x"], "scales": {"y": 2}})
    assert found == Settings(
        steps=100,
        optimiser=Optimiser(rate=1.0),
        widths=(32, 16),
        limits=(0.0, 1.0),
        path=Path("a/b"),
        names=["x"],
        scales={"y": 2.0},
    )
    assert isinstance(found.optimiser.rate, float)


def test_lists_dicts_and_values_without_a_target_pass() -> None:
    optimiser = SECTION["optimiser"]
    found = instantiate({"a": [optimiser, 1], "b": None}, trust=[HERE])
    assert found == {"a": [Optimiser(1.0), 1], "b": None}
    assert instantiate("text") == "text"


def test_an_omegaconf_node_is_resolved() -> None:
    cfg = OmegaConf.create({"rate": 0.5, "o": {"_target_": f"{HERE}.Optimiser", "rate": "${rate}"}})
    assert instantiate(cfg.o, trust=[HERE]) == Optimiser(0.5)
    broken = OmegaConf.create({"o": {"_target_": f"{HERE}.Optimiser", "rate": "${gone}"}})
    with pytest.raises(ValueError, match=r"optimiser: Interpolation key 'gone' not found"):
        instantiate(broken.o, trust=[HERE], where="optimiser")


def test_objects_that_no_config_can_hold_are_given() -> None:
    found = build({"optimiser": None}, given={"optimiser": Optimiser(2.0)})
    assert found.optimiser == Optimiser(2.0)


def test_inherited_dataclass_fields_are_checked_too() -> None:
    with pytest.raises(ValueError, match=r"training\.steps must be an integer"):
        build({"_target_": f"{HERE}.LongerSettings", "steps": "many"})
    assert build({"_target_": f"{HERE}.LongerSettings", "patience": 4.0}).patience == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stepz": 3}, r"training\.stepz is not an option of Settings; options: steps, .* Did you mean steps\?"),
        ({"zzz": 3}, r"training\.zzz is not an option of Settings; options: [a-z, ]+\.$"),
        ({"steps": "abc"}, r"^training\.steps must be an integer; got 'abc' \(text\)\.$"),
        ({"steps": 1.5}, r"training\.steps must be an integer; got 1\.5 \(number\)"),
        ({"steps": True}, r"training\.steps must be an integer; got true"),
        ({"steps": None}, r"training\.steps must be an integer; got null"),
        ({"steps": "???"}, r"^training\.steps has no value; give it as training\.steps=\.\.\.$"),
        ({"resume": "yes"}, r"training\.resume must be true or false; got 'yes' \(text\)"),
        ({"widths": 3}, r"training\.widths must be a list \(an integer each\); got 3 \(integer\)"),
        ({"widths": "ab"}, r"training\.widths must be a list"),
        ({"widths": [1, "b"]}, r"training\.widths\[1\] must be an integer; got 'b'"),
        ({"limits": [1]}, r"training\.limits must be a list of 2 entries; got \[1\] \(list\)"),
        ({"limits": [1, "x"]}, r"training\.limits\[1\] must be a number; got 'x'"),
        ({"path": 3}, r"training\.path must be a path; got 3"),
        ({"scales": [1]}, r"training\.scales must be a section of keys and values; got \[1\] \(list\)"),
        ({"scales": {"a": "b"}}, r"training\.scales\.a must be a number"),
        ({"optimiser": {"rate": 1}}, r"training\.optimiser must be an Optimiser, a section with _target_; got"),
        ({"optimiser": "adam"}, r"training\.optimiser must be an Optimiser, a section with _target_; got 'adam'"),
        (
            {"optimiser": {"_target_": f"{HERE}.Optimiser", "rate": 1, "kind": "adm"}},
            r"training\.optimiser\.kind must be one of adam, sgd; got 'adm' \(text\)\. Did you mean adam\?$",
        ),
        ({"optimiser": {"_target_": f"{HERE}.Optimiser"}}, r"training\.optimiser\.rate has no value, and Optimiser ne"),
        ({"optimiser": {"_target_": f"{HERE}.Optimiser", "rate": -1}}, r"^training\.optimiser: rate must be positive"),
    ],
)
def test_what_does_not_fit_is_one_sentence_with_its_place(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(changes)


def test_open_ended_and_unannotated_callables() -> None:
    found = instantiate({"_target_": f"{HERE}.Anything", "first": "x", "tensor": [1.0], "more": 2}, trust=[HERE])
    assert (found.first, found.tensor, found.options) == ("x", [1.0], {"more": 2})


def test_protocols_are_checked_by_what_they_ask_for() -> None:
    names = {"_target_": f"{HERE}.Settings", "steps": 1, "optimiser": {"_target_": f"{HERE}.Optimiser", "rate": 1}}
    section = {"_target_": f"{HERE}.takes_named", "source": names}
    assert instantiate(section, trust=[HERE]).names == []
    with pytest.raises(ValueError, match="source must be a Named, a section with _target_"):
        instantiate(section | {"source": names["optimiser"]}, trust=[HERE])


@pytest.mark.slow
@given(st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.none(), st.lists(st.integers())))
def test_any_value_is_converted_to_the_type_or_refused(value) -> None:
    for hint, kind in ((int, int), (float, float), (bool, bool), (str, str), (tuple[int, ...], tuple)):
        try:
            found = convert(value, hint, "x")
        except ValueError as refusal:
            assert str(refusal).startswith("x")  # noqa: PT017
        else:
            assert type(found) is kind
            assert found == (tuple(value) if kind is tuple else value) or value != value


def test_more_annotations() -> None:
    assert convert(1, Annotated[float, "positive"], "x") == 1.0
    assert convert(1, float | str, "x") == 1.0
    assert type(convert(1, float | int, "x")) is int
    assert convert(None, str | None, "x") is None
    assert convert([1, 2], Sequence[float], "x") == (1.0, 2.0)
    assert convert({"a": 1}, dict[str, Any], "x") == {"a": 1}
    with pytest.raises(ValueError, match="x must be a number or text; got null"):
        convert(None, float | str, "x")
    with pytest.raises(ValueError, match="x must be a function; got 3"):
        convert(3, __import__("typing").Callable[[int], int], "x")


def test_our_own_classes_are_targets() -> None:
    section = {"_target_": "nlme_sbi.parameters.Parameter", "name": "CL", "unit": "L/h", "transform": "log"}
    assert instantiate(section) == Parameter("CL", "L/h")
    with pytest.raises(ValueError, match=r"parameter\.transform must be one of log, identity, logit; got 'lg'"):
        instantiate(section | {"transform": "lg"}, where="parameter")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "nlme_sbi.runs.provenance.subprocess.Popen",
        "nlme_sbi.runs.directory.os.system",
        "nlme_sbi.runs.files.os.remove",
        "nlme_sbi.config.instantiate.importlib.import_module",
        "nlme_sbi.types.torch.load",
        "nlme_sbifake.Model",
        "simulators_of_mine.Model",
    ],
)
def test_foreign_code_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=r"simulator\._target_: .* is neither part of nlme_sbi nor trusted"):
        instantiate({"_target_": target, "command": "true"}, where="simulator")


@pytest.mark.parametrize("target", ["nlme_sbi.runs.save_json", "nlme_sbi.runs.RunDirectory.finish"])
def test_our_functions_that_act_are_refused(target: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a function or a method|something inside RunDirectory"):
        instantiate({"_target_": target, "path": str(tmp_path / "x"), "value": 1})
    assert not list(tmp_path.iterdir())


def test_an_untrusted_module_is_not_even_imported(tmp_path, monkeypatch) -> None:
    (tmp_path / "evil_model.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"pass trust=\[evil_model\]"):
        instantiate({"_target_": "evil_model.Model"})
    assert not (tmp_path / "ran").exists()
    assert "evil_model" not in sys.modules


def test_a_trusted_module_is_used_and_its_own_errors_are_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_models.py").write_text("import os\nclass Model:\n    pass\n")
    (tmp_path / "my_broken.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "my_typo.py").write_text("class Model\n")
    monkeypatch.syspath_prepend(tmp_path)
    trust = ["my_models", "my_broken", "my_typo"]
    assert type(instantiate({"_target_": "my_models.Model"}, trust=trust)).__name__ == "Model"
    with pytest.raises(ValueError, match="nor trusted"):  # a trusted module does not pass its imports on
        instantiate({"_target_": "my_models.os.system"}, trust=trust)
    with pytest.raises(ValueError, match="a_package_that_is_not_there is not installed"):
        instantiate({"_target_": "my_broken.Model"}, trust=trust)
    with pytest.raises(ValueError, match="importing my_typo failed"):
        instantiate({"_target_": "my_typo.Model"}, trust=trust)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nlme_sbi.parameters.Paramter", r"has no Paramter\. Did you mean Parameter\?"),
        ("nlme_sbi.parametrs.Parameter", r"there is no module nlme_sbi\.parametrs\. Did you mean parameters\?"),
        ("nlme_sbi.parameters", "is a module; name a class in it"),
        ("nlme_sbi.parameters.Transform", "neither a class nor a function|neither part"),
        ("nlme_sbi.__version__", "is private; name a public class"),
        ("a b", "must be a dotted path"),
        (3, "must be a dotted path"),
    ],
)
def test_a_misspelt_target_gets_the_nearest_name(target, words) -> None:
    with pytest.raises(ValueError, match=words):
        locate(target)


def test_a_module_that_is_not_found_says_where_python_looks() -> None:
    with pytest.raises(ValueError, match=r"there is no module nowhere_to_be_found where Python looks"):
        locate("nowhere_to_be_found.Model", trust=["nowhere_to_be_found"])


def test_trust_is_a_list() -> None:
    with pytest.raises(ValueError, match=r"trust must be a list, for example trust=\[mymodule\]"):
        instantiate({}, trust="mymodule")

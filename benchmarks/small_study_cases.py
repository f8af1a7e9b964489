"""The studies of the benchmark small_studies: two public data sets, a case that once failed, and simulated studies.

NumPy alone, so that what is simulated, and what is right, does not rest on the package. Simulated studies have 4 to 12
individuals with few or many measurements each, one of four models, and 0 to 3 parameters without variability.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "oracles"))
from curves import BIEXPONENTIAL, EMAX, LOGISTIC, NORMAL_LOGISTIC, ORAL, CurveModel, Study
from population_quadrature import Population

SIZES = (4, 5, 6, 8, 12)
MODELS: Mapping[str, CurveModel] = {
    "oral": ORAL,
    "biexponential": BIEXPONENTIAL,
    "logistic": LOGISTIC,
    "emax": EMAX,
    "orange": NORMAL_LOGISTIC,
}
Person = tuple[tuple[float, ...], tuple[float, ...], float]


@dataclass(frozen=True)
class Case:
    """One data set with the population model to fit.

    Args:
        name: a word that files are named by.
        model: key of ``MODELS``.
        varying: parameters that vary between individuals; the others are constants.
        people: times, values and dose of each individual.
        means: a guess of all means, unconstrained: the truth where the data are simulated.
        log_sds: the same of the varying parameters' log SDs.
    """

    name: str
    model: str
    varying: tuple[str, ...]
    people: tuple[Person, ...]
    means: Mapping[str, float]
    log_sds: Mapping[str, float]

    @property
    def constant(self) -> tuple[str, ...]:
        return tuple(name for name in MODELS[self.model].names if name not in self.varying)

    def population(self) -> Population:
        names = MODELS[self.model].names
        places = tuple(names.index(name) for name in self.varying)
        return Population(MODELS[self.model], Study.of(self.people), places)

    def table(self) -> str:
        """The data as CSV: an event table where there are doses, a long table elsewhere."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        dosed = self.model == "oral"
        writer.writerow(("ID", "TIME", "DV", "AMT", "EVID") if dosed else ("id", "time", "value"))
        for number, (times, values, dose) in enumerate(self.people, 1):
            if dosed:
                writer.writerow((number, 0, ".", repr(dose), 1))
            rows = zip(times, values, strict=True)
            writer.writerows((number, repr(t), repr(y), *((".", 0) if dosed else ())) for t, y in rows)
        return text.getvalue()


def _people(times: Sequence[float], rows: Sequence[Sequence[float]], dose: float = 0.0) -> tuple[Person, ...]:
    return tuple((tuple(map(float, times)), tuple(map(float, row)), dose) for row in rows)


# R's Orange: circumference (mm) of the trunks of five trees at seven ages (days).
_ORANGE = _people(
    (118, 484, 664, 1004, 1231, 1372, 1582),
    (
        (30, 58, 87, 115, 120, 142, 145),
        (33, 69, 111, 156, 172, 203, 203),
        (30, 51, 75, 108, 115, 139, 140),
        (32, 62, 112, 167, 179, 209, 214),
        (30, 49, 81, 125, 142, 174, 177),
    ),
)
ORANGE = Case(
    "orange",
    "orange",
    ("Asym",),
    _ORANGE,
    {"Asym": 192.0, "xmid": 6.59, "scal": 5.85, "sigma": 2.06},
    {"Asym": 3.45},
)

# R's Indometh: plasma concentration (mg/L) of six people at eleven times (h) after an intravenous bolus.
_INDOMETH = _people(
    (0.25, 0.5, 0.75, 1, 1.25, 2, 3, 4, 5, 6, 8),
    (
        (1.5, 0.94, 0.78, 0.48, 0.37, 0.19, 0.12, 0.11, 0.08, 0.07, 0.05),
        (2.03, 1.63, 0.71, 0.7, 0.64, 0.36, 0.32, 0.2, 0.25, 0.12, 0.08),
        (2.72, 1.49, 1.16, 0.8, 0.8, 0.39, 0.22, 0.12, 0.11, 0.08, 0.08),
        (1.85, 1.39, 1.02, 0.89, 0.59, 0.4, 0.16, 0.11, 0.1, 0.07, 0.07),
        (2.05, 1.04, 0.81, 0.39, 0.3, 0.23, 0.13, 0.11, 0.08, 0.1, 0.06),
        (2.31, 1.44, 1.03, 0.84, 0.64, 0.42, 0.24, 0.17, 0.13, 0.1, 0.09),
    ),
)
_INDOMETH_GUESS = {"A1": 0.94, "l1": 0.52, "A2": -1.32, "l2": -1.77, "cv": -1.9}
INDOMETH_RANDOM = Case(
    "indometh_a1_random",
    "biexponential",
    ("A1", "l1", "A2"),
    _INDOMETH,
    _INDOMETH_GUESS,
    {"A1": -2.0, "l1": -1.6, "A2": -1.3},
)
INDOMETH_CONSTANT = Case(
    "indometh_a1_constant",
    "biexponential",
    ("l1", "A2"),
    _INDOMETH,
    _INDOMETH_GUESS,
    {"l1": -1.6, "A2": -1.3},
)

# Eight simulated people after 300 mg by mouth, whose fits once began where every likelihood was 0.
BASE8 = Case(
    "base8",
    "oral",
    ("ka", "CL", "V"),
    _people(
        (0.25, 0.5, 1, 2, 4, 8, 12, 24),
        (
            (2.337, 5.050, 6.710, 6.974, 6.404, 4.309, 2.921, 0.866),
            (3.185, 5.751, 7.655, 8.333, 7.220, 5.467, 4.116, 1.546),
            (6.492, 11.103, 13.795, 13.030, 8.601, 4.357, 1.002, -0.050),
            (3.441, 4.861, 6.934, 6.902, 5.316, 3.825, 2.863, 0.639),
            (2.612, 4.941, 7.119, 7.881, 6.579, 5.153, 3.207, 1.525),
            (1.816, 3.866, 6.047, 7.417, 6.202, 3.862, 2.848, 0.548),
            (4.650, 7.916, 10.089, 10.456, 8.580, 4.485, 2.672, 0.202),
            (2.671, 4.206, 5.744, 7.608, 8.057, 5.659, 3.428, 1.175),
        ),
        dose=300.0,
    ),
    {"ka": 0.45, "CL": 1.14, "V": 3.35, "sigma": -1.12},
    {"ka": -1.4, "CL": -2.0, "V": -1.35},
)


@dataclass(frozen=True)
class _Recipe:
    """How studies of a model are made.

    Args:
        means: mean and SD that every true mean is drawn from.
        sds: lowest and highest true SD of each parameter, log-uniform.
        choices: sets of varying parameters with their chances.
        rich: nominal times of a rich design, which individuals keep to within 5%.
        strata: a sparse design has one time in each.
    """

    means: Mapping[str, tuple[float, float]]
    sds: Mapping[str, tuple[float, float]]
    choices: Mapping[tuple[str, ...], float]
    rich: tuple[float, ...]
    strata: tuple[tuple[float, float], ...]


_RECIPES = {
    "oral": _Recipe(
        {"ka": (0.3, 0.4), "CL": (1.0, 0.4), "V": (3.4, 0.3), "sigma": (-1.0, 0.4)},
        {"ka": (0.1, 0.7), "CL": (0.1, 0.5), "V": (0.1, 0.4), "sigma": (0.15, 0.4)},
        {
            ("ka", "CL", "V"): 0.4,
            ("CL", "V"): 0.2,
            ("ka", "V"): 0.1,
            ("ka", "CL"): 0.05,
            ("CL",): 0.1,
            ("V",): 0.05,
            ("ka", "CL", "V", "sigma"): 0.1,
        },
        (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 24.0),
        ((0.25, 1.5), (1.5, 4.0), (4.0, 9.0), (9.0, 14.0), (16.0, 24.0)),
    ),
    "biexponential": _Recipe(
        {"A1": (0.9, 0.4), "l1": (0.6, 0.3), "A2": (-0.9, 0.4), "l2": (-1.8, 0.3), "cv": (-2.0, 0.3)},
        {"A1": (0.1, 0.6), "l1": (0.1, 0.5), "A2": (0.1, 0.6), "l2": (0.1, 0.4)},
        {
            ("A1", "l1", "A2"): 0.3,
            ("l1", "A2"): 0.2,
            ("A1", "l1"): 0.15,
            ("A1", "A2"): 0.15,
            ("A1", "l1", "l2"): 0.1,
            ("A1", "l1", "A2", "l2"): 0.1,
        },
        (0.25, 0.5, 0.75, 1.0, 1.25, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0),
        ((0.1, 0.4), (0.5, 1.0), (1.0, 2.0), (2.5, 4.0), (4.0, 6.0), (6.0, 9.0)),
    ),
    "logistic": _Recipe(
        {"Asym": (5.2, 0.2), "xmid": (6.4, 0.2), "scal": (5.6, 0.2), "sigma": (2.0, 0.4)},
        {"Asym": (0.1, 0.4), "xmid": (0.05, 0.3), "scal": (0.05, 0.3), "sigma": (0.15, 0.4)},
        {
            ("Asym",): 0.2,
            ("Asym", "xmid"): 0.3,
            ("Asym", "xmid", "scal"): 0.3,
            ("xmid", "scal"): 0.1,
            ("Asym", "xmid", "scal", "sigma"): 0.1,
        },
        (120.0, 300.0, 480.0, 660.0, 840.0, 1020.0, 1200.0, 1380.0, 1560.0),
        ((100.0, 350.0), (400.0, 650.0), (650.0, 900.0), (900.0, 1200.0), (1250.0, 1600.0)),
    ),
    "emax": _Recipe(
        {"E0": (2.0, 0.3), "Emax": (4.0, 0.3), "EC50": (2.3, 0.4), "sd": (0.3, 0.3), "cv": (-2.2, 0.3)},
        {"E0": (0.1, 0.5), "Emax": (0.1, 0.5), "EC50": (0.15, 0.7)},
        {("E0", "Emax", "EC50"): 0.5, ("Emax", "EC50"): 0.3, ("E0", "Emax"): 0.2},
        (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0),
        ((0.0, 0.0), (0.2, 1.0), (2.0, 8.0), (8.0, 20.0), (20.0, 60.0), (80.0, 200.0)),
    ),
}
SIMULATED = tuple(_RECIPES)


def simulated_case(number: int) -> Case:
    """The study of this number: model, size, design, truth and noise all follow from it."""
    random = np.random.default_rng([20240229, number])
    key = SIMULATED[number % len(SIMULATED)]
    recipe, model = _RECIPES[key], MODELS[key]
    sets, chances = list(recipe.choices), np.array(list(recipe.choices.values()))
    varying = sets[random.choice(len(sets), p=chances / chances.sum())]
    size = int(random.choice(SIZES))
    # A residual SD of one's own, or four random effects, from five measurements would be no study but a riddle.
    rich = bool(random.random() < 0.5) or len(varying) == 4
    means = {name: float(random.normal(*law)) for name, law in recipe.means.items()}
    log_sds = {name: float(random.uniform(*np.log(recipe.sds[name]))) for name in varying}
    people = []
    for _ in range(size):
        phi = np.array([random.normal(means[name], np.exp(log_sds.get(name, -np.inf))) for name in model.names])
        if rich:
            times = np.array(recipe.rich) * random.uniform(0.95, 1.05, len(recipe.rich))
        else:
            strata = [recipe.strata[place] for place in _strata(len(recipe.strata), random)]
            times = np.array([random.uniform(low, high) for low, high in strata])
        times = np.round(times, 3)
        dose = float(random.choice((100.0, 200.0, 320.0, 500.0))) if key == "oral" else 0.0
        curve = model.curve(phi, times, np.array(dose))
        noisy = curve + np.exp(model.noise.log_sd(phi, curve)) * random.standard_normal(len(times))
        people.append((tuple(map(float, times)), tuple(float(f"{value:.5g}") for value in noisy), dose))
    return Case(f"study_{number:03d}", key, varying, tuple(people), means, log_sds)


def _strata(count: int, random: np.random.Generator) -> Sequence[int]:
    """All strata, or all but one of those in the middle: sparse people differ in how many samples they gave."""
    if random.random() < 0.6:
        return range(count)
    left_out = int(random.integers(1, count - 1))
    return [place for place in range(count) if place != left_out]

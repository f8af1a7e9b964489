"""The bundled data are what their SOURCE.md says: the published study, and cells made from a known law."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from scipy.integrate import solve_ivp

from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.types import Observations

ROOT = Path(__file__).parents[2]
THEOPHYLLINE = ROOT / "data" / "theophylline"
CELLS = ROOT / "data" / "mrna_two_rate_cells"
SIMULATED = ROOT / "data" / "double_receiver_simulated"
SHARED = ROOT.parent / "shared" / "data" / "theophylline"
CONFIGS = sorted(path for path in (ROOT / "conf" / "data").glob("*.yaml") if path.stem != "none")
FILES = {
    "event_table": THEOPHYLLINE / "theophylline.csv",
    "wide_sheet": CELLS / "cells.csv",
    "egfp": CELLS / "cells.csv",
}


def script(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"make_{folder.name}", folder / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("path", "digest"),
    [
        (THEOPHYLLINE / "theophylline.csv", "f21e05a6349fba8da637b98dab2b8c2a3301006879df43ce0941e1186b171efd"),
        (CELLS / "cells.csv", "1dcdf810648e807cd2d9084852e72eeb21b78181da92458ba16d65166c118819"),
        (CELLS / "truth.csv", "21d9791ede27aa3c84a1b0de81b45b255a51b6b49e3cb1d2d66babb10682b563"),
        (CELLS / "law.csv", "3416318da5fdfedc609dcef45ab16e5f17eb2dc1ddf004a23a183a8244dbe93b"),
    ],
)
def test_files_are_the_published_bytes(path: Path, digest: str) -> None:
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest


def theophylline() -> Observations:
    return instantiate(OmegaConf.load(ROOT / "conf" / "data" / "theophylline.yaml")).read()


@pytest.mark.skipif(not SHARED.exists(), reason="the source data sets are not beside this checkout")
def test_theophylline_is_the_source_data_set() -> None:
    source = pd.read_csv(SHARED / "medicaldata_theoph.csv")
    observations = theophylline()
    design = observations.design
    assert design.events is not None
    assert design.covariates is not None
    by_person = source.groupby("Subject")
    np.testing.assert_array_equal(design.times.flatten().numpy(), source.Time)
    np.testing.assert_array_equal(observations.values.flatten().numpy(), source.conc)
    np.testing.assert_array_equal(design.covariates.column("WT").numpy(), by_person.Wt.first())
    np.testing.assert_allclose(
        design.events.amount[:, 0].numpy(), by_person.Dose.first() * by_person.Wt.first(), rtol=1e-12
    )
    other = pd.read_csv(SHARED / "nlmixr2data_theo_sd.csv")
    np.testing.assert_allclose(design.events.amount[:, 0].numpy(), other[other.EVID == 101].AMT, rtol=1e-12)
    made = script(THEOPHYLLINE).event_table(source)
    assert made.to_csv(index=False, lineterminator="\n") == (THEOPHYLLINE / "theophylline.csv").read_text()


def test_theophylline_has_everybody_dosed_once_at_time_zero() -> None:
    observations = theophylline()
    assert observations.values.shape == (12, 11, 1)
    assert bool(observations.design.observed.all())
    assert observations.design.events is not None
    assert bool((observations.design.events.time == 0).all())
    # Twelve people were given about 320 mg: the published doses lie between 3.1 and 5.86 mg/kg.
    assert bool(((observations.design.events.amount > 250) & (observations.design.events.amount < 330)).all())


def test_cells_come_from_their_script() -> None:
    phi, measured = script(CELLS).cells()
    truth = pd.read_csv(CELLS / "truth.csv")
    observations: Observations = instantiate(OmegaConf.load(ROOT / "conf" / "data" / "mrna_two_rate_cells.yaml")).read()
    assert observations.ids == tuple(truth["id"])
    np.testing.assert_allclose(truth.to_numpy()[:, 1:].astype(float), phi, rtol=1e-8)
    # Seven digits were written: the log is right to half a unit of the seventh.
    np.testing.assert_allclose(observations.values[..., 0].numpy(), np.log(measured), atol=5.1e-7)
    np.testing.assert_allclose(observations.design.times[0].numpy(), np.arange(1, 181) / 6, rtol=1e-9)


def test_the_formula_of_the_cells_solves_their_differential_equations() -> None:
    make = script(CELLS)
    hours = make.HOURS
    phi = make.cells()[0][:6]
    phi[0, 0] = phi[0, 1] = -1.0  # equal rates
    for row in phi:
        delta, gamma, k, t0, offset, _ = np.exp(row)
        solution = solve_ivp(
            lambda _, state, d=delta, g=gamma, scale=k: [-d * state[0], scale * state[0] - g * state[1]],
            (t0, 30.0),
            [1.0, 0.0],
            t_eval=hours[hours > t0],
            rtol=1e-10,
            atol=1e-12,
        )
        expected = np.concatenate([np.zeros(180 - solution.y.shape[1]), solution.y[1]]) + offset
        np.testing.assert_allclose(make.fluorescence(row[None], hours)[0], expected, rtol=1e-7)


def test_cells_follow_their_law() -> None:
    make = script(CELLS)
    law = pd.read_csv(CELLS / "law.csv", index_col="parameter")
    # Numbers from the published definition of this population.
    np.testing.assert_allclose(law.log_mean, [-0.69364, -7.01357, 6.21662, -0.16357, 2.07944, -3.45388], atol=6e-6)
    np.testing.assert_allclose(law.log_variance, [0.94098, 7.01402, 0.00396, 0.11641, 0, 0], atol=6e-6)
    truth = pd.read_csv(CELLS / "truth.csv").to_numpy()[:, 1:].astype(float)
    sheet = pd.read_csv(CELLS / "cells.csv").to_numpy()[:, 1:].T
    # Five standard errors: a false alarm in less than one of 100,000 comparisons.
    spread = np.sqrt(law.log_variance.to_numpy())
    assert (np.abs(truth.mean(0) - law.log_mean) <= 5 * spread / np.sqrt(200) + 1e-8).all()
    noise = (np.log(sheet) - np.log(make.fluorescence(truth, make.HOURS))) / np.sqrt(0.001)
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
    assert abs(noise.std() - 1) < 5 / np.sqrt(2 * noise.size)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_data_config_says_what_it_is_and_reads(path: Path) -> None:
    assert path.read_text().startswith("# ")
    config = OmegaConf.load(path)
    if OmegaConf.is_missing(config, "path") or config.path.startswith("cached:"):
        if path.stem == "long_table":
            config.columns.update({"id": "ID", "value": "DV"})
            config.missing.append(".")
        config.path = str(FILES.get(path.stem, THEOPHYLLINE / "theophylline.csv"))
        if path.stem == "egfp":
            config.header = True
        if path.stem == "vectors":
            config.path = str(THEOPHYLLINE / "theophylline.csv")
            config.update(id="ID", entries=["TIME", "WT"])
    if path.stem == "long_table":
        config.replicates = "keep"
        config.unused = ["AMT", "EVID", "MDV"]  # an event table, whose doses a long table would refuse
    if path.stem == "biosensor" and not (ROOT / config.path).exists():
        pytest.skip("the biosensors' table is not part of the repository and was not made here")
    observations = instantiate(config).read()
    assert len(observations) in (3, 12, 72, 200, 312)


def test_simulated_wells_come_from_their_script() -> None:
    made = script(SIMULATED)
    wells = made.wells()
    table = made.measurements(wells)
    stored = pd.read_csv(SIMULATED / "wells.csv.gz", keep_default_na=False)
    assert list(stored.columns) == made.COLUMNS
    for name in ("id", "device", "rbs_R", "rbs_S", "signal", "CENS"):
        assert stored[name].tolist() == table[name].tolist(), name
    # Five digits were written, and simulations are in double precision on any machine.
    np.testing.assert_allclose(stored["value"], table["value"], rtol=1e-4, atol=1e-9)
    own = pd.read_csv(SIMULATED / "truth_wells.csv").set_index("id")
    assert own.index.tolist() == wells.table["id"].tolist()
    assert 0.002 < (table["CENS"] == -1).mean() < 0.1
    folds = pd.read_csv(SIMULATED / "folds.csv")
    assert folds["fold"].value_counts().tolist() == [18] * 4

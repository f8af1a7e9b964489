"""Both concentrations agree with matrix exponentials from dose to dose, and body weight scales them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles.compartment_systems import WrittenDose, amounts

from nlme_sbi.individual_model.solvers import DormandPrince5
from nlme_sbi.types import Covariates, Design, Events
from simulators.sunitinib import Sunitinib

DOUBLE = torch.float64
NATURAL = {"ka": 0.133, "V2": 1820.0, "CLP": 33.9, "CLM": 16.5, "V3": 730.0, "Q34": 2.75, "V4": 592.0, "fm": 0.21}
NATURAL |= {"Q25": 0.371, "sd_sunitinib": 0.367, "sd_metabolite": 0.281}
TIMES = [0.01, 3.0, 20.0, 24.0, 30.0, 100.0, 200.0]


def design_of(weight: float) -> Design:
    """Eight daily doses of 50 mg."""
    events = Events.single_dose(torch.zeros(1, dtype=DOUBLE), torch.full((1,), 50_000.0, dtype=DOUBLE))
    daily = replace(
        events, additional=torch.full_like(events.additional, 7), interval=torch.full_like(events.time, 24.0)
    )
    plain = Design.regular(torch.tensor(TIMES, dtype=DOUBLE), 1, 2)
    return replace(plain, events=daily, covariates=Covariates(("WT",), torch.tensor([[weight]], dtype=DOUBLE)))


def exact(weight: float) -> np.ndarray:
    p, size = NATURAL, weight / 70
    flow = size**0.75
    liver, clearance = 80 * flow, p["CLP"] * flow
    v2, v3, v4, v5 = p["V2"] * size, p["V3"] * size, p["V4"] * size, 588 * size
    share = 1 / (liver + clearance)
    q25, q34 = p["Q25"] * flow, p["Q34"] * flow
    matrix = np.zeros((5, 5))
    matrix[0, 0] = -p["ka"]
    matrix[1, 0] = liver * share * p["ka"]
    matrix[1, 1] = liver * share * liver / v2 - liver / v2 - q25 / v2
    matrix[1, 4] = q25 / v5
    matrix[2, 0] = p["fm"] * clearance * share * p["ka"]
    matrix[2, 1] = p["fm"] * clearance * share * liver / v2
    matrix[2, 2] = -p["CLM"] * flow / v3 - q34 / v3
    matrix[2, 3] = q34 / v4
    matrix[3, 2], matrix[3, 3] = q34 / v3, -q34 / v4
    matrix[4, 1], matrix[4, 4] = q25 / v2, -q25 / v5
    states = amounts(matrix, [WrittenDose(24.0 * n, 50_000.0, 0.0, 0) for n in range(8)], TIMES)
    return np.log(np.maximum(states[:, 1:3] / [v2, v3], 1e-3))


@pytest.mark.slow
@pytest.mark.parametrize("weight", [45.0, 70.0, 110.0])
def test_log_concentrations_agree_with_matrix_exponentials(weight: float) -> None:
    for model, tolerance in ((Sunitinib(DormandPrince5(1e-7, 1e-7)), 2e-5), (Sunitinib(), 1e-8)):
        values = torch.tensor([[NATURAL[name] for name in model.parameters.names]], dtype=DOUBLE)
        found = model.predict(model.parameters.to_unconstrained(values), design_of(weight))[0].numpy()
        np.testing.assert_allclose(found, exact(weight), atol=tolerance)


def test_without_a_weight_it_is_refused() -> None:
    model = Sunitinib()
    with pytest.raises(ValueError, match=r"data\.covariates"):
        model.predict(torch.zeros((1, 11), dtype=DOUBLE), replace(design_of(70.0), covariates=None))

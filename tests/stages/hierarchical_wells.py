"""A long table of simulated wells, and configurations that fit it in seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import OmegaConf

from nlme_sbi.cli import CONFIG_DIRECTORY, compose_config
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.types import Covariates, Design
from simulators.double_receiver import SIGNALS, DoubleReceiver

WELLS = 16


def write_wells(path: Path) -> Path:
    """Wells of four devices, two plates with times of their own, some readings saturated."""
    simulator = DoubleReceiver()
    prior = instantiate(OmegaConf.load(CONFIG_DIRECTORY / "prior" / "double_receiver.yaml"))
    generator = torch.Generator().manual_seed(0)
    inducers = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [25.0, 25.0]]).repeat(WELLS // 4, 1)
    rows = []
    for plate, times in (("p", torch.linspace(0, 12, 13)), ("q", torch.linspace(0, 12, 16))):
        design = replace(Design.regular(times, WELLS, 4), covariates=Covariates(("C6", "C12"), inducers))
        phi = prior.mean.float().repeat(WELLS, 1) + 0.2 * torch.randn((WELLS, len(prior.names)), generator=generator)
        values = simulator.simulate(phi, design, generator).values.numpy()
        for well in range(0 if plate == "p" else 1, WELLS, 2):
            site = ("none", "S1")[well // 4 % 2], ("none", "S2")[well // 8 % 2]
            about = (f"{plate}{well}", plate, "-".join(site), *site, *inducers[well].tolist())
            rows += [
                (*about, float(times[time]), SIGNALS[signal], values[well, time, signal], 0)
                for time in range(len(times))
                for signal in range(4)
            ]
    columns = ["id", "plate", "device", "rbs_R", "rbs_S", "C6", "C12", "time", "signal", "value", "CENS"]
    frame = pd.DataFrame(rows, columns=columns).astype({"value": float})
    top = frame.value[frame.signal == "ECFP"].quantile(0.95)
    frame.loc[(frame.signal == "ECFP") & (frame.value >= top), ["value", "CENS"]] = [top, -1]
    frame.to_csv(path, index=False)
    return path


def config(table: Path, root: Path, *overrides: str, name: str = "train_hierarchical") -> Any:
    """A tiny fit of that table."""
    tiny = [
        *("training.steps=6", "training.validate_every=3", "training.batch_size=8", "bound.draws=3"),
        *("evaluation.draws=20", "evaluation.predictions=20", "individual_population.draws=30", "encoder.hidden=8"),
        *("individual_population.steps=3", "evaluation.refine_steps=2", f"data.path={table}", f"output_root={root}"),
    ]
    return compose_config(name, [*tiny, *overrides])

"""What neural terms of a grey box pay for their size while they are trained."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.neural.grey_boxes import GreyBoxSimulator
from nlme_sbi.types import Design


def correction_penalty(simulator: GreyBoxSimulator, phi: Float[Tensor, "I G K D"], design: Design) -> Float[Tensor, ""]:
    """What the neural terms pay for their size, in nats an individual.

    One draw of each individual is enough. It moves the networks alone: posteriors owe it nothing.
    """
    if simulator.penalty == 0:
        return phi.new_zeros(())
    found = simulator.penalty * simulator.correction(phi[:, :1, :1].detach(), design).relative_size()
    return torch.where(torch.isfinite(found), found, 0.0)

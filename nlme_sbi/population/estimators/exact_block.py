"""Some individuals' draws of the exact estimator, and the likelihood's derivatives in the constants at each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.mechanistic import MechanisticSimulator, is_noise_alone
from nlme_sbi.population.likelihood.log_joint import JointDensity, interleave, select_rows
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.types import Design

_PREDICTED = 200_000  # predictions that are worked on at once
_STEP = 3e-5  # of finite differences in constants
_ELSEWHERE = 0.37  # change of constants that leaves a prediction as it is only where it does not read them


@dataclass(frozen=True, eq=False)
class ExactBlock:
    """Some individuals' draws: ``phi (i, S, V)`` with proposal density ``log_q (i, S)``, ``log_ratio (i, S)`` =
    log-likelihood minus ``log_q``, and the likelihood's derivatives in the constants: each draw's own first ones, and
    second ones that are each draw's own (``R = S``) or their mean over draws that were chosen by weight (``R = 1``).
    With ``likelihood`` other constants than its own are no expansion but evaluated; where these are parameters of the
    noise alone, from the ``prediction (i, S, T, C)`` that they leave as it is."""

    population: PopulationModel
    rows: Tensor
    design: Design
    phi: Float[Tensor, "I S V"]
    log_ratio: Float[Tensor, "I S"]
    slopes: Float[Tensor, "I S W"]
    curvatures: Float[Tensor, "I R W W"]
    constants: Float[Tensor, "I W"]
    log_q: Float[Tensor, "I S"]
    likelihood: JointDensity | None = None
    prediction: Float[Tensor, "I S T C"] | None = None

    def varying(self) -> Float[Tensor, "I S V"]:
        """Draws of the varying parameters."""
        return self.phi

    def log_weights(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "I S"]:
        """``log p(y | v, s_theta) + log p(v | theta) - log q(v)``."""
        found = self.log_ratio + self.population.log_prob(self.phi, theta, self.design)
        if self.constants.shape[1] == 0:
            return found
        constants = self.population.constants(theta, self.design)
        change = constants - self.constants
        if self.likelihood is not None and bool((change.detach() != 0).any()):
            gain: Tensor = _LikelihoodGain.apply(constants, self)  # type: ignore[no-untyped-call]
            return found + gain
        found = found + (self.slopes @ change[..., None])[..., 0]
        return found + 0.5 * torch.einsum("iw,irwu,iu->ir", change, self.curvatures, change)


class _LikelihoodGain(torch.autograd.Function):
    """Log-likelihood of a block's draws at other constants minus that at the block's own, twice differentiable in the
    constants: first derivatives exact, second ones central differences of them. Nothing is kept for later but the
    gradients, so that memory is bounded however costly the prediction is."""

    @staticmethod
    def forward(ctx: Any, constants: Tensor, block: ExactBlock) -> Tensor:
        gain, slopes = block_gain(block, constants.detach())
        ctx.save_for_backward(constants, slopes)
        ctx.block = block
        return gain

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        constants, slopes = ctx.saved_tensors
        return _GainSlope.apply(constants, cotangent, slopes, ctx.block), None  # type: ignore[no-untyped-call]


class _GainSlope(torch.autograd.Function):
    """``sum_j cotangent_ij slopes_ij``, ``(I, W)``."""

    @staticmethod
    def forward(ctx: Any, constants: Tensor, cotangent: Tensor, slopes: Tensor, block: ExactBlock) -> Tensor:
        ctx.save_for_backward(constants, cotangent, slopes)
        ctx.block = block
        return torch.einsum("is,isw->iw", cotangent, slopes)

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        constants, cotangent, slopes = (saved.detach() for saved in ctx.saved_tensors)
        in_constants = in_cotangent = None
        if ctx.needs_input_grad[0]:
            way = direction.detach()
            length = way.abs().amax()
            step = _STEP / length if float(length) > 0 else torch.ones_like(length)
            above, below = (block_gain(ctx.block, constants + sign * step * way)[1] for sign in (1.0, -1.0))
            in_constants = torch.einsum("is,isw->iw", cotangent, above - below) / (2 * step)
        if ctx.needs_input_grad[1]:
            in_cotangent = torch.einsum("isw,iw->is", slopes, direction)
        return in_constants, in_cotangent, None, None


def block_gain(
    block: ExactBlock, constants: Float[Tensor, "I W"]
) -> tuple[Float[Tensor, "I S"], Float[Tensor, "I S W"]]:
    """Log-likelihood of every draw at ``constants`` minus that at the block's own, and its gradient there; ``-inf``
    and 0 where there is no likelihood."""
    if block.likelihood is None:
        raise TypeError("These draws hold expansions, not the likelihood itself.")
    value, slopes = first_order(block.likelihood, block.rows, block.phi, constants, block.prediction)
    base = block.log_ratio + block.log_q
    there = torch.isfinite(value) & torch.isfinite(base)
    return torch.where(there, value - base, -torch.inf), slopes.masked_fill(~there[..., None], 0.0)


def first_order(
    joint: JointDensity, rows: Tensor, phi: Tensor, constants: Tensor, prediction: Tensor | None = None
) -> tuple[Float[Tensor, "I n"], Float[Tensor, "I n W"]]:
    """Log-likelihood of each draw and its gradient in the constants, a few draws at once; from the ``prediction`` where
    there is one."""
    observations = select_rows(joint.observations, rows)
    predicted = joint.observations.values.shape[1] * joint.observations.values.shape[2] * len(rows)
    values, slopes = [], []
    for place in torch.split(torch.arange(phi.shape[1]), max(1, _PREDICTED // predicted)):
        some = phi[:, place]
        with torch.set_grad_enabled(constants.shape[1] > 0):
            leaf = constants[:, None].expand(-1, len(place), -1).clone().requires_grad_(constants.shape[1] > 0)
            parameters = interleave(joint.population, some, leaf)
            if prediction is None or not isinstance(joint.simulator, MechanisticSimulator):
                value = joint.simulator.log_likelihood(observations, parameters)
            else:
                value = joint.simulator.likelihood_of_prediction(observations, prediction[:, place], parameters)
            slopes.append(torch.autograd.grad(value.sum(), leaf)[0] if constants.shape[1] > 0 else leaf)
        values.append(value.detach())
    return torch.cat(values, 1), torch.cat(slopes, 1)


@torch.no_grad()
def lasting_prediction(
    joint: JointDensity, rows: Tensor, phi: Float[Tensor, "I n V"], constants: Float[Tensor, "I W"]
) -> Float[Tensor, "I n T C"] | None:
    """Predictions of draws, where the constants are parameters of the noise that leave them as they are; else None."""
    if constants.shape[1] == 0 or not is_noise_alone(joint.simulator, joint.population.constant):
        return None
    design = joint.observations.design[rows]

    def predict(values: Tensor) -> Tensor:
        parameters = interleave(joint.population, phi, values[:, None].expand(-1, phi.shape[1], -1))
        return joint.simulator.predict(parameters, design)

    found = predict(constants)
    # A prediction may read a parameter of the noise all the same.
    return found if torch.equal(found.nan_to_num(), predict(constants + _ELSEWHERE).nan_to_num()) else None


def second_order(
    joint: JointDensity,
    rows: Tensor,
    phi: Float[Tensor, "I n V"],
    constants: Float[Tensor, "I W"],
    slopes: Float[Tensor, "I n W"],
    prediction: Tensor | None = None,
) -> Float[Tensor, "I n W W"]:
    """Hessian of every draw's log-likelihood in the constants: differences of exact gradients from those at hand."""
    columns = [
        (first_order(joint, rows, phi, constants + step, prediction)[1] - slopes) / _STEP
        for step in _STEP * torch.eye(constants.shape[1], dtype=phi.dtype, device=phi.device)
    ]
    hessian = torch.stack(columns, 2) if columns else slopes[..., None] * slopes[..., None, :]
    return 0.5 * (hessian + hessian.mT)

"""Closed-form solutions of linear models, written so that values and derivatives keep their digits everywhere."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# log(2 sinh(x/2) / x) = sum_n B_2n x^2n / (2n (2n)!). Below 0.5 the first term left out is under 3e-19.
_SERIES_BELOW = 0.5
_SERIES = (
    1 / 24,
    -1 / 2880,
    1 / 181440,
    -1 / 9676800,
    1 / 479001600,
    -691 / 15692092416000,
    1 / 1046139494400,
)


def log_expm1_ratio(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""``log((1 - exp(-x)) / x)`` for ``x >= 0``, with all its derivatives, through ``x = 0``.

    Autograd of the plain formula divides by ``x`` twice and cancels, so below 0.5 the series
    :math:`-x/2 + x^2/24 - x^4/2880 + \dots` is used. Each branch of the ``where`` sees only arguments that it can
    stand, because a NaN in the branch not taken would reach the gradient.
    """
    small = x < _SERIES_BELOW
    series = _series(torch.where(small, x, 0.0))
    away = torch.where(small, 1.0, x)
    return torch.where(small, series, torch.log(-torch.expm1(-away) / away))


def _series(x: Tensor) -> Tensor:
    square = x * x
    total = torch.full_like(x, _SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        total = total * square + coefficient
    return total * square - 0.5 * x


def log_bateman(
    elapsed: Float[Tensor, "*#shape"], rate_a: Float[Tensor, "*#shape"], rate_b: Float[Tensor, "*#shape"]
) -> Float[Tensor, "*shape"]:
    r"""Log of Bateman's function :math:`(e^{-a\tau} - e^{-b\tau}) / (b - a)`: two first-order steps in a row.

    Written as :math:`\log\tau - s\tau + \log\frac{1 - e^{-(f-s)\tau}}{(f-s)\tau}` with the slow rate *s* and the fast
    rate *f*: the textbook form loses every digit where the rates meet, and with the slower rate factored out no
    exponent can overflow. Symmetric in the rates; values, gradients and Hessians are exact through equality.

    Args:
        elapsed: time since the onset (tau), any unit.
        rate_a: first rate, one over that unit, positive.
        rate_b: second rate, positive; broadcasts with the others.

    Returns:
        The log of a time, ``-inf`` where ``elapsed <= 0``, there with zero gradients.
    """
    # torch.where and not minimum: where the rates are equal, minimum halves the gradient between its arguments.
    first_is_slow = rate_a <= rate_b
    slow = torch.where(first_is_slow, rate_a, rate_b)
    fast = torch.where(first_is_slow, rate_b, rate_a)
    after_onset = elapsed > 0
    tau = torch.where(after_onset, elapsed, 1.0)
    found = torch.log(tau) - slow * tau + log_expm1_ratio((fast - slow) * tau)
    return torch.where(after_onset, found, -torch.inf)

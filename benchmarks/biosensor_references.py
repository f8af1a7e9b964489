"""Predictions of biosensor wells without a model: means of other wells, with Gaussian residuals in time.

Their log densities, CRPS and RMSE stand beside every number of the models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nlme_sbi.hierarchical.model import Individuals
from nlme_sbi.hierarchical.scores import crps, rmse

_SHRINKAGE = 0.1  # of a covariance of 86 times from about as many residuals towards its diagonal


@dataclass(frozen=True)
class Reference:
    """Scores of wells: nats a well with independent and with correlated residuals, RMSE and CRPS by signal."""

    independent: Tensor
    correlated: Tensor
    rmse: Tensor
    crps: Tensor


def treatments(wells: Individuals) -> np.ndarray:
    """Logs of the inducers, ``(I, 2)``."""
    covariates = wells.observations.design.covariates
    assert covariates is not None
    return np.log1p(covariates.values.numpy())


def means_of_nearest(train: Individuals, test: Individuals, same: np.ndarray, *, itself: bool = False) -> Tensor:
    """Mean of the training wells at the nearest treatment, of those wells that ``same (I_test, I_train)`` allows.

    Args:
        train: wells that are known.
        test: wells that are predicted.
        same: which training wells may be used for each.
        itself: whether ``test`` are the training wells, each of which is then left out of its own mean.
    """
    apart = np.abs(treatments(test)[:, None] - treatments(train)[None]).sum(-1)
    allowed = same.copy()
    if itself:
        np.fill_diagonal(allowed, False)
    apart = np.where(allowed, apart, np.inf)
    near = apart <= apart.min(1, keepdims=True) + 1e-9
    share = torch.from_numpy(near / near.sum(1, keepdims=True)).float()
    return torch.einsum("ij,jtc->itc", share, train.observations.values)


def device_codes(wells: Individuals) -> np.ndarray:
    """The device of each well."""
    groups = wells.observations.design.groups
    assert groups is not None
    return groups.codes[:, groups.names.index("device")].numpy()


def nearest_of_same_device(train: Individuals, test: Individuals) -> Reference:
    """The nearest treatment of the same device, with the residuals that training wells have when left out."""
    own = device_codes(train)
    fitted = means_of_nearest(train, train, own[:, None] == own[None], itself=True)
    predicted = means_of_nearest(train, test, device_codes(test)[:, None] == own[None])
    return _reference(train, test, fitted, predicted)


def device_mean(train: Individuals, test: Individuals) -> Reference:
    """The mean of all training wells of the device."""

    def mean(wells: Individuals, *, itself: bool) -> Tensor:
        same = (device_codes(wells)[:, None] == device_codes(train)[None]).astype(float)
        if itself:
            np.fill_diagonal(same, 0.0)
        share = torch.from_numpy(same / same.sum(1, keepdims=True)).float()
        return torch.einsum("ij,jtc->itc", share, train.observations.values)

    return _reference(train, test, mean(train, itself=True), mean(test, itself=False))


def nearest_of_other_devices(train: Individuals, test: Individuals) -> Reference:
    """The nearest treatment of all other devices, for a device that was never seen."""
    own = device_codes(train)
    fitted = means_of_nearest(train, train, own[:, None] != own[None])
    return _reference(train, test, fitted, means_of_nearest(train, test, np.ones((len(test), len(train)), dtype=bool)))


def parallelogram(train: Individuals, test: Individuals, corners: tuple[str, str, str]) -> Reference:
    """What two devices that share one site each with the unseen one say, relative to the one that shares none.

    Series of ``(a, b, c)`` at the nearest treatment are combined as ``a * b / c``, in every reading; the residuals are
    those of the nearest treatment of other devices.
    """
    groups = train.observations.design.groups
    assert groups is not None
    levels = groups.levels[groups.names.index("device")]
    own = device_codes(train)
    series = [
        means_of_nearest(train, test, np.broadcast_to(own == levels.index(name), (len(test), len(train))))
        for name in corners
    ]
    # A hundredth of a signal's largest reading keeps ratios of what is nearly 0 from being anything.
    first, second, third = (one + 0.01 for one in series)
    fitted = means_of_nearest(train, train, own[:, None] != own[None])
    return _reference(train, test, fitted, first * second / third - 0.01)


def _reference(train: Individuals, test: Individuals, fitted: Tensor, predicted: Tensor) -> Reference:
    residual = (train.observations.values - fitted).double()
    away = (test.observations.values - predicted).double()
    times, signals = away.shape[1:]
    independent, correlated = torch.zeros(len(test)), torch.zeros(len(test))
    draws = []
    generator = torch.Generator().manual_seed(0)
    for signal in range(signals):
        known, new = residual[..., signal], away[..., signal]
        sd = known.square().mean().sqrt()
        independent += (-0.5 * (new / sd).square() - sd.log() - 0.5 * math.log(2 * math.pi)).sum(1).float()
        covariance = known.T @ known / len(known)
        covariance = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * torch.diag(torch.diagonal(covariance))
        covariance += 1e-9 * torch.eye(times, dtype=torch.float64)
        law = torch.distributions.MultivariateNormal(torch.zeros(times, dtype=torch.float64), covariance)
        correlated += law.log_prob(new).float()
        noise = torch.randn((len(test), 200, times), generator=generator, dtype=torch.float64)
        draws.append(predicted[:, None, :, signal] + (noise @ torch.linalg.cholesky(covariance).T).float())
    values, observed = test.observations.values, test.observations.design.observed
    together = torch.stack(draws, -1)
    return Reference(independent, correlated, rmse(predicted, values, observed), crps(together, values, observed))

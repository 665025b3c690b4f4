"""How far a reward model's features lie from those that the start policy's completions give.

The distance is Mahalanobis's, as in InfoRM (arXiv 2402.09345), which reads another latent space.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from minalign.models.padding import pad
from minalign.models.scoring import last_hidden_states
from minalign.reward import RewardModel


class Cloud(NamedTuple):
    """mean: (D,). whitening: (D, D), L^-1 of the covariance L L^T. limit: of the distance."""

    mean: torch.Tensor
    whitening: torch.Tensor
    limit: torch.Tensor


@torch.no_grad()
def features(
    reward_model: RewardModel, rows: Sequence[list[int]], batch_size: int = 64
) -> torch.Tensor:
    """(N, D) float32: the last hidden state of each text, which the head multiplies.

    Args:
        reward_model: a decoder with a linear head, which reads the last token.
        rows: N lists of token ids, as RewardModel.encode_rollout makes them.
        batch_size: rows per pass.
    """
    found = []
    for i in range(0, len(rows), batch_size):
        ids, mask = pad(rows[i : i + batch_size], "right", reward_model.model.device)
        hidden = last_hidden_states(reward_model.model, ids, mask)  # (B, T, D)
        found.append(hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1])
    return torch.cat(found).float()


def fit_cloud(features: torch.Tensor, quantile: float = 0.95) -> Cloud:
    """The cloud of N features (N, D), N >= 4.

    The first half gives mean and covariance, the second the quantile of the distances: of its own
    samples a covariance would find too small ones.
    """
    first, second = features.double().tensor_split(2)
    mean = first.mean(0)
    cholesky = torch.linalg.cholesky(shrunk_covariance(first - mean))
    eye = torch.eye(len(cholesky), dtype=cholesky.dtype, device=cholesky.device)
    whitening = torch.linalg.solve_triangular(cholesky, eye, upper=False)
    limit = ((second - mean) @ whitening.T).norm(dim=1).quantile(quantile)
    return Cloud(mean, whitening, limit)


def outside(features: torch.Tensor, cloud: Cloud) -> torch.Tensor:
    """(N,) bool: which features (N, D) lie further from the cloud's mean than its limit."""
    return ((features.double() - cloud.mean) @ cloud.whitening.T).norm(dim=1) > cloud.limit


def shrunk_covariance(centred: torch.Tensor) -> torch.Tensor:
    """Covariance (D, D) of centred rows x (N, D), shrunk to a multiple of the identity.

        (1 - w) S + w m I,  S = sum x x^T / N,  m = tr S / D
        w = min(1, sum |x x^T - S|^2 / N^2 / |S - m I|^2)       (Ledoit and Wolf, 2004)

    So few rows of many features give one that can be inverted, too.
    """
    count, width = centred.shape
    S = centred.T @ centred / count
    target = S.trace() / width * torch.eye(width, dtype=S.dtype, device=S.device)
    # sum |x x^T - S|^2 = sum |x|^4 - N |S|^2
    noise = (centred.square().sum(1).square().mean() - S.square().sum()) / count
    # S is a multiple of the identity where D is 1: any weight then gives S
    weight = (noise / (S - target).square().sum().clamp(min=1e-300)).clamp(0, 1)
    return (1 - weight) * S + weight * target

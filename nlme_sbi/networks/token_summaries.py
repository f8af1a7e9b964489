"""Summaries of individuals as tokens: measurements at any times under any regimen, censored ones among them.

Both networks get tokens in one canonical order, so that padding and the order of rows change nothing, and an additional
dose (ADDL) equals the same dose written out. They differ in how they read the tokens: attention compares every token
with every other, a recurrent network reads them in order of time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nlme_sbi.networks.densities import require_positive
from nlme_sbi.networks.summaries import DataShape, perceptron
from nlme_sbi.networks.token_features import TokenFeatures
from nlme_sbi.networks.tokens import TokenKind, Tokens, tokens_of
from nlme_sbi.types import Design, Simulations

_FLOAT = 4  # bytes


@runtime_checkable
class TokenReader(Protocol):
    """A summary network of tokens, which may read limits of quantification.

    Attributes:
        censored: whether it was built for censored values.
    """

    censored: bool

    def bytes_per_individual(self, tokens: int) -> int:
        """Approximate memory of one individual with this number of tokens."""


class _TokenNetwork(nn.Module):
    """Base class of the token networks: features, and a first token that holds covariates and is always present."""

    def __init__(self, shape: DataShape, *, token_width: int, token_hidden: int) -> None:
        super().__init__()
        self.takes_doses, self.signals, self.censored = shape.takes_doses, shape.signals, shape.censored
        self.along = shape.along
        self.features = TokenFeatures(
            shape.signals,
            takes_doses=shape.takes_doses,
            compartments=shape.compartments,
            censored=shape.censored,
            along=len(shape.along),
        )
        self.context = shape.covariates_alone
        self.embed = perceptron([self.features.width, token_hidden, token_width])
        self.begin = nn.Parameter(torch.zeros(token_width))
        self.of_covariates = nn.Linear(self.context.width, token_width) if self.context.width else None
        self.beside = self.context.width + shape.signals + int(shape.takes_doses)

    def fit_scaling(self, pilot: Simulations) -> None:
        """Fit every scaling to pilot simulations."""
        self.features.fit(self._tokens(pilot.values, pilot.design))
        self.context.fit(pilot.design)

    def _tokens(self, values: Float[Tensor, "B T C"], design: Design) -> Tokens:
        read_design = design if self.censored else replace(design, limits=None)
        return tokens_of(values, read_design, takes_doses=self.takes_doses, along=self.along)

    def _read(
        self, values: Float[Tensor, "B T C"], design: Design
    ) -> tuple[Float[Tensor, "B M W"], Bool[Tensor, "B M"], Float[Tensor, "B K"]]:
        """The first token and the embedded ones, a mask of present ones, and features that bypass the tokens:
        covariates and numbers of measurements and doses."""
        tokens = self._tokens(values, design)
        embedded = self.embed(self.features(tokens))
        covariates = self.context(design)
        begin = self.begin.expand(len(tokens), -1)
        if self.of_covariates is not None:
            begin = begin + self.of_covariates(covariates)
        rows = torch.cat((begin[:, None], embedded), dim=1)
        present = torch.cat((torch.ones_like(tokens.present[:, :1]), tokens.present), dim=1)
        measured = tokens.of_kind(TokenKind.MEASUREMENT)
        counts = [(measured & (tokens.channel == signal)).sum(1) for signal in range(self.signals)]
        if self.takes_doses:
            counts.append(tokens.of_kind(TokenKind.DOSE).sum(1))
        return rows, present, torch.cat((covariates, torch.log1p(torch.stack(counts, 1).float())), dim=1)


class _Attention(nn.Module):
    """Multi-head attention of queries to present rows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(
        self, queries: Float[Tensor, "B Q W"], rows: Float[Tensor, "B M W"], present: Bool[Tensor, "B M"]
    ) -> Float[Tensor, "B Q W"]:
        query, key, value = (
            layer(given).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, given in ((self.query, queries), (self.key, rows), (self.value, rows))
        )
        found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=present[:, None, None, :])
        output: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return output


class _Block(nn.Module):
    """Self-attention and a perceptron, both residual; the identity before training."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.before_attention, self.before_rows = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        narrow = nn.Linear(hidden, width)
        self.rows = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), narrow)
        for last in (self.attention.out, narrow):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, rows: Float[Tensor, "B M W"], present: Bool[Tensor, "B M"]) -> Float[Tensor, "B M W"]:
        normed = self.before_attention(rows)
        rows = rows + self.attention(normed, normed, present)
        output: Tensor = rows + self.rows(self.before_rows(rows))
        return output


class AttentionNetwork(_TokenNetwork):
    """Set transformer: self-attention blocks over the tokens, then learned queries pool them.

    Source: Lee, Lee, Kim, Kosiorek, Choi and Teh (2019), Set Transformer, ICML, without induced points.
    """

    def __init__(self, shape: DataShape, settings: AttentionSummary) -> None:
        super().__init__(shape, token_width=settings.token_width, token_hidden=settings.token_hidden)
        size, heads = settings.token_width, settings.heads
        self.blocks = nn.ModuleList(_Block(size, heads, settings.token_hidden) for _ in range(settings.blocks))
        self.queries = nn.Parameter(torch.randn(settings.queries, size) * size**-0.5)
        self.norm, self.pool = nn.LayerNorm(size), _Attention(size, heads)
        inputs = (settings.queries + 2) * size + self.beside
        self.network = perceptron([inputs, *[settings.hidden] * settings.layers, settings.width])
        self.width = settings.width
        self._per_token = 8 * size + 2 * settings.token_hidden + 2 * self.features.width
        self._heads = heads

    def bytes_per_individual(self, tokens: int) -> int:
        """Approximate memory of one individual; attention may hold every pair of tokens."""
        return _FLOAT * (tokens * self._per_token + self._heads * tokens * tokens)

    def forward(self, values: Float[Tensor, "B T C"], design: Design) -> Float[Tensor, "B H"]:
        rows, present, beside = self._read(values, design)
        for block in self.blocks:
            rows = block(rows, present)
        rows = self.norm(rows)
        pooled = self.pool(self.queries.expand(len(rows), -1, -1), rows, present)
        parts = (pooled.flatten(1), _mean(rows, present), rows[:, 0], beside)
        output: Tensor = self.network(torch.cat(parts, dim=1))
        return output


class RecurrentNetwork(_TokenNetwork):
    """Gated recurrent units (GRU) over the tokens in order of time: their last state, and the mean of all."""

    def __init__(self, shape: DataShape, settings: RecurrentSummary) -> None:
        super().__init__(shape, token_width=settings.token_width, token_hidden=settings.token_hidden)
        self.recurrent = nn.GRU(settings.token_width, settings.state, settings.recurrent_layers, batch_first=True)
        self.network = perceptron(
            [2 * settings.state + self.beside, *[settings.hidden] * settings.layers, settings.width]
        )
        self.width = settings.width
        self._per_token = 4 * settings.token_width + 2 * settings.token_hidden + 2 * self.features.width
        self._per_token += 8 * settings.state * settings.recurrent_layers

    def bytes_per_individual(self, tokens: int) -> int:
        """Approximate memory of one individual."""
        return _FLOAT * tokens * self._per_token

    def forward(self, values: Float[Tensor, "B T C"], design: Design) -> Float[Tensor, "B H"]:
        rows, present, beside = self._read(values, design)
        states, _ = self.recurrent(rows)
        last = (present.sum(1) - 1)[:, None, None].expand(-1, 1, states.shape[2])
        parts = (states.gather(1, last)[:, 0], _mean(states, present), beside)
        output: Tensor = self.network(torch.cat(parts, dim=1))
        return output


def _mean(rows: Float[Tensor, "B M W"], present: Bool[Tensor, "B M"]) -> Float[Tensor, "B W"]:
    """Mean over present rows."""
    return torch.where(present[..., None], rows, 0.0).sum(1) / present.sum(1, keepdim=True)


@dataclass(frozen=True)
class AttentionSummary:
    """Summary by attention for individuals with any times, doses, infusions, steady states and censored values.

    Args:
        width: length of the summary vector.
        hidden: width of the layers after pooling.
        layers: number of layers after pooling.
        token_width: length of an embedded token, a multiple of ``heads``.
        token_hidden: width of the hidden layer of the token embedding.
        blocks: number of self-attention blocks.
        heads: number of attention heads.
        queries: number of learned queries that pool the tokens.
    """

    width: int = 64
    hidden: int = 128
    layers: int = 2
    token_width: int = 48
    token_hidden: int = 96
    blocks: int = 2
    heads: int = 4
    queries: int = 2

    def __post_init__(self) -> None:
        require_positive(self, "width", "hidden", "token_width", "token_hidden", "blocks", "heads", "queries")
        if self.token_width % self.heads:
            raise ValueError(
                f"token_width must be a multiple of heads; got token_width={self.token_width}, heads={self.heads}."
            )

    def build(self, shape: DataShape) -> AttentionNetwork:
        """A new network with random weights."""
        return AttentionNetwork(shape, self)


@dataclass(frozen=True)
class RecurrentSummary:
    """Summary by a recurrent network, for the same individuals as :class:`AttentionSummary`.

    Args:
        width: length of the summary vector.
        hidden: width of the layers after the recurrent ones.
        layers: number of layers after the recurrent ones.
        token_width: length of an embedded token.
        token_hidden: width of the hidden layer of the token embedding.
        state: length of the recurrent state.
        recurrent_layers: number of recurrent layers.
    """

    width: int = 64
    hidden: int = 128
    layers: int = 2
    token_width: int = 48
    token_hidden: int = 96
    state: int = 96
    recurrent_layers: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "width", "hidden", "token_width", "token_hidden", "state", "recurrent_layers")

    def build(self, shape: DataShape) -> RecurrentNetwork:
        """A new network with random weights."""
        return RecurrentNetwork(shape, self)

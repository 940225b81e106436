"""The active latents of inputs as lists: all that a measure needs of a code, however wide the SAE."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Above this share of active latents a matrix product decodes faster than their rows are gathered.
DENSE_ABOVE = 0.1


@dataclass(frozen=True)
class Active:
    """Active latents of b inputs, input by input: those of input r lie at starts[r]:starts[r + 1], in ascending order.

    starts [b + 1] and latents [entries] int64, codes [entries] float32 (or contributions), on one device.
    """

    starts: Tensor
    latents: Tensor
    codes: Tensor

    @classmethod
    def of(cls, z: Tensor) -> Active:
        """The list of dense codes z [b, width]; what is not a number counts as active."""
        rows, latents = z.nonzero(as_tuple=True)
        ends = torch.bincount(rows, minlength=len(z)).cumsum(0)
        return cls(F.pad(ends, (1, 0)), latents, z[rows, latents])

    def __len__(self) -> int:
        """Inputs."""
        return len(self.starts) - 1

    @cached_property
    def counts(self) -> Tensor:
        """How many latents are active on each input [b] int64."""
        return self.starts.diff()

    @property
    def most(self) -> int:
        """The largest of these."""
        return int(self.counts.max()) if len(self) else 0

    def split(self, inputs: int) -> Iterator[Active]:
        """The same in parts of so many inputs, at least one."""
        if 0 < len(self) <= inputs:
            yield self
            return
        for begin in range(0, len(self), max(1, inputs)):
            starts = self.starts[begin : begin + max(1, inputs) + 1]
            at = slice(int(starts[0]), int(starts[-1]))
            yield Active(starts - starts[0], self.latents[at], self.codes[at])

    def contributions(self, decoder_norms: Tensor) -> Active:
        """a‖d‖ in place of the codes; decoder_norms [width]."""
        return Active(self.starts, self.latents, decoder_norms.index_select(0, self.latents).mul_(self.codes))

    def cpu(self) -> Active:
        """The same on the CPU."""
        return Active(self.starts.cpu(), self.latents.cpu(), self.codes.cpu())

    def packed(self) -> Tensor:
        """The codes [b, most], each input's first, then zeros."""
        if self.codes.device.type == "cpu":
            return torch.from_numpy(_pack(self.starts.numpy(), self.codes.numpy(), self.most))
        held = torch.arange(self.most, device=self.codes.device) < self.counts[:, None]
        return self.codes.new_zeros(held.shape).masked_scatter_(held, self.codes)

    def dense(self, width: int) -> Tensor:
        """The codes [b, width]."""
        rows = torch.arange(len(self), device=self.codes.device).repeat_interleave(self.counts)
        dense = self.codes.new_zeros(len(self), width)
        dense[rows, self.latents] = self.codes
        return dense

    def decode(self, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        """x̂ [b, d] = Σ code · W_dec[latent] + b_dec; W_dec [width, d], b_dec [d]."""
        if len(self.codes) > DENSE_ABOVE * len(self) * len(W_dec):
            return torch.addmm(b_dec, self.dense(len(W_dec)), W_dec)
        rows = F.embedding_bag(self.latents, W_dec, self.starts[:-1], mode="sum", per_sample_weights=self.codes)
        return rows.add_(b_dec)


@numba.njit(cache=True, nogil=True)
def _pack(starts, codes, most):  # type: ignore[no-untyped-def]
    """The codes [b, most] of lists as in Active, zeros behind them."""
    packed = np.zeros((len(starts) - 1, most), codes.dtype)
    for row in range(len(packed)):
        for entry in range(starts[row], starts[row + 1]):
            packed[row, entry - starts[row]] = codes[entry]
    return packed

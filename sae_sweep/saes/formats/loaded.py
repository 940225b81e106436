"""An SAE as the file that holds it describes it, whichever library wrote the file.

The architectures of this package compare contributions z‖d‖, other libraries compare activations z: where decoder rows
differ in norm, the two choose other latents. A loaded SAE therefore computes its codes by itself, as its library does.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae_sweep.errors import UserError
from sae_sweep.saes.folding import extras, unfold
from sae_sweep.saes.parameters import Parameters, SaeTensors

# Decoder norms within this factor are one norm.
ALIKE = 1e-3


@dataclass(frozen=True)
class LoadedSae(SaeTensors):
    """An SAE that takes raw activations [b, d]: centring, scales and factors of its file are folded into its tensors.

    library: who wrote the file · kind: the library's own name for the architecture
    architecture: the one of this package that selects latents alike: relu, topk, jumprelu, gated; or groupmax, which
    keeps the largest of each of k groups of latents that follow each other, or matching_pursuit of at most k steps
    parameters: `thresholds` [width] (JumpReLU) are compared with what `by_contribution` says
    k: latents kept per input (TopK), groups (groupmax), or steps
    until: matching pursuit ends where less than this norm is left of an input; once: or a latent is chosen again
    by_contribution: contributions z‖d‖ are compared with thresholds and each other, instead of activations z
    squashed: codes are tanh of what they would be otherwise
    """

    library: str
    kind: str
    architecture: str
    parameters: Parameters = field(repr=False)
    k: int | None = None
    by_contribution: bool = False
    squashed: bool = False
    until: float = 0.0
    once: bool = False

    @torch.no_grad()
    def encode(self, acts: Tensor) -> Tensor:
        """Codes [b, width] of activations [b, d]: those that the library itself computes."""
        parameters = self.parameters
        if self.architecture == "matching_pursuit":
            return self._pursued(acts)
        pre = acts @ parameters.W_enc.T + parameters.b_enc
        codes = pre.relu()
        if self.architecture == "gated":
            magnitudes = parameters.r_mag.exp() * (pre - parameters.b_enc) + parameters.b_mag
            codes = magnitudes.relu() * (pre > 0)
        elif self.architecture == "topk":
            codes = _kept(codes, self._compared(codes).topk(self._k, dim=-1).indices)
        elif self.architecture == "groupmax":
            largest = codes.unflatten(-1, (self._k, -1)).argmax(-1)
            codes = _kept(codes, largest + torch.arange(self._k, device=codes.device) * (codes.shape[-1] // self._k))
        elif self.architecture == "jumprelu":
            codes = codes * (self._compared(codes) > parameters.thresholds)
        return codes.tanh() if self.squashed else codes

    def _pursued(self, acts: Tensor) -> Tensor:
        """Codes step by step: of what is left, all that the row of largest pre-activation takes."""
        parameters, left = self.parameters, acts
        codes, over = acts.new_zeros(len(acts), len(self.W_dec)), acts.new_zeros(len(acts), 1, dtype=torch.bool)
        for _ in range(self._k):
            value, best = (left @ parameters.W_enc.T + parameters.b_enc).relu().max(1, keepdim=True)
            value = value.masked_fill(over, 0.0)
            if self.once:
                over = over | (value == 0) | (codes.gather(1, best) > 0)
            codes = codes.scatter_add(1, best, value)
            left = left - value * parameters.W_dec[best[:, 0]]
            over = over | ((left - parameters.b_dec).norm(dim=1, keepdim=True) < self.until)
        return codes

    @property
    def _k(self) -> int:
        assert self.k is not None, "a count comes with what selects by it"
        return self.k

    def _compared(self, codes: Tensor) -> Tensor:
        return codes * self.parameters.norms() if self.by_contribution else codes

    def normalised(self, mean: Tensor, scale: float) -> LoadedSae:
        """The same SAE on x = (raw − mean)·scale: the same codes, and (x̂ − mean)·scale where x̂ was reconstructed."""
        parameters, own = unfold(self.parameters, mean, scale), extras(self.parameters)
        if "thresholds" in own and not self.by_contribution:  # codes, and with them thresholds on them, stay
            parameters = parameters.replace(thresholds=own["thresholds"])
        return dataclasses.replace(self, parameters=parameters, until=self.until * scale)

    def to(self, device: str | torch.device) -> LoadedSae:
        """The same SAE on `device`."""
        return dataclasses.replace(self, parameters=self.parameters.map(lambda tensor: tensor.to(device)))

    def as_ours(self) -> tuple[str, Parameters]:
        """The architecture of this package that gives the same codes, and its parameters on raw activations.

        UserError where none does: TopK by activations whose decoder rows differ in norm, groupmax, tanh.
        """
        norms = self.parameters.norms()
        if self.squashed or self.architecture in ("groupmax", "matching_pursuit"):
            raise UserError(f"no architecture here computes {'tanh-relu' if self.squashed else self.architecture}")
        if self.by_contribution:
            return self.architecture, self.parameters
        if self.architecture == "topk" and norms.max() > norms.min() * (1 + ALIKE):
            raise UserError("this TopK SAE chooses by activations although its decoder rows differ in norm")
        if "thresholds" not in extras(self.parameters):
            return self.architecture, self.parameters
        return self.architecture, self.parameters.replace(thresholds=self.parameters.thresholds * norms)


def _kept(codes: Tensor, indices: Tensor) -> Tensor:
    """The codes [b, width] at `indices` [b, kept], zero elsewhere."""
    return torch.zeros_like(codes).scatter(-1, indices, codes.gather(-1, indices))

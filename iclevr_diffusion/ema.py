import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

SINGULAR_VECTORS = ("._u", "._v")  # as torch.nn.utils.parametrizations.spectral_norm calls its buffers


class ExponentialMovingAverage:
    """Averaged copy of a model's parameters and buffers, the weights that one samples from and saves.

    After the n-th optimisation step `average = d * average + (1 - d) * current` with
    `d = min(decay, (1 + n) / (10 + n))`, so that a short run is not held back by its random start. Buffers that hold
    floating point numbers (running statistics of a BatchNorm) are averaged like parameters, because the averaged
    weights want the statistics of their own activations; others (counters) are copied, and so are the singular vectors
    of a spectral norm, of which an average would have lost its length. The averaging of sampled weights follows *Denoising Diffusion Probabilistic Models* (Ho et al., 2020, https://arxiv.org/abs/2006.11239).

    Args:
        model: The model to follow, before it is wrapped for several processes or mixed precision.
        decay: Share of the old average that is kept at each step once the start is over, in [0, 1).

    Attributes:
        model: The averaged copy, in evaluation mode and without gradients.

    Raises:
        ValueError: If `decay` lies outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must lie in [0, 1), got {decay}.")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        """Moves the average towards `model`, wrapped or not; call it once after each optimisation step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        for (name, ours), (_, theirs) in zip(_tensors(self.model), _tensors(model), strict=True):
            if ours.is_floating_point() and not name.endswith(SINGULAR_VECTORS):
                averaged.append(ours)
                current.append(theirs)
            else:
                ours.copy_(theirs)
        get_ema_multi_avg_fn(decay)(averaged, current, self.num_updates)

    def state_dict(self) -> dict[str, Any]:
        """Returns the averaged weights and the number of steps that they have seen."""
        return {"num_updates": self.num_updates, "model": self.model.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.num_updates = state_dict["num_updates"]
        self.model.load_state_dict(state_dict["model"])


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    # Not by the names of `state_dict`: wrappers put a prefix before them, while they leave the order of these alone.
    return [*model.named_parameters(), *model.named_buffers()]

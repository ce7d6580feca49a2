import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

LONGEST = 12**-0.5  # relative length of the plain mean of all steps
SINGULAR_VECTORS = ("._u", "._v")  # as torch.nn.utils.parametrizations.spectral_norm calls its buffers


class Average:
    """Averaged copy of a model's parameters and buffers; the subclasses say how much of it is kept at a step.

    After each optimisation step `average = d * average + (1 - d) * current`. Buffers that hold floating point numbers
    (running statistics of a BatchNorm) are averaged like parameters, because the averaged weights want the statistics of
    their own activations; others (counters) are copied, and so are the singular vectors of a spectral norm, of which an
    average would have lost its length.

    Args:
        model: The model to follow, before it is wrapped for several processes or mixed precision.

    Attributes:
        model: The averaged copy, in evaluation mode and without gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.num_updates = 0

    def kept(self) -> float:
        """Returns d of step `num_updates`, the share of the old average that is kept."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        """Moves the average towards `model`, wrapped or not; call it once after each optimisation step."""
        self.num_updates += 1
        decay = self.kept()
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


class ExponentialMovingAverage(Average):
    """Average over about the last `1 / (1 - decay)` steps, the weights that one samples from and saves.

    At the n-th step `d = min(decay, (1 + n) / (10 + n))`, so that a short run is not held back by its random start. The
    averaging of sampled weights follows *Denoising Diffusion Probabilistic Models* (Ho et al., 2020,
    https://arxiv.org/abs/2006.11239).

    Args:
        model: The model to follow, before it is wrapped for several processes or mixed precision.
        decay: Share of the old average that is kept at each step once the start is over, in [0, 1).

    Raises:
        ValueError: If `decay` lies outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must lie in [0, 1), got {decay}.")
        super().__init__(model)
        self.decay = decay

    def kept(self) -> float:  # noqa: D102
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))


class PowerFunctionAverage(Average):
    """Averaged copy of a model whose length is a share of the training so far, however long that will have been.

    *Analyzing and Improving the Training Dynamics of Diffusion Models* (Karras et al., 2024,
    https://arxiv.org/abs/2312.02696): after step t the weights of step s have a share in the average that grows as
    `s^gamma`. That is a decay of `(1 - 1/t)^(gamma + 1)`, eq. 2; the first one is 0, so that nothing of the random start
    stays. Several lengths are kept side by side and one is chosen after the training, of which a single average, kept
    throughout, would want to be known before.

    Args:
        model: The model to follow.
        length: Standard deviation of the averaged steps as a share of the training, above 0 and below .289, that of a
            plain mean; the paper's best lie between .01 and .2.

    Raises:
        ValueError: If `length` is out of range.
    """

    def __init__(self, model: nn.Module, length: float) -> None:
        self.exponent = power_function_exponent(length)
        super().__init__(model)

    def kept(self) -> float:  # noqa: D102
        return (1 - 1 / self.num_updates) ** (self.exponent + 1)


def power_function_exponent(length: float) -> float:
    """Returns gamma for a relative length, `length = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2)`, eq. 123.

    Raises:
        ValueError: If `length` does not lie between 0 and 12^(-1/2), that of gamma = 0.
    """
    if not 0 < length < LONGEST:
        raise ValueError(f"`length` must lie between 0 and {LONGEST:.3f}, got {length}.")
    # (gamma + 2)^2 (gamma + 3) = (gamma + 1) / length^2, a cubic whose greatest real root is the only one above 0.
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots[np.isreal(roots)].real.max())


def make_averages(model: nn.Module, decay: float, lengths: Sequence[float] = ()) -> dict[str, Average]:
    """Makes an exponential average and, beside it, power function averages of some lengths.

    Args:
        model: The model to follow.
        decay: That of the exponential average.
        lengths: Those of the others.

    Returns:
        The averages by what tells their names apart: none for the exponential one, `-0.05` for one of that length.
    """
    averages: dict[str, Average] = {"": ExponentialMovingAverage(model, decay)}
    return averages | {f"-{length}": PowerFunctionAverage(model, length) for length in lengths}


def check_lengths(name: str, lengths: Sequence[float]) -> None:
    """Refuses lengths of power function averages that cannot be.

    Raises:
        ValueError: If one is out of range or there twice; it names the option `name`.
    """
    if len(set(lengths)) < len(lengths) or not all(0 < length < LONGEST for length in lengths):
        raise ValueError(f"`{name}` must differ and lie between 0 and {LONGEST:.3f}, got {list(lengths)}.")


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    # Not by the names of `state_dict`: wrappers put a prefix before them, while they leave the order of these alone.
    return [*model.named_parameters(), *model.named_buffers()]

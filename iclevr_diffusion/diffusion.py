"""Times, noise, targets and weights of a denoising loss, as pure functions of tensors.

All schedules are one formula, `x_t = alpha * x_0 + sigma * noise`, with `alpha` and `sigma` of shape (B, 1, 1, 1).
"""

from typing import Literal

import torch
from torch import Tensor


def sample_times(
    batch_size: int,
    sampling: Literal["uniform", "logit-normal"] = "uniform",
    *,
    shift: float = 1.0,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws the times (B,) at which a batch is trained, in [0, 1): 0 is the clean image, 1 is noise.

    Args:
        batch_size: Number of times.
        sampling: `uniform`, or `logit-normal` for the sigmoid of standard normal numbers, which favours the middle:
            *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis* (Esser et al., 2024,
            https://arxiv.org/abs/2403.03206), eq. 19.
        shift: The times are moved towards noise by `shift_times`; 1 leaves them alone.
        device: Where the times are made.
        generator: Source of the draws.

    Raises:
        ValueError: If `sampling` is unknown.
    """
    if sampling == "uniform":
        times = torch.rand(batch_size, device=device, generator=generator)
    elif sampling == "logit-normal":
        times = torch.randn(batch_size, device=device, generator=generator).sigmoid()
    else:
        raise ValueError(f"`sampling` must be `uniform` or `logit-normal`, got {sampling!r}.")
    return shift_times(times, shift)


def shift_times(times: Tensor, shift: float) -> Tensor:
    """Moves times in [0, 1] towards noise, `t' = s t / (1 + (s - 1) t)`, eq. 23 of Esser et al. (2024).

    How much noise hides an image depends on its size and content, so that `shift` is a setting: 1 leaves the times
    alone, 3 moves the middle to .75.

    Raises:
        ValueError: If `shift` is not positive.
    """
    if not shift > 0:
        raise ValueError(f"`shift` must be positive, got {shift}.")
    return shift * times / (1 + (shift - 1) * times)


def noise_levels(times: Tensor, alphas_cumprod: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Places times (B,) in [0, 1) on a noise schedule.

    Args:
        times: The times.
        alphas_cumprod: The products (T,) of a variance-preserving schedule, as diffusers' schedulers hold them, for
            *Denoising Diffusion Probabilistic Models* (Ho et al., 2020, https://arxiv.org/abs/2006.11239), eq. 4; `None`
            is the straight path of *Flow Matching for Generative Modeling* (Lipman et al., 2023,
            https://arxiv.org/abs/2210.02747), `alpha = 1 - t` and `sigma = t`.

    Returns:
        The network's timesteps (B,), whole numbers from 0 to T - 1 or, on the straight path, 1000 t; `alpha` and `sigma`.
    """
    if alphas_cumprod is None:
        sigma = times.view(-1, 1, 1, 1)
        return 1000 * times, 1 - sigma, sigma
    num_train_timesteps = len(alphas_cumprod)
    # A time next to 1 can be rounded up to it.
    timesteps = (num_train_timesteps * times).long().clamp(max=num_train_timesteps - 1)
    alpha_squared = alphas_cumprod.to(times.device)[timesteps].view(-1, 1, 1, 1)
    return timesteps, alpha_squared.sqrt(), (1 - alpha_squared).sqrt()


def add_noise(x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Returns `x_t = alpha * x_0 + sigma * noise` (B, C, H, W)."""
    return alpha * x_0 + sigma * noise


def training_target(prediction_type: str, x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Returns what the network is to predict from x_t (B, C, H, W).

    `epsilon`: the noise; `sample`: x_0; `v_prediction`: `alpha * noise - sigma * x_0` of *Progressive Distillation for
    Fast Sampling of Diffusion Models* (Salimans and Ho, 2022, https://arxiv.org/abs/2202.00512), appendix D;
    `flow`: the velocity `noise - x_0` of Lipman et al. (2023), which belongs to the straight path.

    Raises:
        ValueError: If `prediction_type` is none of them.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x_0
    if prediction_type == "v_prediction":
        return alpha * noise - sigma * x_0
    if prediction_type == "flow":
        return noise - x_0
    raise ValueError(
        f"`prediction_type` must be `epsilon`, `sample`, `v_prediction` or `flow`, got {prediction_type!r}."
    )


def min_snr_weight(prediction_type: str, alpha: Tensor, sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """Returns the weights (B, 1, 1, 1) of squared errors under which no noise level rules the others.

    *Efficient Diffusion Training via Min-SNR Weighting Strategy* (Hang et al., 2023, https://arxiv.org/abs/2303.09556)
    weights the error of x_0 by `min(SNR, gamma)` with `SNR = alpha^2 / sigma^2`. An error e of x_0 is an error
    `alpha / sigma * e` of epsilon and `e / sigma` of v (there `alpha^2 + sigma^2 = 1`) and of the flow's velocity, hence
    `min(SNR, gamma) / SNR` for epsilon and `min(SNR, gamma) * sigma^2` for the other two. The latter is the paper's
    `min(SNR, gamma) / (SNR + 1)` for v; for the flow, which the paper does not treat, it is ours.

    Raises:
        ValueError: If `prediction_type` is unknown, or `gamma` is not positive.
    """
    if not gamma > 0:
        raise ValueError(f"`gamma` must be positive, got {gamma}.")
    alpha_squared, sigma_squared = alpha.square(), sigma.square()
    if prediction_type == "epsilon":  # written so that SNR = 0 gives 1, its limit
        return (gamma * sigma_squared / alpha_squared).clamp(max=1)
    if prediction_type in ("v_prediction", "flow"):  # ... and SNR = infinity gives 0
        return torch.minimum(alpha_squared, gamma * sigma_squared)
    if prediction_type == "sample":
        return (alpha_squared / sigma_squared).clamp(max=gamma)
    raise ValueError(
        f"`prediction_type` must be `epsilon`, `sample`, `v_prediction` or `flow`, got {prediction_type!r}."
    )

"""Times, noise, targets and weights of a denoising loss, as pure functions of tensors.

All schedules are one formula, `x_t = alpha * x_0 + sigma * noise`, with `alpha` and `sigma` of shape (B, 1, 1, 1).

So is that of *Elucidating the Design Space of Diffusion-Based Generative Models* (Karras et al., 2022,
https://arxiv.org/abs/2206.00364), here `edm`. Its images `x_0 + s * noise` reach the network times `c_in`, which is
`1 / sqrt(s^2 + 1)` for standardized images, whose `sigma_data` is 1: hence `alpha = c_in` and `sigma = s * c_in`.
"""

from typing import Literal

import torch
from diffusers import SchedulerMixin
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
            https://arxiv.org/abs/2403.03206), eq. 19. As `s = t / (1 - t)` is noise over signal, this is EDM's
            log-normal s, `ln s ~ N(P_mean, P_std^2)`, with `P_std = 1` and, by the shift, `P_mean = ln(shift)`.
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


def path_of(
    prediction_type: str, scheduler: SchedulerMixin, device: torch.device | str = "cpu"
) -> Tensor | Literal["flow", "edm"]:
    """Returns the way from image to noise that a network knows, as `noise_levels` takes it.

    Args:
        prediction_type: What the network predicts.
        scheduler: A scheduler of diffusers that samples from it.
        device: Where a schedule is wanted.
    """
    return prediction_type if prediction_type in ("flow", "edm") else scheduler.alphas_cumprod.to(device)


def noise_levels(times: Tensor, path: Tensor | Literal["flow", "edm"] = "flow") -> tuple[Tensor, Tensor, Tensor]:
    """Places times (B,) in [0, 1) on the way from image to noise.

    Args:
        times: The times; above 0 for `edm`.
        path: The products (T,) of a variance-preserving schedule, as diffusers' schedulers hold them in
            `alphas_cumprod`, for *Denoising Diffusion Probabilistic Models* (Ho et al., 2020,
            https://arxiv.org/abs/2006.11239), eq. 4; `flow` is the straight path of *Flow Matching for Generative
            Modeling* (Lipman et al., 2023, https://arxiv.org/abs/2210.02747), `alpha = 1 - t` and `sigma = t`; `edm` has
            the noise `s = t / (1 - t)` of Karras et al. (2022), table 1.

    Returns:
        The network's timesteps (B,): whole numbers from 0 to T - 1, on the straight path 1000 t, for `edm`
        `c_noise = ln(s) / 4`; `alpha` and `sigma`.
    """
    if isinstance(path, Tensor):
        num_train_timesteps = len(path)
        # A time next to 1 can be rounded up to it.
        timesteps = (num_train_timesteps * times).long().clamp(max=num_train_timesteps - 1)
        alpha_squared = path.to(times.device)[timesteps].view(-1, 1, 1, 1)
        return timesteps, alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
    sigma = times.view(-1, 1, 1, 1)
    alpha = 1 - sigma
    if path == "flow":
        return 1000 * times, alpha, sigma
    length = torch.hypot(alpha, sigma)  # 1 / sqrt(s^2 + 1) and s / sqrt(s^2 + 1), without an s that may be large
    return times.logit() / 4, alpha / length, sigma / length


def add_noise(x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Returns `x_t = alpha * x_0 + sigma * noise` (B, C, H, W)."""
    return alpha * x_0 + sigma * noise


def training_target(prediction_type: str, x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Returns what the network is to predict from x_t (B, C, H, W).

    `epsilon`: the noise; `sample`: x_0; `v_prediction`: `alpha * noise - sigma * x_0` of *Progressive Distillation for
    Fast Sampling of Diffusion Models* (Salimans and Ho, 2022, https://arxiv.org/abs/2202.00512), appendix D;
    `flow`: the velocity `noise - x_0` of Lipman et al. (2023), which belongs to the straight path; `edm`: what F must be
    in eq. 7 of Karras et al. (2022), `D(x; s) = c_skip x + c_out F(c_in x; c_noise)`, so that D is x_0. For a
    `sigma_data` of 1 it is `sigma * x_0 - alpha * noise`, the negative of v, and EDM's weight of the error of D,
    `1 / c_out^2` (its eq. 8), is a weight of 1 of the error of F.

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
    if prediction_type == "edm":
        return sigma * x_0 - alpha * noise
    raise ValueError(
        f"`prediction_type` must be `epsilon`, `sample`, `v_prediction`, `flow` or `edm`, got {prediction_type!r}."
    )


def min_snr_weight(prediction_type: str, alpha: Tensor, sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """Returns the weights (B, 1, 1, 1) of squared errors under which no noise level rules the others.

    *Efficient Diffusion Training via Min-SNR Weighting Strategy* (Hang et al., 2023, https://arxiv.org/abs/2303.09556)
    weights the error of x_0 by `min(SNR, gamma)` with `SNR = alpha^2 / sigma^2`. An error e of x_0 is an error
    `alpha / sigma * e` of epsilon and `e / sigma` of v (there `alpha^2 + sigma^2 = 1`), of EDM's F, which is -v, and of
    the flow's velocity, hence `min(SNR, gamma) / SNR` for epsilon and `min(SNR, gamma) * sigma^2` for the other three.
    The latter is the paper's `min(SNR, gamma) / (SNR + 1)` for v; for the flow, which the paper does not treat, it is
    ours.

    Raises:
        ValueError: If `prediction_type` is unknown, or `gamma` is not positive.
    """
    if not gamma > 0:
        raise ValueError(f"`gamma` must be positive, got {gamma}.")
    alpha_squared, sigma_squared = alpha.square(), sigma.square()
    if prediction_type == "epsilon":  # written so that SNR = 0 gives 1, its limit
        return (gamma * sigma_squared / alpha_squared).clamp(max=1)
    if prediction_type in ("v_prediction", "edm", "flow"):  # ... and SNR = infinity gives 0
        return torch.minimum(alpha_squared, gamma * sigma_squared)
    if prediction_type == "sample":
        return (alpha_squared / sigma_squared).clamp(max=gamma)
    raise ValueError(
        f"`prediction_type` must be `epsilon`, `sample`, `v_prediction`, `flow` or `edm`, got {prediction_type!r}."
    )


def error_weight(
    prediction_type: str,
    alpha: Tensor,
    sigma: Tensor,
    min_snr_gamma: float | None = None,
    puts_out_images: bool = False,
    *,
    min_time: float = 0.05,
) -> Tensor:
    """Returns the weights (B, 1, 1, 1) of squared errors in training.

    Where a flow's velocity follows from an image, as `(x_t - x_0) / t`, errors of the image would count for `1 / t^2`,
    without bound next to the clean image. Here they count as if t were at least `min_time`, t_eps of *Back to Basics: Let
    Denoising Generative Models Denoise* (Li and He, 2025, https://arxiv.org/abs/2511.13720).

    Args:
        prediction_type: What the network predicts.
        alpha: Share of the image (B, 1, 1, 1) in x_t.
        sigma: Share of the noise (B, 1, 1, 1).
        min_snr_gamma: Gamma of `min_snr_weight`; none weighs all noise levels alike.
        puts_out_images: Whether the velocity of a flow follows from an image.
        min_time: Time below which the weight of that image stays.
    """
    weight = torch.ones_like(sigma)
    if puts_out_images:
        weight = (sigma / min_time).clamp(max=1).square()
    if min_snr_gamma is not None:
        weight = weight * min_snr_weight(prediction_type, alpha, sigma, min_snr_gamma)
    return weight

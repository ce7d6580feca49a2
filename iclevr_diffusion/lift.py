"""How well images fit what was asked for by the account of the model that drew them."""

import numpy as np
import torch
from torch import LongTensor, Tensor

from iclevr_diffusion.diffusion import add_noise, noise_levels, path_of, training_target
from iclevr_diffusion.pipelines.pipeline_conditional_ddpm import ConditionalDDPMPipeline

NUM_DRAWS = 8  # of time and noise, at which the losses of an image are taken


@torch.no_grad()
def measure_lift(
    pipeline: ConditionalDDPMPipeline,
    pixel_values: np.ndarray,
    requests: list[str | list[str]],
    *,
    num_draws: int = NUM_DRAWS,
    batch_size: int = 64,
) -> Tensor:
    """Measures how much better images are denoised with their labels than without them.

    The lift of an image x under a condition c is the mean over times t and noise of
    `|target - f(x_t, t)|^2 - |target - f(x_t, t, c)|^2`, with the network f and the target it was trained to predict. In
    *Improving Compositional Generation with Diffusion Models Using Lift Scores* (Yu and Gao, 2025,
    https://arxiv.org/abs/2505.13740) the target is the noise, and the lift an estimate of log p(x | c) - log p(x); any
    other target weighs the times otherwise; of networks that put out images, errors are those of x_0. As all conditions
    of an image are to hold, its lift is the least one, and that of a negated condition counts with the other sign; their
    weights do not count. Times are the middles of `num_draws` equal parts of [0, 1], and the noise at each is the same
    for all images, so that images can be compared.

    Args:
        pipeline: The pipeline that drew them, of a network with a null condition.
        pixel_values: The images, uint8 (N, C, H, W).
        requests: What each image was asked for, text or labels.
        num_draws: How many times are taken.
        batch_size: Images that go through the network at once.

    Returns:
        Lifts (N,), float32, on the CPU; a mean over the values of an image.
    """
    unet, device = pipeline.unet, pipeline.device
    dtype = next(unet.parameters()).dtype
    path = path_of(unet.config.prediction_type, pipeline.scheduler, device)
    times = (torch.arange(num_draws) + 0.5) / num_draws
    noises = torch.randn((num_draws, *pixel_values.shape[1:]), generator=torch.Generator().manual_seed(0))
    lifts = torch.empty(len(pixel_values))
    for group in pipeline.encode_compositions(requests):
        for rows in torch.arange(len(group.images)).split(batch_size):
            chunk = group.of(rows).to(device, dtype)
            class_labels, null_mask = chunk.rows(with_null=True)
            num_rows = len(chunk.weights) + 1
            x_0 = unet.standardize(torch.from_numpy(pixel_values[chunk.images.numpy()]).to(device) / 127.5 - 1)
            signed = torch.zeros(len(chunk.weights), len(rows), device=device)
            for time, noise in zip(times, noises, strict=True):
                timesteps, alpha, sigma = noise_levels(time.to(device).expand(len(rows)), path)
                noise = noise.to(device).expand_as(x_0)
                x_t = add_noise(x_0, noise, alpha, sigma).to(dtype)
                prediction = unet(
                    torch.cat([x_t] * num_rows), timesteps.repeat(num_rows), class_labels, null_mask
                ).sample
                target = training_target(unet.config.prediction_type, x_0, noise, alpha, sigma)
                losses = (prediction.float().unflatten(0, (num_rows, -1)) - target).square().flatten(2).mean(dim=2)
                if unet.config.get("network_output") == "sample":  # whose errors are those of x_0 by t
                    losses = losses * time.square()
                signed += chunk.weights.sign() * (losses[-1] - losses[:-1])
            lifts[chunk.images] = (signed / num_draws).amin(dim=0).cpu()
    return lifts


def choose_best(lifts: Tensor, num_candidates: int) -> LongTensor:
    """Picks of each `num_candidates` replicates in succession the one of the highest lift.

    Args:
        lifts: Lifts (num_conditions, num_replicates); the second is a multiple of `num_candidates`.
        num_candidates: How many images one is picked from.

    Returns:
        Numbers of the replicates (num_conditions, num_replicates / num_candidates).
    """
    best = lifts.unflatten(1, (-1, num_candidates)).argmax(dim=2)
    return best + torch.arange(best.shape[1]) * num_candidates

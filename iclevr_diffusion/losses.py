"""What the networks minimize, as pure functions of tensors.

Every loss is a scalar, the mean over the batch, computed in float32 whatever the inputs' dtype. Discriminators and
critics give logits (B,), high for real images; images are `pixel_values` (B, C, H, W) in [-1, 1]; `class_labels` are
multi-hot rows (B, K). Weights stand in the training loop, not here.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Asks for logits above 1 on real and below -1 on fake images, and no more.

    The hinge of *Geometric GAN* (Lim and Ye, 2017, https://arxiv.org/abs/1705.02894), written as in eq. 4 of
    *Self-Attention Generative Adversarial Networks* (Zhang et al., 2019, https://arxiv.org/abs/1805.08318).

    Args:
        real_logits: Logits (B,) of real images.
        fake_logits: Logits (B',) of generated images.
    """
    _check_logits(real_logits=real_logits, fake_logits=fake_logits)
    return F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean()


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """Asks for high logits (B,) on generated images; the other half of `hinge_discriminator_loss`."""
    _check_logits(fake_logits=fake_logits)
    return -fake_logits.float().mean()


def nonsaturating_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Cross-entropy of telling real from fake images: the mean of the two halves.

    Eq. 1 of *Generative Adversarial Networks* (Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661), negated and
    halved.

    Args:
        real_logits: Logits (B,) of real images.
        fake_logits: Logits (B',) of generated images.
    """
    _check_logits(real_logits=real_logits, fake_logits=fake_logits)
    # softplus(x) = -log(sigmoid(-x))
    return 0.5 * (F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean())


def nonsaturating_generator_loss(fake_logits: Tensor) -> Tensor:
    """Minus the log-probability that generated images with logits (B,) are real.

    Section 3 of *Generative Adversarial Networks* (Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661): its
    gradient does not vanish where the discriminator is sure, unlike that of log(1 - D).
    """
    _check_logits(fake_logits=fake_logits)
    return F.softplus(-fake_logits.float()).mean()


def wasserstein_critic_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Mean score of fake minus mean score of real images: minus the estimate of their distance.

    Eq. 2 of *Wasserstein GAN* (Arjovsky et al., 2017, https://arxiv.org/abs/1701.07875), negated. It bounds the
    distance only while the critic's slope is bounded, by clipped weights or by `gradient_penalty`.

    Args:
        real_logits: Scores (B,) of real images.
        fake_logits: Scores (B',) of generated images.
    """
    _check_logits(real_logits=real_logits, fake_logits=fake_logits)
    return fake_logits.float().mean() - real_logits.float().mean()


def wasserstein_generator_loss(fake_logits: Tensor) -> Tensor:
    """Asks for high scores (B,) of generated images; the other half of `wasserstein_critic_loss`."""
    _check_logits(fake_logits=fake_logits)
    return -fake_logits.float().mean()


# What the two networks of a GAN minimize: the discriminator's loss of real and fake logits, the generator's of fake ones.
ADVERSARIAL_LOSSES = {
    "hinge": (hinge_discriminator_loss, hinge_generator_loss),
    "nonsaturating": (nonsaturating_discriminator_loss, nonsaturating_generator_loss),
    "wasserstein": (wasserstein_critic_loss, wasserstein_generator_loss),
}


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    real_pixel_values: Tensor,
    fake_pixel_values: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean of (|gradient of the critic| - 1)^2 at random points between real and fake images.

    The second term of eq. 3 of *Improved Training of Wasserstein GANs* (Gulrajani et al., 2017,
    https://arxiv.org/abs/1704.00028) without its weight, which is 10 there. The critic must score each image by
    itself: no batch normalization.

    Args:
        critic: Maps images (B, C, H, W) in float32 to scores (B,); fix the labels with a lambda.
        real_pixel_values: Real images (B, C, H, W).
        fake_pixel_values: Generated images of the same shape; no gradient reaches them.
        generator: Source of the positions between the two.
    """
    _check_same_shape(
        "fake_pixel_values", fake_pixel_values.shape, "real_pixel_values", real_pixel_values.shape, num_dims=4
    )
    real, fake = real_pixel_values.detach().float(), fake_pixel_values.detach().float()
    position = torch.rand((len(real), 1, 1, 1), generator=generator, device=real.device)
    gradient = _gradient(critic, torch.lerp(fake, real, position))
    # Unlike a square root of a sum, vector_norm has the slope 0, not NaN, where the gradient is 0.
    return (torch.linalg.vector_norm(gradient.flatten(1), dim=1) - 1).square().mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real_pixel_values: Tensor) -> Tensor:
    """Half the mean squared gradient of the discriminator at real images.

    R1, eq. 9 of *Which Training Methods for GANs do actually Converge?* (Mescheder et al., 2018,
    https://arxiv.org/abs/1801.04406) without its weight gamma, which is 10 there.

    Args:
        discriminator: Maps images (B, C, H, W) in float32 to logits (B,); fix the labels with a lambda.
        real_pixel_values: Real images (B, C, H, W).
    """
    if real_pixel_values.ndim != 4:
        raise ValueError(
            f"`real_pixel_values` must have shape (batch, channels, height, width), got {tuple(real_pixel_values.shape)}."
        )
    gradient = _gradient(discriminator, real_pixel_values.detach().float())
    return 0.5 * gradient.square().sum((1, 2, 3)).mean()


def auxiliary_loss(class_logits: Tensor, class_labels: Tensor) -> Tensor:
    """Cross-entropy of reading an image's labels, the mean over images and labels.

    L_C of *Conditional Image Synthesis With Auxiliary Classifier GANs* (Odena et al., 2017,
    https://arxiv.org/abs/1610.09585, eq. 3) with a sigmoid a label, since an image shows several.

    Args:
        class_logits: One logit a label (B, K), of real or generated images.
        class_labels: Multi-hot rows (B, K).
    """
    _check_same_shape("class_logits", class_logits.shape, "class_labels", class_labels.shape, num_dims=2)
    return F.binary_cross_entropy_with_logits(class_logits.float(), class_labels.float())


def evaluator_loss(evaluator_logits: Tensor, class_labels: Tensor) -> Tensor:
    """Cross-entropy of a frozen classifier that reads generated images, the mean over images and labels.

    Teaches a generator what a classifier sees, as classifier guidance does at sampling time in *Diffusion Models Beat
    GANs on Image Synthesis* (Dhariwal and Nichol, 2021, https://arxiv.org/abs/2105.05233). A generator trained so may
    not be judged by that classifier alone.

    Args:
        evaluator_logits: Logits (B, K) of the classifier, whose own parameters need no gradient.
        class_labels: Multi-hot rows (B, K) that the images were asked to show.
    """
    _check_same_shape("evaluator_logits", evaluator_logits.shape, "class_labels", class_labels.shape, num_dims=2)
    return F.binary_cross_entropy_with_logits(evaluator_logits.float(), class_labels.float())


def cycle_loss(cycled_pixel_values: Tensor, pixel_values: Tensor) -> Tensor:
    """Mean absolute difference between images and what comes back from the other domain: |F(G(x)) - x|.

    One of the two terms of eq. 2 of *Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks*
    (Zhu et al., 2017, https://arxiv.org/abs/1703.10593), whose weight is 10 there.

    Args:
        cycled_pixel_values: Images (B, C, H, W) that were mapped to the other domain and back.
        pixel_values: The images (B, C, H, W) that they were.
    """
    _check_same_shape("cycled_pixel_values", cycled_pixel_values.shape, "pixel_values", pixel_values.shape, num_dims=4)
    return F.l1_loss(cycled_pixel_values.float(), pixel_values.float())


def identity_loss(mapped_pixel_values: Tensor, pixel_values: Tensor) -> Tensor:
    """Mean absolute difference between images of a domain and what the map into that domain makes of them: |G(y) - y|.

    One of the two terms of L_identity in section 5.2 of *Unpaired Image-to-Image Translation using Cycle-Consistent
    Adversarial Networks* (Zhu et al., 2017, https://arxiv.org/abs/1703.10593), whose weight is half of the cycle's.

    Args:
        mapped_pixel_values: Images (B, C, H, W) of the target domain, mapped to it once more.
        pixel_values: The images (B, C, H, W) that they were.
    """
    _check_same_shape("mapped_pixel_values", mapped_pixel_values.shape, "pixel_values", pixel_values.shape, num_dims=4)
    return F.l1_loss(mapped_pixel_values.float(), pixel_values.float())


def vae_loss(
    prediction: Tensor,
    pixel_values: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    *,
    likelihood: Literal["gaussian", "bernoulli"] = "gaussian",
) -> tuple[Tensor, Tensor]:
    """The two terms whose sum is minus the bound on the log-likelihood, in nats an image.

    Eq. 10 and appendix B of *Auto-Encoding Variational Bayes* (Kingma and Welling, 2014,
    https://arxiv.org/abs/1312.6114): sums over pixels and latents, the mean over the batch.

    Args:
        prediction: The decoder's output (B, C, H, W): the mean of the pixels for "gaussian", the logits of their
            brightness (pixel + 1) / 2 for "bernoulli".
        pixel_values: Images (B, C, H, W) in [-1, 1].
        mean: Means (B, latent_dim) of the encoder's Gaussian.
        log_variance: Logarithms (B, latent_dim) of its variances.
        likelihood: "gaussian" of variance 1, without its constant, or "bernoulli".

    Returns:
        The reconstruction's cross-entropy, and the KL divergence of the encoder's Gaussian from N(0, 1).

    Raises:
        ValueError: If shapes differ, or `likelihood` is unknown.
    """
    _check_same_shape("prediction", prediction.shape, "pixel_values", pixel_values.shape, num_dims=4)
    _check_same_shape("log_variance", log_variance.shape, "mean", mean.shape, num_dims=2)
    if len(mean) != len(pixel_values):
        raise ValueError(f"`mean` must have one row an image, got {len(mean)} rows and {len(pixel_values)} images.")
    prediction, pixel_values = prediction.float(), pixel_values.float()
    if likelihood == "gaussian":
        per_pixel = 0.5 * (prediction - pixel_values).square()
    elif likelihood == "bernoulli":
        per_pixel = F.binary_cross_entropy_with_logits(prediction, (pixel_values + 1) / 2, reduction="none")
    else:
        raise ValueError(f'`likelihood` must be "gaussian" or "bernoulli", got {likelihood!r}.')
    mean, log_variance = mean.float(), log_variance.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return per_pixel.sum((1, 2, 3)).mean(), divergence.sum(1).mean()


def ramp_weight(weight: float, step: int, *, start: int, stop: int) -> float:
    """Lets a loss in slowly: 0 up to step `start`, `weight` from step `stop` on, a straight line between.

    Args:
        weight: The final weight.
        step: Number of the training step.
        start: Last step at which the weight is 0, unless `stop` is the same.
        stop: First step at which the weight is whole; at least `start`, and equal to it for no ramp.

    Raises:
        ValueError: If `stop` lies before `start`.
    """
    if stop < start:
        raise ValueError(f"`stop` must not lie before `start`, got start={start} and stop={stop}.")
    if step >= stop:
        return weight
    if step <= start:
        return 0.0
    return weight * (step - start) / (stop - start)


def _gradient(function: Callable[[Tensor], Tensor], pixel_values: Tensor) -> Tensor:
    """Gradient (B, C, H, W) of each image's own output, itself differentiable in the function's parameters."""
    pixel_values.requires_grad_()
    logits = function(pixel_values)
    if tuple(logits.shape) != (len(pixel_values),):
        raise ValueError(
            f"The network must give logits of shape ({len(pixel_values)},), got {tuple(logits.shape)}; pass the first"
            " output of a discriminator alone."
        )
    # An image's logit depends on that image alone, so that the gradient of the sum holds each one's own.
    return torch.autograd.grad(logits.float().sum(), pixel_values, create_graph=True)[0]


def _check_logits(**logits: Tensor) -> None:
    for name, tensor in logits.items():
        if tensor.ndim != 1:
            raise ValueError(f"`{name}` must have shape (batch,), got {tuple(tensor.shape)}; flatten the logits.")


def _check_same_shape(name: str, shape: torch.Size, other_name: str, other_shape: torch.Size, num_dims: int) -> None:
    if shape != other_shape or len(shape) != num_dims:
        raise ValueError(
            f"`{name}` must have the shape of `{other_name}` and {num_dims} dimensions, got {tuple(shape)} and"
            f" {tuple(other_shape)}."
        )

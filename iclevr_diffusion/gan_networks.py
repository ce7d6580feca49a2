"""The two networks of a GAN that a run can train, as its configuration says."""

import copy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from iclevr_diffusion.config import TrainConfig, option
from iclevr_diffusion.models.acgan import ACGANDiscriminator
from iclevr_diffusion.models.cgan import (
    CGANDiscriminator,
    CGANEmbeddingDiscriminator,
    CGANEmbeddingGenerator,
    CGANGenerator,
)
from iclevr_diffusion.models.dcgan import DCGANDiscriminator, DCGANGenerator
from iclevr_diffusion.models.projection import ProjectionDiscriminator
from iclevr_diffusion.models.sagan import SAGANDiscriminator, SAGANGenerator
from iclevr_diffusion.models.wgan import WGANCritic
from iclevr_diffusion.training_data import DataConfig, check_sizes

GENERATORS = {
    "dcgan": DCGANGenerator,
    "sagan": SAGANGenerator,
    "cgan": CGANGenerator,
    "cgan_embedding": CGANEmbeddingGenerator,
}
DISCRIMINATORS = {
    "dcgan": DCGANDiscriminator,
    "acgan": ACGANDiscriminator,
    "sagan": SAGANDiscriminator,
    "cgan": CGANDiscriminator,
    "cgan_embedding": CGANEmbeddingDiscriminator,
    "wgan": WGANCritic,
    "projection": ProjectionDiscriminator,
}
# Networks that can do without labels: a GAN as it was first.
WITHOUT_LABELS = ("cgan", "wgan")
# Generators that can draw deviations from the mean image.
STANDARDIZED = ("dcgan", "sagan")
# A penalty on gradients asks for a slope image by image, and batch normalization mixes the images of a batch.
WITHOUT_BATCH_NORM = ("sagan", "wgan", "projection")
# Discriminators whose slope is bounded by themselves: every layer that sees the image has spectral norm.
WITH_SPECTRAL_NORM = ("sagan", "projection")


@dataclass(kw_only=True)
class AdversarialConfig(DataConfig):
    """What every run of generators against discriminators is told."""

    betas: tuple[float, ...] = option((0.5, 0.999), "decay of Adam's two averages")
    max_grad_norm: float | None = option(None, "gradients longer than this are scaled down to it; none leaves them")
    ema_decay: float = option(0.0, "decay of the generators' averaged weights, the ones that are saved; 0 is off")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"`gradient_accumulation_steps` must be 1 for a GAN, got {self.gradient_accumulation_steps}; take a"
                " larger `batch_size`."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must lie in [0, 1), got {self.ema_decay}.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"`betas` must be two numbers in [0, 1), got {self.betas}.")


@dataclass(kw_only=True)
class GANNetworksConfig(AdversarialConfig):
    """What a run that trains a GAN is told about its networks and about what makes its discriminator smooth."""

    generator: Literal["dcgan", "sagan", "cgan", "cgan_embedding"] = option("dcgan", "network that draws")
    discriminator: Literal["dcgan", "acgan", "sagan", "cgan", "cgan_embedding", "wgan", "projection"] = option(
        "dcgan", "network that tells real images from drawn ones"
    )
    conditional: bool = option(True, "learn the labels; without them cgan is the plain GAN")
    latent_dim: int = option(100, "random numbers that the generator starts from")
    base_channels: int = option(64, "width of the generator")
    discriminator_channels: int | None = option(None, "width of the discriminator; none is its paper's")
    standardize: bool = option(False, "draw, and show the discriminator, images less their mean, at unit variance")
    gradient_penalty_weight: float = option(0.0, "weight of the gradient penalty of a critic, 10 in its paper")
    r1_weight: float = option(0.0, "weight of the gradient penalty on real images, 10 in its paper")
    r1_every: int = option(16, "steps between penalties on real images, whose weight is multiplied by it")
    clip_weights: float | None = option(None, "largest weight of a critic, as in the first WGAN")
    auxiliary_weight: float = option(0.0, "weight of the discriminator's own reading of the labels")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.conditional and not {self.generator, self.discriminator} <= set(WITHOUT_LABELS):
            raise ValueError(
                "`conditional` must be true for networks that need labels, got false for the generator"
                f" {self.generator} and the discriminator {self.discriminator}; take cgan and cgan or wgan."
            )
        if self.standardize and self.generator not in STANDARDIZED:
            raise ValueError(
                f"`standardize` must be false for the generator {self.generator}, got true; take"
                f" {' or '.join(STANDARDIZED)}."
            )
        for name in ("auxiliary_weight", "gradient_penalty_weight", "r1_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be finite and at least 0, got {getattr(self, name)}.")
        if (self.discriminator == "acgan") != (self.auxiliary_weight > 0):
            raise ValueError(
                "`auxiliary_weight` must be above 0 for the discriminator acgan, which learns the labels by it alone,"
                f" and 0 for any other, which reads none, got {self.auxiliary_weight} for {self.discriminator}."
            )
        for name in ("gradient_penalty_weight", "r1_weight"):
            if getattr(self, name) and self.discriminator not in WITHOUT_BATCH_NORM:
                raise ValueError(
                    f"`{name}` must be 0 for the discriminator {self.discriminator}, whose batch normalization looks at"
                    f" several images at once, got {getattr(self, name)}; take {', '.join(WITHOUT_BATCH_NORM[:-1])} or"
                    f" {WITHOUT_BATCH_NORM[-1]}."
                )
        if self.r1_every < 1:
            raise ValueError(f"`r1_every` must be at least 1, got {self.r1_every}.")
        if self.r1_weight and self.r1_every > self.max_steps:
            raise ValueError(
                f"`r1_every` must not exceed `max_steps` {self.max_steps}, or no step is penalized, got {self.r1_every}."
            )
        refuse_ignored(self, "r1_every", "`r1_weight`", self.r1_weight)
        if self.clip_weights is not None and not self.clip_weights > 0:
            raise ValueError(f"`clip_weights` must be positive or none, got {self.clip_weights}.")
        if self.clip_weights is not None and self.discriminator in WITH_SPECTRAL_NORM:
            raise ValueError(
                f"`clip_weights` must be none for the discriminator {self.discriminator}, whose spectral norm scales"
                f" clipped weights up again, got {self.clip_weights}."
            )
        narrow = copy.copy(self)  # widths have no part in it
        narrow.base_channels = narrow.discriminator_channels = 8
        statistics = np.zeros((1, self.resolution, self.resolution), dtype=np.float32), 1.0
        check_sizes(lambda: make_gan(narrow, int(self.conditional), 1, statistics), "cpu")


def refuse_ignored(config: TrainConfig, name: str, needs: str, is_given: object) -> None:
    """Refuses another value than the default for a setting that would change nothing.

    Args:
        config: The configuration.
        name: The setting.
        needs: What it goes with, in words.
        is_given: Whether that is given.

    Raises:
        ValueError: If it is not, and the setting has another value.
    """
    value, default = getattr(config, name), getattr(type(config), name)
    if not is_given and value != default:
        raise ValueError(
            f"`{name}` must be {default}, its default, without {needs}, got {value}, which would change nothing."
        )


class StandardizedDiscriminator(nn.Module):
    """A discriminator that is shown images less the data's mean image, at unit variance.

    Where images differ little from their mean, as scenes before one background do, a discriminator otherwise has to
    find the difference first.

    Args:
        discriminator: The network inside.
        mean: Mean image (C, H, W), in the units of pixels in [-1, 1].
        std: Deviation of the pixels from `mean`.
    """

    def __init__(self, discriminator: nn.Module, mean: Tensor, std: float) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.register_buffer("data_mean", mean)
        self.register_buffer("data_std", torch.tensor(std))

    def forward(self, pixel_values: Tensor, class_labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns what the network inside says of images (B, C, H, W) in [-1, 1]."""
        return self.discriminator((pixel_values - self.data_mean) / self.data_std, class_labels)


def make_gan(
    config: GANNetworksConfig, num_classes: int, num_channels: int, statistics: tuple[np.ndarray, float] | None = None
) -> tuple[nn.Module, nn.Module]:
    """Makes a freshly initialized generator and its discriminator.

    Args:
        config: The run's configuration.
        num_classes: Number of labels of the data.
        num_channels: Channels of their images.
        statistics: What `ImageStore.statistics` says of them, for `config.standardize`.
    """
    options = {"standardized": True} if config.standardize else {}
    generator = GENERATORS[config.generator](
        num_classes,
        config.resolution,
        num_channels,
        latent_dim=config.latent_dim,
        base_channels=config.base_channels,
        **options,
    )
    options = {}
    if config.discriminator_channels is not None:
        options["base_channels"] = config.discriminator_channels
    if config.discriminator == "wgan" and (config.gradient_penalty_weight or config.r1_weight):
        options["norm"] = "layer"
    discriminator = DISCRIMINATORS[config.discriminator](num_classes, config.resolution, num_channels, **options)
    if config.standardize:
        mean, std = torch.from_numpy(statistics[0]), statistics[1]
        generator.set_data_statistics(mean, std)
        discriminator = StandardizedDiscriminator(discriminator, mean, std)
    return generator, discriminator

from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class DCGANGenerator(ModelMixin, ConfigMixin):
    """Generator of transposed convolutions that draws an image of the given labels from noise.

    The network is the one of *Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
    Networks* (Radford et al., 2016, https://arxiv.org/abs/1511.06434), weights drawn from N(0, 0.02^2) included. The
    paper has no labels: ours pass a linear layer, so that several add up, and are joined to the noise. That layer
    keeps torch's own initialization, since at 0.02 the labels would be lost in noise of unit variance.

    For 64x64 images and 64 base channels the noise and labels (2 * latent_dim, 1, 1) become (512, 4, 4),
    (256, 8, 8), (128, 16, 16), (64, 32, 32) and the image (3, 64, 64); each halving of `sample_size` drops the first
    of these widths.

    Args:
        num_classes: Number of labels, the width of `class_labels`.
        sample_size: Height and width of the images in pixels, a power of two of at least 16.
        out_channels: Channels of the images.
        latent_dim: Width of the noise, and of the labels that are joined to it.
        base_channels: Channels of the last hidden stage; each stage before has twice as many.
        label_activation: Whether a ReLU follows the labels' linear layer.
        standardized: Whether the network draws the images' deviation from their mean, in units of its deviation, in
            the place of images that a tanh bounds; `set_data_statistics` says what these are.

    Raises:
        ValueError: If `sample_size` is not a power of two of at least 16.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 24,
        sample_size: int = 64,
        out_channels: int = 3,
        *,
        latent_dim: int = 100,
        base_channels: int = 64,
        label_activation: bool = False,
        standardized: bool = False,
    ) -> None:
        super().__init__()
        widths = [base_channels * 2**stage for stage in reversed(range(_count_stages(sample_size)))]
        self.label_embedding = nn.Linear(num_classes, latent_dim)
        layers = [nn.ConvTranspose2d(2 * latent_dim, widths[0], 4, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
        for before, after in pairwise(widths):
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.ConvTranspose2d(widths[-1], out_channels, 4, 2, 1, bias=False)]
        layers += [] if standardized else [nn.Tanh()]
        self.layers = nn.Sequential(*layers).apply(_initialize)
        if standardized:
            self.register_buffer("data_mean", torch.zeros(out_channels, sample_size, sample_size))
            self.register_buffer("data_std", torch.ones(()))

    def set_data_statistics(self, mean: Tensor, std: float) -> None:
        """Stores the mean image and the deviation around it that a `standardized` generator draws with.

        Args:
            mean: Mean image (out_channels, H, W), in the units of pixels in [-1, 1].
            std: Deviation of the pixels from `mean`, one positive number.

        Raises:
            ValueError: If the generator is not `standardized`, or a value does not fit.
        """
        if not self.config.standardized:
            raise ValueError("`standardized` must be true for a generator with data statistics; build one with it.")
        if tuple(mean.shape) != tuple(self.data_mean.shape) or not mean.isfinite().all() or not std > 0:
            raise ValueError(
                f"`mean` must be finite, of shape {tuple(self.data_mean.shape)}, and `std` positive, got"
                f" {tuple(mean.shape)} and {std}."
            )
        self.data_mean.copy_(mean)
        self.data_std.fill_(std)

    def forward(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        """Draws one image for each row of noise.

        Args:
            latents: Noise (B, latent_dim), of unit variance.
            class_labels: Multi-hot rows (B, num_classes).

        Returns:
            Images (B, out_channels, H, W) in [-1, 1], which a `standardized` network may leave by its errors.

        Raises:
            ValueError: If a shape does not fit.
        """
        _check_shape("latents", latents, ("batch", self.config.latent_dim), "draw them with `torch.randn`")
        _check_shape(
            "class_labels",
            class_labels,
            (len(latents), self.config.num_classes),
            "`pipe.encode_labels` makes them from names",
        )
        embedding = self.label_embedding(class_labels.to(latents.dtype))
        if self.config.label_activation:
            embedding = embedding.relu()
        sample = self.layers(torch.cat([latents, embedding], dim=1)[:, :, None, None])
        return self.data_mean + self.data_std * sample if self.config.standardized else sample


class DCGANDiscriminator(ModelMixin, ConfigMixin):
    """Discriminator of strided convolutions that sees the labels as one more channel of the image.

    The mirror of `DCGANGenerator` and of the same paper. Ours maps the labels to a plane of H * W numbers by a linear
    layer, and has no sigmoid: every loss here takes logits.

    For 64x64 images and 64 base channels an image and its plane (3 + 1, 64, 64) become (64, 32, 32), (128, 16, 16),
    (256, 8, 8), (512, 4, 4) and one logit; each halving of `sample_size` drops the last of these widths.

    Args:
        num_classes: Number of labels, the width of `class_labels`.
        sample_size: Height and width of the images in pixels, a power of two of at least 16.
        in_channels: Channels of the images.
        base_channels: Channels of the first stage; each stage after it has twice as many.

    Raises:
        ValueError: If `sample_size` is not a power of two of at least 16.
    """

    @register_to_config
    def __init__(
        self, num_classes: int = 24, sample_size: int = 64, in_channels: int = 3, *, base_channels: int = 64
    ) -> None:
        super().__init__()
        widths = [base_channels * 2**stage for stage in range(_count_stages(sample_size))]
        self.label_embedding = nn.Linear(num_classes, sample_size**2)
        layers = [nn.Conv2d(in_channels + 1, widths[0], 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(widths[-1], 1, 4, bias=False)]
        self.layers = nn.Sequential(*layers).apply(_initialize)

    def forward(self, pixel_values: Tensor, class_labels: Tensor) -> tuple[Tensor, None]:
        """Judges whether images are real and show their labels.

        Args:
            pixel_values: Images (B, in_channels, H, W) in [-1, 1].
            class_labels: Multi-hot rows (B, num_classes).

        Returns:
            Logits (B,), high for real images, and `None` in the place of the class logits, which it does not have.

        Raises:
            ValueError: If a shape does not fit.
        """
        size = self.config.sample_size
        _check_shape(
            "pixel_values",
            pixel_values,
            ("batch", self.config.in_channels, size, size),
            "resize the images, or build a model with another `sample_size` or `in_channels`",
        )
        _check_shape(
            "class_labels",
            class_labels,
            (len(pixel_values), self.config.num_classes),
            "`pipe.encode_labels` makes them from names",
        )
        plane = self.label_embedding(class_labels.to(pixel_values.dtype)).view(-1, 1, size, size)
        return self.layers(torch.cat([pixel_values, plane], dim=1)).flatten(), None


def _count_stages(sample_size: int) -> int:
    """Counts the halvings that lead from an image to 4x4 cells."""
    below = 2 ** (max(sample_size, 1).bit_length() - 1)
    if sample_size < 16 or sample_size != below:
        nearest = "16x16" if sample_size < 16 else f"{below}x{below} or {2 * below}x{2 * below}"
        raise ValueError(
            f"`sample_size` must be a power of two of at least 16, got {sample_size}; resize the images to {nearest}."
        )
    return below.bit_length() - 3


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, mean=1.0, std=0.02)


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int | str, ...], advice: str) -> None:
    """Refuses a tensor whose shape is not `shape`, where a word stands for any number."""
    got = None if tensor is None else tuple(tensor.shape)
    if got is None or len(got) != len(shape) or any(b not in (a, "batch") for a, b in zip(got, shape, strict=True)):
        raise ValueError(f"`{name}` must have shape ({', '.join(map(str, shape))}), got {got}; {advice}.")

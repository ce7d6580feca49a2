from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class WGANCritic(ModelMixin, ConfigMixin):
    """Critic of strided convolutions, whose output is a score without bounds rather than a probability.

    The convolutions of a DCGAN's discriminator, as in *Wasserstein GAN* (Arjovsky et al., 2017,
    https://arxiv.org/abs/1701.07875), where batch normalization goes with clipped weights. A gradient penalty needs a
    critic that scores each image by itself: *Improved Training of Wasserstein GANs* (Gulrajani et al., 2017,
    https://arxiv.org/abs/1704.00028, section 4) recommends layer normalization in its place. Both papers have no
    labels; ours maps them to a plane of H * W numbers by a linear layer.

    For 64x64 images and 64 base channels an image and its plane (3 + 1, 64, 64) become (64, 32, 32), (128, 16, 16),
    (256, 8, 8), (512, 4, 4) and one score; each halving of `sample_size` drops the last of these widths.

    Args:
        num_classes: Number of labels, the width of `class_labels`; 0 makes a critic without labels and their plane.
        sample_size: Height and width of the images in pixels, a power of two of at least 16.
        in_channels: Channels of the images.
        base_channels: Channels of the first stage; each stage after it has twice as many.
        norm: "batch" for training with clipped weights, "layer" for a gradient penalty; in all stages but the first.

    Raises:
        ValueError: If `sample_size` is not a power of two of at least 16, or `norm` is unknown.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 24,
        sample_size: int = 64,
        in_channels: int = 3,
        *,
        base_channels: int = 64,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        widths = [base_channels * 2**stage for stage in range(_count_stages(sample_size))]
        if norm not in ("batch", "layer"):
            raise ValueError(f'`norm` must be "batch" or "layer", got {norm!r}.')
        self.label_embedding = nn.Linear(num_classes, sample_size**2) if num_classes > 0 else None
        num_planes = 1 if num_classes > 0 else 0
        layers = [nn.Conv2d(in_channels + num_planes, widths[0], 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        for before, after in pairwise(widths):
            # One group is the layer normalization of an image: over channels and cells.
            norm_layer = nn.BatchNorm2d(after) if norm == "batch" else nn.GroupNorm(1, after)
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), norm_layer, nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(widths[-1], 1, 4, bias=False)]
        self.layers = nn.Sequential(*layers).apply(_initialize)

    def forward(self, pixel_values: Tensor, class_labels: Tensor | None = None) -> tuple[Tensor, None]:
        """Scores images.

        Args:
            pixel_values: Images (B, in_channels, H, W) in [-1, 1].
            class_labels: Multi-hot rows (B, num_classes); `None` where `num_classes` is 0.

        Returns:
            Scores (B,), high for real images, and `None` in the place of the class logits, which it does not have.

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
        if self.label_embedding is not None or class_labels is not None:
            _check_shape(
                "class_labels",
                class_labels,
                (len(pixel_values), self.config.num_classes),
                "`pipe.encode_labels` makes them from names",
            )
        if self.label_embedding is not None:
            plane = self.label_embedding(class_labels.to(pixel_values.dtype)).view(-1, 1, size, size)
            pixel_values = torch.cat([pixel_values, plane], dim=1)
        return self.layers(pixel_values).flatten(), None


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

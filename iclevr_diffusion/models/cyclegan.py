import itertools
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class CycleGANGenerator(ModelMixin, ConfigMixin):
    """Residual network that maps images of one kind to images of another.

    *Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks* (Zhu et al., 2017,
    https://arxiv.org/abs/1703.10593), section 7.2, after *Perceptual Losses for Real-Time Style Transfer* (Johnson et
    al., 2016, https://arxiv.org/abs/1603.08155). In the paper's notation c7s1-64, d128, d256, then 6 blocks R256
    (9 for images of 256x256 and more), u128, u64, c7s1-3; where images are 64x64:

        stem             3 -> 64 channels, 64x64: 7x7 convolution
        down_blocks      128, 32x32, and 256, 16x16: 3x3 convolutions of stride 2
        residual_blocks  256, 16x16
        up_blocks        128, 32x32, and 64, 64x64: 3x3 transposed convolutions of stride 2
        head             3, 64x64: 7x7 convolution and tanh

    All convolutions but the head's are normalized by instance and but for the ends of residual blocks followed by a
    ReLU; borders are reflected where the resolution stays. Weights start as N(0, 0.02). Ours leaves out the biases in
    front of an instance normalization, which would cancel them.

    Args:
        sample_size: Height and width of the images in pixels, a multiple of 2 for each step down.
        in_channels: Channels of the images that come in.
        out_channels: Channels of those that go out.
        block_out_channels: Channels per resolution, finest first.
        num_residual_blocks: Blocks at the lowest resolution.

    Raises:
        ValueError: If the sizes do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 256),
        num_residual_blocks: int = 6,
    ) -> None:
        super().__init__()
        _check_sizes(sample_size, block_out_channels, innermost=2)  # 1x1 has no border to reflect
        if num_residual_blocks < 0:
            raise ValueError(f"`num_residual_blocks` must not be negative, got {num_residual_blocks}.")
        finest, coarsest = block_out_channels[0], block_out_channels[-1]
        steps = list(itertools.pairwise(block_out_channels))
        self.stem = _normalized(_reflected_conv(in_channels, finest, 7))
        self.down_blocks = nn.Sequential(
            *(_normalized(nn.Conv2d(fine, coarse, 3, stride=2, padding=1, bias=False)) for fine, coarse in steps)
        )
        self.residual_blocks = nn.Sequential(*(_ResidualBlock(coarsest) for _ in range(num_residual_blocks)))
        self.up_blocks = nn.Sequential(
            *(
                _normalized(nn.ConvTranspose2d(coarse, fine, 3, stride=2, padding=1, output_padding=1, bias=False))
                for fine, coarse in reversed(steps)
            )
        )
        self.head = nn.Sequential(_reflected_conv(finest, out_channels, 7, bias=True), nn.Tanh())
        self.apply(_init_weights)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps images (B, in_channels, H, W) in [-1, 1] to images (B, out_channels, H, W) in [-1, 1].

        Raises:
            ValueError: If the shape does not fit.
        """
        _check_images(pixel_values, self.config.in_channels, self.config.sample_size)
        x = self.down_blocks(self.stem(pixel_values))
        return self.head(self.up_blocks(self.residual_blocks(x)))


class CycleGANDiscriminator(ModelMixin, ConfigMixin):
    """Tells, patch by patch, real images from generated ones: the 70x70 PatchGAN of `CycleGANGenerator`'s paper.

    C64-C128-C256-C512 of Zhu et al. (2017), section 7.2, after *Image-to-Image Translation with Conditional
    Adversarial Networks* (Isola et al., 2017, https://arxiv.org/abs/1611.07004): 4x4 convolutions with LeakyReLU 0.2,
    of stride 2 but for the last of them, normalized by instance but for the first, then a 4x4 convolution to one logit
    a patch. Where images are 64x64, on which a patch of 70x70 sees all:

        64 channels, 32x32 -> 128, 16x16 -> 256, 8x8 -> 512, 7x7 -> 1, 6x6

    Weights start as N(0, 0.02). Ours leaves out the biases in front of an instance normalization.

    Args:
        sample_size: Height and width of the images in pixels, a multiple of 2 for each step down.
        in_channels: Channels of the images.
        block_out_channels: Channels of the convolutions but the last, finest first.

    Raises:
        ValueError: If the sizes do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 512),
    ) -> None:
        super().__init__()
        _check_sizes(sample_size, block_out_channels, innermost=3)  # each of the two of stride 1 costs a pixel
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise((in_channels, *block_out_channels))):
            stride = 1 if i == len(block_out_channels) - 1 else 2
            layers += [nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=i == 0)]
            layers += [] if i == 0 else [nn.InstanceNorm2d(after)]
            layers += [nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(block_out_channels[-1], 1, 4, padding=1))
        self.apply(_init_weights)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns the logits (B, 1, h, w) of "real" of the patches of images (B, in_channels, H, W) in [-1, 1].

        Raises:
            ValueError: If the shape does not fit.
        """
        _check_images(pixel_values, self.config.in_channels, self.config.sample_size)
        return self.layers(pixel_values)


class ImagePool:
    """History of generated images, out of which a discriminator is shown older ones as well.

    *Learning from Simulated and Unsupervised Images through Adversarial Training* (Shrivastava et al., 2017,
    https://arxiv.org/abs/1612.07828), section 2.3, as Zhu et al. (2017) use it, with 50 images. A full pool lends half
    of the time one of its images in place of a new one, which takes the lent one's place.

    Args:
        capacity: Number of images that are kept.

    Attributes:
        images: The images, each (C, H, W).

    Raises:
        ValueError: If `capacity` is not at least 1.
    """

    def __init__(self, capacity: int = 50) -> None:
        if capacity < 1:
            raise ValueError(f"`capacity` must be at least 1, got {capacity}; show new images to do without a pool.")
        self.capacity = capacity
        self.images: list[Tensor] = []

    @torch.no_grad()
    def exchange(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns images (B, C, H, W), each a new or an old one, and keeps some of the new.

        Args:
            images: Newly generated images (B, C, H, W); gradients end here.
            generator: Source of the draws, on the CPU; torch's global generator if not given.
        """
        shown = []
        for image in images:
            if len(self.images) < self.capacity:
                self.images.append(image.clone())
            elif torch.rand((), generator=generator) < 0.5:
                i = int(torch.randint(self.capacity, (), generator=generator))
                image, self.images[i] = self.images[i].to(image), image.clone()
            shown.append(image)
        return torch.stack(shown)

    def state_dict(self) -> dict[str, Any]:
        """Returns the images; the state of the source of the draws is the caller's to keep."""
        return {"images": list(self.images)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: If it is of a pool with more images than this one holds.
        """
        if len(state_dict["images"]) > self.capacity:
            raise ValueError(
                f"`state_dict` must hold at most this pool's {self.capacity} images, got"
                f" {len(state_dict['images'])}; make the pool as large as it was."
            )
        self.images = list(state_dict["images"])


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions with reflected borders, added to their input (B, channels, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _normalized(_reflected_conv(channels, channels, 3)),
            _reflected_conv(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _reflected_conv(in_channels: int, out_channels: int, kernel_size: int, *, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, padding=kernel_size // 2, padding_mode="reflect", bias=bias
    )


def _normalized(conv: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.InstanceNorm2d(conv.out_channels), nn.ReLU())


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_sizes(sample_size: int, block_out_channels: tuple[int, ...], *, innermost: int) -> None:
    if not block_out_channels:
        raise ValueError("`block_out_channels` must hold at least one number of channels, got none.")
    multiple = 2 ** (len(block_out_channels) - 1)
    least = max(4, innermost * multiple)  # 7x7 convolutions reflect a border of 3 pixels
    if sample_size < least or sample_size % multiple:
        below = sample_size // multiple * multiple
        nearest = [size for size in (below, below + multiple) if size >= least] or [least]
        raise ValueError(
            f"`sample_size` must be a multiple of 2 ** (len(block_out_channels) - 1) = {multiple} and at least {least},"
            f" got {sample_size}; resize the images to {' or '.join(map(str, nearest))}, or give fewer"
            " `block_out_channels`."
        )


def _check_images(pixel_values: Tensor, in_channels: int, sample_size: int) -> None:
    expected = (in_channels, sample_size, sample_size)
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
        raise ValueError(
            f"`pixel_values` must have shape (batch, {', '.join(map(str, expected))}), got"
            f" {tuple(pixel_values.shape)}; resize the images, or build a model with another `sample_size` or"
            " `in_channels`."
        )

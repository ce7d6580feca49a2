import itertools
import math
from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

NORM_NUM_GROUPS = 8
LARGEST_POOL = 7  # turns 16x16 into 2x2 and the 7x7 of digits into one cell


class SmallMultiLabelUNet(ModelMixin, ConfigMixin):
    """Small residual U-Net that denoises images, in which the labels scale the features and the time shifts them.

    It is a *U-Net* (Ronneberger et al., 2015, https://arxiv.org/abs/1505.04597) around a code of a few cells, for
    *Denoising Diffusion Probabilistic Models* (Ho et al., 2020, https://arxiv.org/abs/2006.11239). Each way up starts
    with `label_embedding * x + time_embedding` as in *FiLM* (Perez et al., 2018, https://arxiv.org/abs/1709.07871).
    The shapes, where images are 64x64, `base_channels` is 256 and `num_levels` is 2:

        stem            3 -> 256 channels, 64x64
        down_blocks[0]  256 -> 256, 32x32
        down_blocks[1]  256 -> 512, 16x16
        pool            512, 2x2: average over 7x7, which leaves the last two rows and columns out, and GELU
        expand          512, 16x16: transposed convolution 8/8, GroupNorm, ReLU
        up_blocks[1]    conditioned 512 and its skip 512 -> 256, 32x32
        up_blocks[0]    conditioned 256 and its skip 256 -> 256, 64x64
        head            256 and the stem's 256 -> 3, 64x64

    Further levels double the channels again: 1024 and 2048, where the code is a single cell that 4x4 were averaged
    into. Every residual block is twice (3x3 convolution, BatchNorm, GELU); its output and its input, or where the
    number of channels changes the first half's output, are added and divided by sqrt(2). In *Conditional Diffusion
    MNIST* (Pearce, 2022, https://github.com/TeaPearce/Conditional_Diffusion_MNIST), the widely copied network of this
    kind, only the stem adds; here all blocks do. Biases in front of a BatchNorm, which it would cancel, are left out.

    "No condition" is context masking: the mask sets the labels to zeros before they are embedded, so that
    classifier-free guidance (Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598) needs no parameter of its own,
    but an empty scene has no row that differs from it.

    The network lives in a standardized space: `x_0 = (pixels - mean image) / deviation`, whose statistics are saved
    with the weights.

    Args:
        num_classes: Number of labels, the width of `class_labels`; a single integer label is a one-hot row of it.
        sample_size: Height and width of the images in pixels.
        in_channels: Channels of the images.
        base_channels: Channels of the finest level, a multiple of 8; the next has twice as many.
        num_levels: Number of blocks on the way down, each of which halves the resolution.
        label_injection: `film` scales and shifts what enters the blocks of the way up; `early` adds the embeddings of
            labels and time to what enters the blocks of the way down instead.
        use_label_embedding: Whether the labels are looked at; without it they are accepted and change nothing.
        use_time_embedding: Whether the time is looked at.
        num_train_timesteps: The timestep that is pure noise; the network sees `timestep / num_train_timesteps`.
        prediction_type: What the network predicts: `epsilon` (noise), `v_prediction` (Salimans and Ho, 2022,
            https://arxiv.org/abs/2202.00512), `sample` (x_0) or `flow` (the velocity noise - x_0 on the straight path;
            Lipman et al., 2023, https://arxiv.org/abs/2210.02747).
        null_condition: Whether the model knows "no condition", which training with label dropout makes.
        empty_condition: Whether the training set had images without any label.

    Raises:
        ValueError: If the sizes do not fit each other, or the options contradict each other or are unknown.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 24,
        sample_size: int = 64,
        in_channels: int = 3,
        base_channels: int = 256,
        num_levels: int = 2,
        label_injection: Literal["film", "early"] = "film",
        use_label_embedding: bool = True,
        use_time_embedding: bool = True,
        num_train_timesteps: int = 1000,
        prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"] = "epsilon",
        null_condition: bool = False,
        empty_condition: bool = False,
    ) -> None:
        super().__init__()
        _check_options(label_injection, prediction_type, use_label_embedding, null_condition, empty_condition)
        if base_channels < NORM_NUM_GROUPS or base_channels % NORM_NUM_GROUPS:
            raise ValueError(f"`base_channels` must be a multiple of {NORM_NUM_GROUPS}, got {base_channels}.")
        if num_levels < 1:
            raise ValueError(f"`num_levels` must be at least 1, got {num_levels}.")
        pool_size, expansion = _pool_and_expansion(sample_size, num_levels)
        # The block at `level` takes `widths[level]` channels down to `widths[level + 1]`, and its counterpart back up.
        widths = [base_channels, *(base_channels * 2**level for level in range(num_levels))]
        levels = list(itertools.pairwise(widths))
        self.stem = ResidualBlock(in_channels, base_channels)
        self.down_blocks = nn.ModuleList(
            nn.Sequential(ResidualBlock(outer, inner), nn.MaxPool2d(2)) for outer, inner in levels
        )
        self.pool = nn.Sequential(nn.AvgPool2d(pool_size), nn.GELU())
        self.expand = nn.Sequential(
            nn.ConvTranspose2d(widths[-1], widths[-1], expansion, stride=expansion),
            nn.GroupNorm(NORM_NUM_GROUPS, widths[-1]),
            nn.ReLU(),
        )
        self.up_blocks = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(2 * inner, outer, 2, stride=2),
                ResidualBlock(outer, outer),
                ResidualBlock(outer, outer),
            )
            for outer, inner in levels
        )
        self.head = nn.Sequential(
            nn.Conv2d(2 * base_channels, base_channels, 3, padding=1),
            nn.GroupNorm(NORM_NUM_GROUPS, base_channels),
            nn.ReLU(),
            nn.Conv2d(base_channels, in_channels, 3, padding=1),
        )
        conditioned = widths[1:] if label_injection == "film" else widths[:-1]
        self.label_embeddings = _embeddings(num_classes, conditioned) if use_label_embedding else None
        self.time_embeddings = _embeddings(1, conditioned) if use_time_embedding else None
        self.register_buffer("data_mean", torch.zeros(in_channels, sample_size, sample_size))
        self.register_buffer("data_std", torch.ones(()))

    def set_data_statistics(self, mean: Tensor, std: float | Tensor) -> None:
        """Stores what `standardize` subtracts and divides by.

        Args:
            mean: Mean image (in_channels, H, W), or channel means broadcastable to it, in the units of pixels in [-1, 1].
            std: Deviation of the pixels from `mean`, one positive number.

        Raises:
            ValueError: If the shape does not fit, or an entry is not finite or `std` not positive.
        """
        mean, std = torch.as_tensor(mean), torch.as_tensor(std)
        if std.numel() != 1 or not (torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError(f"`std` must be one positive number, got {std.tolist()}.")
        if not torch.isfinite(mean).all():
            raise ValueError("`mean` must be finite, got NaN or infinity; check the images it was computed from.")
        try:
            mean = mean.expand(self.data_mean.shape)
        except RuntimeError:
            raise ValueError(
                f"`mean` must have shape {tuple(self.data_mean.shape)} or broadcast to it, got {tuple(mean.shape)}."
            ) from None
        self.data_mean.copy_(mean)
        self.data_std.copy_(std.reshape(()))

    @property
    def bound(self) -> float:
        """A number that no absolute value of an image exceeds in the space of the network."""
        return (1 + float(self.data_mean.abs().max())) / float(self.data_std)

    def standardize(self, pixel_values: Tensor) -> Tensor:
        """Maps pixels (B, C, H, W) in [-1, 1] to the space of the network, where they have unit variance."""
        return (pixel_values - self.data_mean) / self.data_std

    def unstandardize(self, sample: Tensor) -> Tensor:
        """Maps samples (B, C, H, W) of the network's space back to pixels, in [-1, 1] but for the model's errors."""
        return sample * self.data_std.to(sample.dtype) + self.data_mean.to(sample.dtype)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        null_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predicts noise, velocity or image, as `prediction_type` says, in the standardized space.

        Args:
            sample: Noisy images (B, C, H, W), standardized.
            timestep: Time of all images, or (B,) of each, from 0 (clean) to `num_train_timesteps` (noise).
            class_labels: Multi-hot rows (B, num_classes) with entries >= 0; `None` leaves every image unconditioned.
            null_mask: Booleans (B,), true where an image is unconditioned whatever its row says.
            return_dict: Whether to return a `UNet2DOutput` rather than a tuple.

        Returns:
            The prediction (B, C, H, W), as `.sample` or as a tuple of one.

        Raises:
            ValueError: If a shape or dtype does not fit, or an unconditioned prediction is asked of a model without
                `null_condition`.
        """
        self._check_inputs(sample, class_labels, null_mask)
        if class_labels is None:
            class_labels = sample.new_zeros(len(sample), self.config.num_classes)
        if null_mask is not None:
            class_labels = class_labels.masked_fill(null_mask[:, None], 0)
        class_labels = class_labels.to(self.dtype)
        times = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device) / self.config.num_train_timesteps
        times = times.expand(len(sample))[:, None].to(self.dtype)
        is_early = self.config.label_injection == "early"

        x = stem = self.stem(sample)
        skips = []
        for level, block in enumerate(self.down_blocks):
            x = block(self._condition(x, level, times, class_labels) if is_early else x)
            skips.append(x)
        x = self.expand(self.pool(x))
        for level, block in reversed(list(enumerate(self.up_blocks))):
            x = x if is_early else self._condition(x, level, times, class_labels)
            x = block(torch.cat([x, skips[level]], dim=1))
        prediction = self.head(torch.cat([x, stem], dim=1))
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)

    def _condition(self, x: Tensor, level: int, times: Tensor, class_labels: Tensor) -> Tensor:
        """Tells features (B, C, H, W) the labels (B, num_classes) and the times (B, 1), as far as they are looked at."""
        if self.label_embeddings is not None:
            label = self.label_embeddings[level](class_labels)[:, :, None, None]
            x = label + x if self.config.label_injection == "early" else label * x
        if self.time_embeddings is not None:
            x = x + self.time_embeddings[level](times)[:, :, None, None]
        return x

    def _check_inputs(self, sample: Tensor, class_labels: Tensor | None, null_mask: Tensor | None) -> None:
        expected = tuple(self.data_mean.shape)
        if sample.ndim != 4 or tuple(sample.shape[1:]) != expected:
            raise ValueError(
                f"`sample` must have shape (batch, {', '.join(map(str, expected))}), got {tuple(sample.shape)}; resize"
                " the images, or build a model with another `sample_size` or `in_channels`."
            )
        if sample.dtype != self.dtype and not torch.is_autocast_enabled(sample.device.type):
            raise ValueError(
                f"`sample` must have the weights' dtype {self.dtype}, got {sample.dtype}; cast it with"
                f" `.to({self.dtype})`, or run under torch.autocast."
            )
        if class_labels is not None and tuple(class_labels.shape) != (len(sample), self.config.num_classes):
            raise ValueError(
                f"`class_labels` must have shape ({len(sample)}, {self.config.num_classes}), got"
                f" {tuple(class_labels.shape)}; `pipe.encode_labels` makes them from names."
            )
        if (class_labels is None or null_mask is not None) and not self.config.null_condition:
            raise ValueError(
                "`class_labels` must be given and `null_mask` left out: this model was built with null_condition=False;"
                " train with label dropout for unconditioned images and guidance."
            )
        if null_mask is not None and (tuple(null_mask.shape) != (len(sample),) or null_mask.dtype != torch.bool):
            raise ValueError(
                f"`null_mask` must be booleans of shape ({len(sample)},), got {null_mask.dtype} of shape"
                f" {tuple(null_mask.shape)}."
            )


class ResidualBlock(nn.Module):
    """Twice (3x3 convolution, BatchNorm, GELU), with a sum around it that keeps the variance.

    Args:
        in_channels: Channels of the features that come in.
        out_channels: Channels of those that go out.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(
                nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.GELU()
            )
            for channels in (in_channels, out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps features (B, in_channels, H, W) to (B, out_channels, H, W)."""
        hidden = self.first(x)
        output = self.second(hidden)
        return (output + (x if x.shape == output.shape else hidden)) / math.sqrt(2)


def _embeddings(in_features: int, widths: list[int]) -> nn.ModuleList:
    """Makes one two-layer network for each width."""
    return nn.ModuleList(
        nn.Sequential(nn.Linear(in_features, width), nn.GELU(), nn.Linear(width, width)) for width in widths
    )


def _fitting_pool(sample_size: int, num_levels: int) -> tuple[int, int] | None:
    """Returns the side of the squares that are averaged into a cell and of those that a cell becomes, if whole."""
    innermost, rest = divmod(sample_size, 2**num_levels)
    if rest or innermost < 1:
        return None
    pool_size = min(LARGEST_POOL, innermost)
    expansion, rest = divmod(innermost, innermost // pool_size)
    return None if rest else (pool_size, expansion)


def _pool_and_expansion(sample_size: int, num_levels: int) -> tuple[int, int]:
    sizes = _fitting_pool(sample_size, num_levels)
    if sizes is None:
        below = (size for size in range(sample_size - 1, 0, -1) if _fitting_pool(size, num_levels))
        above = (size for size in itertools.count(max(sample_size, 0) + 1) if _fitting_pool(size, num_levels))
        nearest = [*itertools.islice(below, 1), next(above)]
        raise ValueError(
            f"`sample_size` must be a multiple of 2 ** num_levels = {2**num_levels} whose innermost resolution splits"
            f" into equal cells of {LARGEST_POOL} pixels or a few more, got {sample_size}; resize the images to"
            f" {' or '.join(map(str, nearest))}, or use fewer levels."
        )
    return sizes


def _check_options(
    label_injection: str, prediction_type: str, use_label_embedding: bool, null_condition: bool, empty_condition: bool
) -> None:
    if label_injection not in ("film", "early"):
        raise ValueError(f"`label_injection` must be `film` or `early`, got {label_injection!r}.")
    if prediction_type not in ("epsilon", "v_prediction", "sample", "flow"):
        raise ValueError(
            f"`prediction_type` must be `epsilon`, `v_prediction`, `sample` or `flow`, got {prediction_type!r}."
        )
    if null_condition and not use_label_embedding:
        raise ValueError(
            "`null_condition` must be False with use_label_embedding=False, got True: a model that looks at no labels"
            " cannot be guided by them; train without label dropout."
        )
    if null_condition and empty_condition:
        raise ValueError(
            "`null_condition` and `empty_condition` must not both be True: to this model a row of zeros is 'no"
            " condition', so that it cannot tell an empty scene from it; leave images without labels out of the"
            " training set, train without label dropout, or use MultiLabelUNet2DModel."
        )

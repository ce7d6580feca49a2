from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

# A preset is a promise: once weights of it exist it never changes, a better one gets a new name.
PRESETS: dict[str, dict[str, Any]] = {
    # The network of the published i-CLEVR results: 113.7 M parameters, every level at full resolution.
    "reported": {
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "layers_per_block": 2,
        "attention_levels": (4,),
        "attention_head_dim": 8,
        "norm_num_groups": 32,
    },
    # For a GPU: 2x2 pixels a cell; 13.5 M parameters are 26 MiB in half precision.
    "base": {
        "patch_size": 2,
        "block_out_channels": (96, 160, 192),
        "layers_per_block": 2,
        "attention_levels": (1, 2),
        "attention_head_dim": 32,
        "norm_num_groups": 16,
    },
    # For a CPU: 4x4 pixels a cell, so that the finest level is 16x16 where 64x64 images are drawn.
    "tiny": {
        "patch_size": 4,
        "block_out_channels": (64, 128, 160),
        "layers_per_block": 1,
        "attention_levels": (1, 2),
        "attention_head_dim": 32,
        "norm_num_groups": 8,
    },
    # For a CPU, and for images of several objects: 8x8 pixels a cell, so that all cells attend to all labels at little cost.
    "tokens": {
        "patch_size": 8,
        "block_out_channels": (96, 128),
        "layers_per_block": 1,
        "attention_levels": (0, 1),
        "attention_head_dim": 32,
        "norm_num_groups": 8,
        "prediction_type": "flow",
        "label_encoding": "tokens",
        "network_output": "sample",
    },
}

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow", "edm"]
LabelEncoding = Literal["linear", "tokens"]
NetworkOutput = Literal["prediction", "sample"]
MIN_TIME = 0.001  # so that a velocity is finite next to the clean image


class MultiLabelUNet2DModel(ModelMixin, ConfigMixin):
    """U-Net that denoises images, told which labels the image must show.

    The class embedding is added to the time embedding, as in *Improved Denoising Diffusion Probabilistic Models*
    (Nichol and Dhariwal, 2021, https://arxiv.org/abs/2102.09672); ours is linear, so that several labels add up, as
    in *Elucidating the Design Space of Diffusion-Based Generative Models* (Karras et al., 2022,
    https://arxiv.org/abs/2206.00364). A row of its own stands for "no condition", as classifier-free guidance needs
    it (Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598), so that "nothing said" and "an empty scene" differ.

    With `label_encoding="tokens"` the labels are tokens instead, one each, to which the image attends at the levels with
    self-attention and in the middle, as text is in *High-Resolution Image Synthesis with Latent Diffusion Models* (Rombach
    et al., 2022, https://arxiv.org/abs/2112.10752). Tokens have no order, and those of labels that an image does not have
    are masked; an entry other than 1 scales its token. One more token is always there: it says that labels are given, or
    that none are ("no condition"), so that an empty scene has something to attend to.

    The network lives in a standardized space: `x_0 = (pixels - mean image) / deviation`, whose statistics are saved
    with the weights. `patch_size` folds squares of pixels into channels around the network, which then works at a
    lower resolution and cost without losing a pixel.

    Args:
        num_classes: Number of labels, the width of `class_labels`.
        sample_size: Height and width of the images in pixels, a multiple of `patch_size * 2 ** (levels - 1)`.
        in_channels: Channels of the images.
        patch_size: Side of the squares of pixels that are folded into channels.
        block_out_channels: Channels per resolution level, finest first, each a multiple of `norm_num_groups`.
        layers_per_block: Residual blocks per level on the way down; one more on the way up.
        attention_levels: Indices of the levels with self-attention, 0 the finest.
        attention_head_dim: Channels of an attention head.
        norm_num_groups: Groups of every group normalization.
        dropout: Rate of dropout in the residual blocks.
        prediction_type: What the network predicts: `epsilon` (noise), `v_prediction` (Salimans and Ho, 2022,
            https://arxiv.org/abs/2202.00512), `sample` (x_0) or `flow` (the velocity noise - x_0 on the straight path
            x_t = (1 - t) x_0 + t noise with t = timestep / 1000; Lipman et al., 2023,
            https://arxiv.org/abs/2210.02747) or `edm` (F of eq. 7 of Karras et al., 2022, for a `sigma_data` of 1, given
            `c_in x` at the timestep `c_noise = ln(sigma) / 4`; diffusers' EDM schedulers hold c_skip, c_out and c_in).
        null_condition: Whether the model has the row for "no condition", which training with label dropout makes.
        empty_condition: Whether the training set had images without any label.
        label_encoding: `linear` adds the embedding of the labels to that of the time; `tokens` is said above.
        network_output: What the inner U-Net puts out: the `prediction`, or the `sample` x_0, from which the velocity of a
            `flow` follows, (x_t - x_0) / t with t at least .001. A velocity holds all of the noise, which a network that
            is narrower than a square of `patch_size` pixels cannot let through; an image it can: *Back to Basics: Let
            Denoising Generative Models Denoise* (Li and He, 2025, https://arxiv.org/abs/2511.13720).

    Raises:
        ValueError: If the sizes do not fit each other, if `prediction_type`, `label_encoding` or `network_output` is
            unknown, or if `network_output` is `sample` and `prediction_type` not `flow`.
    """

    _supports_gradient_checkpointing = True
    # What older weights have without saying so; their hash does not change by it.
    _later_arguments = {"label_encoding": "linear", "network_output": "prediction"}
    _no_split_modules = ["UNet2DModel", "UNet2DConditionModel"]

    @register_to_config
    def __init__(
        self,
        num_classes: int = 24,
        sample_size: int = 64,
        in_channels: int = 3,
        patch_size: int = 1,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 256),
        layers_per_block: int = 2,
        attention_levels: tuple[int, ...] = (),
        attention_head_dim: int = 32,
        norm_num_groups: int = 8,
        dropout: float = 0.0,
        prediction_type: PredictionType = "epsilon",
        null_condition: bool = False,
        empty_condition: bool = False,
        label_encoding: LabelEncoding = "linear",
        network_output: NetworkOutput = "prediction",
    ) -> None:
        super().__init__()
        num_levels = len(block_out_channels)
        _check_sizes(
            sample_size, patch_size, block_out_channels, attention_levels, attention_head_dim, norm_num_groups
        )
        if prediction_type not in ("epsilon", "v_prediction", "sample", "flow", "edm"):
            raise ValueError(
                "`prediction_type` must be `epsilon`, `v_prediction`, `sample`, `flow` or `edm`, got"
                f" {prediction_type!r}."
            )
        if label_encoding not in ("linear", "tokens"):
            raise ValueError(f"`label_encoding` must be `linear` or `tokens`, got {label_encoding!r}.")
        if network_output not in ("prediction", "sample"):
            raise ValueError(f"`network_output` must be `prediction` or `sample`, got {network_output!r}.")
        if network_output == "sample" and prediction_type != "flow":
            raise ValueError(
                "`network_output`, which the preset `tokens` sets too, must be `prediction` unless `prediction_type` is"
                f" `flow`, whose velocity follows from an image, got {network_output!r} and {prediction_type!r}."
            )
        has_attention = [level in attention_levels for level in range(num_levels)]
        embedding_dim = 4 * block_out_channels[0]
        sizes = {
            "sample_size": sample_size // patch_size,
            "in_channels": in_channels * patch_size**2,
            "out_channels": in_channels * patch_size**2,
            "block_out_channels": block_out_channels,
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
            "dropout": dropout,
        }
        if label_encoding == "tokens":
            self.unet = UNet2DConditionModel(
                **sizes,
                down_block_types=tuple(
                    "CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in has_attention
                ),
                up_block_types=tuple(
                    "CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(has_attention)
                ),
                # diffusers calls this so, but it is the number of heads.
                attention_head_dim=tuple(max(1, channels // attention_head_dim) for channels in block_out_channels),
                cross_attention_dim=embedding_dim,
            )
            self.class_embedding = nn.Linear(num_classes, embedding_dim, bias=False)
            self.set_embedding = nn.Parameter(torch.zeros(embedding_dim))
        else:
            self.unet = UNet2DModel(
                **sizes,
                down_block_types=tuple("AttnDownBlock2D" if attends else "DownBlock2D" for attends in has_attention),
                up_block_types=tuple(
                    "AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(has_attention)
                ),
                attention_head_dim=attention_head_dim,
                class_embed_type="identity",  # class_embedding below already has the time embedding's width
            )
            self.class_embedding = nn.Linear(num_classes, embedding_dim)
        self.null_embedding = nn.Parameter(torch.zeros(embedding_dim)) if null_condition else None
        self.register_buffer("data_mean", torch.zeros(in_channels, sample_size, sample_size))
        self.register_buffer("data_std", torch.ones(()))

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "MultiLabelUNet2DModel":  # noqa: ANN401 -- any argument of ours
        """Builds a freshly initialized model of a preset: `reported`, `base`, `tiny` or `tokens`, which predicts a `flow`.

        Args:
            name: The preset.
            overrides: Arguments of the class that go before the preset's.

        Raises:
            ValueError: If there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"`name` must be one of {', '.join(PRESETS)}, got {name!r}.")
        return cls(**{**PRESETS[name], **overrides})

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
            timestep: Time of all images, or (B,) of each, from 0 (clean) to 1000 (noise); for `edm` `ln(sigma) / 4`.
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
            null_mask = torch.ones(len(sample), dtype=torch.bool, device=sample.device)
        class_labels = class_labels.to(self.class_embedding.weight.dtype)
        if self.null_embedding is not None and null_mask is None:
            # Keeps the null row in the graph, so that data-parallel training sees it used.
            null_mask = torch.zeros(len(sample), dtype=torch.bool, device=sample.device)
        if (
            self.config.prediction_type == "edm"
        ):  # spreads c_noise over the range that the embedding of times tells apart
            timestep = 1000 * torch.as_tensor(timestep, device=sample.device)
        folded = F.pixel_unshuffle(sample, self.config.patch_size)
        if self.config.label_encoding == "tokens":
            tokens, is_present = self._tokens(class_labels, null_mask)
            prediction = self.unet(folded, timestep, tokens, encoder_attention_mask=is_present).sample
        else:
            embedding = self.class_embedding(class_labels)
            if null_mask is not None:
                embedding = torch.where(null_mask[:, None], self.null_embedding.to(embedding.dtype), embedding)
            prediction = self.unet(folded, timestep, embedding).sample
        prediction = F.pixel_shuffle(prediction, self.config.patch_size)
        if self.config.network_output == "sample":
            time = torch.as_tensor(timestep, device=sample.device).float() / 1000
            velocity = (sample.float() - prediction.float()) / time.clamp(min=MIN_TIME).reshape(-1, 1, 1, 1)
            prediction = velocity.to(sample.dtype)
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)

    def _tokens(self, class_labels: Tensor, null_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Makes what the image attends to.

        Returns:
            The tokens (B, 1 + num_classes, D), first the one that is always there, and booleans (B, 1 + num_classes),
            false where a token is masked.
        """
        first = self.set_embedding.expand(len(class_labels), -1)
        is_present = class_labels > 0
        if null_mask is not None:
            first = torch.where(null_mask[:, None], self.null_embedding, first)
            is_present = is_present & ~null_mask[:, None]
        labels = class_labels[:, :, None] * self.class_embedding.weight.T
        return torch.cat([first[:, None], labels], dim=1), F.pad(is_present, (1, 0), value=True)

    def _check_inputs(self, sample: Tensor, class_labels: Tensor | None, null_mask: Tensor | None) -> None:
        expected = tuple(self.data_mean.shape)
        if sample.ndim != 4 or tuple(sample.shape[1:]) != expected:
            raise ValueError(
                f"`sample` must have shape (batch, {', '.join(map(str, expected))}), got {tuple(sample.shape)}; resize"
                " the images, or build a model with another `sample_size` or `in_channels`."
            )
        weight_dtype = self.class_embedding.weight.dtype
        if sample.dtype != weight_dtype and not torch.is_autocast_enabled(sample.device.type):
            raise ValueError(
                f"`sample` must have the weights' dtype {weight_dtype}, got {sample.dtype}; cast it with"
                f" `.to({weight_dtype})`, or run under torch.autocast."
            )
        if class_labels is not None and tuple(class_labels.shape) != (len(sample), self.config.num_classes):
            raise ValueError(
                f"`class_labels` must have shape ({len(sample)}, {self.config.num_classes}), got"
                f" {tuple(class_labels.shape)}; `pipe.encode_labels` makes them from names."
            )
        if (class_labels is None or null_mask is not None) and self.null_embedding is None:
            raise ValueError(
                "`class_labels` must be given and `null_mask` left out: this model was built with null_condition=False;"
                " train with label dropout for unconditioned images and guidance."
            )
        if null_mask is not None and (tuple(null_mask.shape) != (len(sample),) or null_mask.dtype != torch.bool):
            raise ValueError(
                f"`null_mask` must be booleans of shape ({len(sample)},), got {null_mask.dtype} of shape"
                f" {tuple(null_mask.shape)}."
            )


def _check_sizes(
    sample_size: int,
    patch_size: int,
    block_out_channels: tuple[int, ...],
    attention_levels: tuple[int, ...],
    attention_head_dim: int,
    norm_num_groups: int,
) -> None:
    num_levels = len(block_out_channels)
    multiple = patch_size * 2 ** (num_levels - 1)
    if sample_size < multiple or sample_size % multiple:
        below = sample_size // multiple * multiple
        nearest = [size for size in (below, below + multiple) if size > 0]
        raise ValueError(
            f"`sample_size` must be a multiple of patch_size * 2 ** (levels - 1) = {multiple}, got {sample_size};"
            f" resize the images to {' or '.join(map(str, nearest))}, or use fewer levels or a smaller `patch_size`."
        )
    unknown = [level for level in attention_levels if not 0 <= level < num_levels]
    if unknown:
        raise ValueError(f"`attention_levels` must lie between 0 and {num_levels - 1}, got {unknown}.")
    for channels in block_out_channels:
        if channels % norm_num_groups:
            raise ValueError(
                f"`block_out_channels` must be multiples of norm_num_groups = {norm_num_groups}, got {channels}."
            )
    for level in {*attention_levels, num_levels - 1}:  # the block between the ways down and up attends as well
        if block_out_channels[level] % attention_head_dim:
            raise ValueError(
                f"`block_out_channels` with attention must be multiples of attention_head_dim = {attention_head_dim},"
                f" got {block_out_channels[level]} at level {level}."
            )

"""Small residual network that reads which objects an image shows."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a shortcut, the basic block of ResNet (He et al., 2016).

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        stride: Step of the first convolution; 2 halves height and width.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""
        residual = F.relu(self.norm1(self.conv1(hidden_states)))
        return F.relu(self.norm2(self.conv2(residual)) + self.shortcut(hidden_states))


class SmallLabelClassifier(ModelMixin, ConfigMixin):
    """Residual network of 0.57 M parameters with one logit a label, called like `LabelClassifier`.

    Objects are few pixels wide, so the stem keeps more resolution than ResNet's (stride 2 against 4), and the maximum
    over the image stands beside the mean: one strong answer anywhere is enough to say that an object is there.

    Args:
        num_classes: Number of labels, the width of the logits.
        image_size: Height and width of the images in pixels.
        label_names: Name of each label in the order of the logits, or None if they have no names.
        block_out_channels: Channels of each residual block; each but the first halves height and width.
        threshold: A logit above it means that the object is in the image; chosen on validation images.
        in_channels: Channels of the images: 1 for grey, 3 for RGB, 4 for RGBA.
    """

    _later_arguments = {"in_channels": 3}  # older weights keep their hash, see `judging.weights_sha256`

    @register_to_config
    def __init__(
        self,
        num_classes: int = 24,
        image_size: int = 64,
        *,
        label_names: Sequence[str] | None = None,
        block_out_channels: Sequence[int] = (24, 48, 96, 160),
        threshold: float = 0.0,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if label_names is not None and len(label_names) != num_classes:
            raise ValueError(
                f"`label_names` must hold one name for each of the {num_classes} classes, got {len(label_names)} names;"
                " set `num_classes` to their number."
            )
        if not (isinstance(threshold, (int, float)) and math.isfinite(threshold)):
            raise ValueError(f"`threshold` must be a finite number, a logit, got {threshold!r}.")
        channels = [block_out_channels[0], *block_out_channels]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels[0], 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(),
        )
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(in_channels, out_channels, stride=1 if level == 0 else 2)
                for level, (in_channels, out_channels) in enumerate(zip(channels, channels[1:], strict=False))
            )
        )
        self.classifier = nn.Linear(2 * channels[-1], num_classes)

    def forward(
        self, pixel_values: Tensor, return_dict: bool = True
    ) -> ImageClassifierOutputWithNoAttention | tuple[Tensor]:
        """Reads `pixel_values` (B, in_channels, H, W) in [-1, 1]; the `logits` of the output are (B, num_classes)."""
        logits = self.classifier(self.extract_features(pixel_values))
        return ImageClassifierOutputWithNoAttention(logits=logits) if return_dict else (logits,)

    def extract_features(self, pixel_values: Tensor) -> Tensor:
        """Returns what the last layer sees of `pixel_values` (B, in_channels, H, W) in [-1, 1].

        Returns:
            The mean and then the maximum of each of the last block's channels over the image
            (B, 2 * block_out_channels[-1]).
        """
        size, channels = self.config.image_size, self.config.in_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (channels, size, size):
            mode = {1: " grey", 3: " RGB", 4: " RGBA"}.get(channels, f", {channels} channels")
            raise ValueError(
                f"`pixel_values` must have shape (batch, {channels}, {size}, {size}), got {tuple(pixel_values.shape)};"
                f" resize the images to {size}x{size}{mode}."
            )
        if pixel_values.dtype != self.dtype and not torch.is_autocast_enabled(pixel_values.device.type):
            raise ValueError(
                f"`pixel_values` must be {self.dtype} in [-1, 1] like the weights, got {pixel_values.dtype};"
                " scale uint8 images by `x / 127.5 - 1`, or convert images or model with `.to(dtype)`."
            )
        hidden_states = self.blocks(self.stem(pixel_values))
        return torch.cat([hidden_states.mean((2, 3)), hidden_states.amax((2, 3))], dim=1)

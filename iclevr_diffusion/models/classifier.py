"""ResNet that reads which objects an image shows."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

PRESETS = {
    "resnet18": {"layer_type": "basic", "depths": (2, 2, 2, 2), "hidden_sizes": (64, 128, 256, 512)},
    # Half as wide, on images twice as large: as fast as the former, and small objects keep more than a pixel.
    "resnet18_half": {
        "layer_type": "basic",
        "depths": (2, 2, 2, 2),
        "embedding_size": 32,
        "hidden_sizes": (32, 64, 128, 256),
        "input_scale": 2,
    },
    "resnet50": {"layer_type": "bottleneck", "depths": (3, 4, 6, 3), "hidden_sizes": (256, 512, 1024, 2048)},
}


class LabelClassifier(ModelMixin, ConfigMixin):
    """ResNet with one logit a label: the sigmoid of a logit is the probability that the object is in the image.

    The network is the one of *Deep Residual Learning for Image Recognition* (He et al., 2016,
    https://arxiv.org/abs/1512.03385) as transformers builds it; the default sizes are those of ResNet-18.

    Args:
        num_classes: Number of labels, the width of the logits.
        image_size: Height and width of the images in pixels.
        label_names: Name of each label in the order of the logits, or None if they have no names.
        embedding_size: Channels of the stem, a 7x7 convolution of stride 2 before a 3x3 max-pooling of stride 2.
        hidden_sizes: Channels of each stage; each but the first halves height and width.
        depths: Residual blocks of each stage.
        layer_type: "basic" (two 3x3 convolutions a block) or "bottleneck" (1x1, 3x3, 1x1).
        input_scale: Whole factor by which images are enlarged first, since the stem shrinks them to a quarter.
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
        embedding_size: int = 64,
        hidden_sizes: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        layer_type: str = "basic",
        input_scale: int = 1,
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
        if len(hidden_sizes) != len(depths):
            raise ValueError(
                f"`hidden_sizes` and `depths` must have one entry a stage, got {tuple(hidden_sizes)} and {tuple(depths)}."
            )
        if layer_type not in ResNetConfig.layer_types:
            raise ValueError(f'`layer_type` must be "basic" or "bottleneck", got {layer_type!r}.')
        if input_scale < 1:
            raise ValueError(f"`input_scale` must be a whole number of at least 1, got {input_scale}.")
        self.resnet = ResNetModel(
            ResNetConfig(
                num_channels=in_channels,
                embedding_size=embedding_size,
                hidden_sizes=list(hidden_sizes),
                depths=list(depths),
                layer_type=layer_type,
            )
        )
        self.classifier = nn.Linear(hidden_sizes[-1], num_classes)

    @classmethod
    def from_preset(cls, name: str, **overrides: object) -> "LabelClassifier":
        """Makes an untrained classifier of named sizes, "resnet18", "resnet18_half" or "resnet50".

        Args:
            name: Name of the sizes.
            overrides: Further arguments of the class, which win over those of the preset.
        """
        if name not in PRESETS:
            raise ValueError(f"`name` must be one of {', '.join(map(repr, PRESETS))}, got {name!r}.")
        return cls(**PRESETS[name] | overrides)

    def forward(
        self, pixel_values: Tensor, return_dict: bool = True
    ) -> ImageClassifierOutputWithNoAttention | tuple[Tensor]:
        """Reads `pixel_values` (B, in_channels, H, W) in [-1, 1]; the `logits` of the output are (B, num_classes)."""
        logits = self.classifier(self.extract_features(pixel_values))
        return ImageClassifierOutputWithNoAttention(logits=logits) if return_dict else (logits,)

    def extract_features(self, pixel_values: Tensor) -> Tensor:
        """Returns what the last layer sees of `pixel_values` (B, in_channels, H, W) in [-1, 1].

        Returns:
            The mean of each of the last stage's channels over the image (B, hidden_sizes[-1]).
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
        if self.config.input_scale > 1:
            pixel_values = F.interpolate(pixel_values, scale_factor=self.config.input_scale, mode="bilinear")
        return self.resnet(pixel_values).pooler_output.flatten(1)

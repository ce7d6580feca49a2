from itertools import pairwise

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

STRIDES = (2, 1, 2, 1, 2, 1)


class ACGANDiscriminator(ModelMixin, ConfigMixin):
    """Discriminator that sees the image alone and says whether it is real and which labels it shows.

    The six 3x3 convolutions, their widths and strides, and the weights drawn from N(0, 0.02^2) are those of
    *Conditional Image Synthesis With Auxiliary Classifier GANs* (Odena et al., 2017,
    https://arxiv.org/abs/1610.09585). Ours divides the convolutions by their spectral norm (*Spectral Normalization
    for Generative Adversarial Networks*, Miyato et al., 2018, https://arxiv.org/abs/1802.05957), pads each by one
    pixel, so that only the strides shrink the image, drops whole channels at a rate of 0.25 rather than single values
    at 0.5, and has one logit a label where the paper has a softmax, since an image shows several.

    For 64x64 images and 16 base channels the image (3, 64, 64) becomes (16, 32, 32), (32, 32, 32), (64, 16, 16),
    (128, 16, 16), (256, 8, 8), (512, 8, 8), which both heads see as one row of 32,768 numbers.

    Args:
        num_classes: Number of labels, the width of the class logits.
        sample_size: Height and width of the images in pixels, a multiple of 8.
        in_channels: Channels of the images.
        base_channels: Channels of the first convolution; each after it has twice as many.
        dropout: Rate at which channels are dropped after each convolution while training.

    Raises:
        ValueError: If `sample_size` is not a multiple of 8.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 24,
        sample_size: int = 64,
        in_channels: int = 3,
        *,
        base_channels: int = 16,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        if sample_size < 8 or sample_size % 8:
            below = sample_size // 8 * 8
            nearest = [f"{size}x{size}" for size in (below, below + 8) if size > 0]
            raise ValueError(
                f"`sample_size` must be a multiple of 8, got {sample_size}; resize the images to {' or '.join(nearest)}."
            )
        widths = [in_channels, *(base_channels * 2**k for k in range(len(STRIDES)))]
        layers: list[nn.Module] = []
        for index, ((before, after), stride) in enumerate(zip(pairwise(widths), STRIDES, strict=True)):
            convolution = nn.Conv2d(before, after, 3, stride, padding=1)
            _initialize(convolution)
            norm = [nn.BatchNorm2d(after)] if index > 0 else []
            layers += [spectral_norm(convolution), *norm, nn.LeakyReLU(0.2), nn.Dropout2d(dropout)]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        num_features = widths[-1] * (sample_size // 8) ** 2
        self.real_head = nn.Linear(num_features, 1)
        self.class_head = nn.Linear(num_features, num_classes)
        _initialize(self.real_head)
        _initialize(self.class_head)

    def forward(self, pixel_values: Tensor, class_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Judges whether images are real, and reads their labels.

        Args:
            pixel_values: Images (B, in_channels, H, W) in [-1, 1].
            class_labels: Ignored; it is here so that every discriminator is called alike.

        Returns:
            Logits (B,), high for real images, and class logits (B, num_classes), high for the labels that are shown.

        Raises:
            ValueError: If the shape of `pixel_values` does not fit.
        """
        size = self.config.sample_size
        _check_shape(
            "pixel_values",
            pixel_values,
            ("batch", self.config.in_channels, size, size),
            "resize the images, or build a model with another `sample_size` or `in_channels`",
        )
        features = self.layers(pixel_values)
        return self.real_head(features).flatten(), self.class_head(features)


def _initialize(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int | str, ...], advice: str) -> None:
    """Refuses a tensor whose shape is not `shape`, where a word stands for any number."""
    got = None if tensor is None else tuple(tensor.shape)
    if got is None or len(got) != len(shape) or any(b not in (a, "batch") for a, b in zip(got, shape, strict=True)):
        raise ValueError(f"`{name}` must have shape ({', '.join(map(str, shape))}), got {got}; {advice}.")

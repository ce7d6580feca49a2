from itertools import pairwise

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class ProjectionDiscriminator(ModelMixin, ConfigMixin):
    """Discriminator that compares the image's features with an embedding of the labels.

    The form of *cGANs with Projection Discriminator* (Miyato and Koyama, 2018, https://arxiv.org/abs/1802.05637): the
    logit is y^T V h + psi(h) for features h that are summed over the image. The paper derives it for one-hot y. The
    same form follows for multi-hot y whose entries are independent given the image: the log-ratio of each label adds
    its own row of V, and what labels that are absent add depends on the image alone, so psi takes it up.

    Spectral norm, sum pooling and the uniform initialization of Glorot and Bengio (gain sqrt(2) for convolutions) are
    the paper's; ours has the strided convolutions of a DCGAN's discriminator in the place of residual blocks.

    For 64x64 images and 64 base channels the image (3, 64, 64) becomes (64, 32, 32), (128, 16, 16), (256, 8, 8),
    (512, 4, 4), the row h of 512 sums, and one logit; each halving of `sample_size` drops the last of these widths.

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
        layers: list[nn.Module] = []
        for before, after in pairwise([in_channels, *widths]):
            layers += [_normalize(nn.Conv2d(before, after, 4, 2, 1), gain=2**0.5), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)
        self.real_head = _normalize(nn.Linear(widths[-1], 1))  # psi
        self.label_embedding = _normalize(nn.Linear(num_classes, widths[-1], bias=False))  # V, a row a label

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
        features = self.layers(pixel_values).sum((2, 3))
        projection = (self.label_embedding(class_labels.to(pixel_values.dtype)) * features).sum(1)
        return self.real_head(features).flatten() + projection, None


def _normalize(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> nn.Module:
    """Draws the weight anew and divides it by its spectral norm from then on."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return spectral_norm(layer)


def _count_stages(sample_size: int) -> int:
    """Counts the halvings that lead from an image to 4x4 cells."""
    below = 2 ** (max(sample_size, 1).bit_length() - 1)
    if sample_size < 16 or sample_size != below:
        nearest = "16x16" if sample_size < 16 else f"{below}x{below} or {2 * below}x{2 * below}"
        raise ValueError(
            f"`sample_size` must be a power of two of at least 16, got {sample_size}; resize the images to {nearest}."
        )
    return below.bit_length() - 3


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int | str, ...], advice: str) -> None:
    """Refuses a tensor whose shape is not `shape`, where a word stands for any number."""
    got = None if tensor is None else tuple(tensor.shape)
    if got is None or len(got) != len(shape) or any(b not in (a, "batch") for a, b in zip(got, shape, strict=True)):
        raise ValueError(f"`{name}` must have shape ({', '.join(map(str, shape))}), got {got}; {advice}.")

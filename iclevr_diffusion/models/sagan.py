from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class SelfAttention(nn.Module):
    """Adds to each cell of a feature map what it gathers from all cells.

    Eq. 1 to 3 of *Self-Attention Generative Adversarial Networks* (Zhang et al., 2019,
    https://arxiv.org/abs/1805.08318): y = gamma * v(sum_i softmax_i(f(x_i)^T g(x_j)) h(x_i)) + x, where f, g and h are
    1x1 convolutions to an eighth of the channels and v leads back. gamma starts at 0: the layer learns first from the
    neighbourhood that convolutions see.

    Args:
        channels: Channels of the feature map, a multiple of 8.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.key = _normalize(nn.Conv2d(channels, channels // 8, 1, bias=False))  # f
        self.query = _normalize(nn.Conv2d(channels, channels // 8, 1, bias=False))  # g
        self.value = _normalize(nn.Conv2d(channels, channels // 8, 1, bias=False))  # h
        self.output = _normalize(nn.Conv2d(channels // 8, channels, 1, bias=False))  # v
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, sample: Tensor) -> Tensor:
        """Maps features (B, channels, H, W) to features of the same shape."""
        key, query, value = (layer(sample).flatten(2) for layer in (self.key, self.query, self.value))
        # Written out because torch's fused attention has no second derivative, which gradient penalties need.
        weights = (query.transpose(1, 2) @ key).softmax(dim=-1)  # (B, HW, HW): each row a cell that gathers
        gathered = (value @ weights.transpose(1, 2)).unflatten(2, sample.shape[-2:])
        return self.gamma * self.output(gathered) + sample


class SAGANGenerator(ModelMixin, ConfigMixin):
    """Generator of transposed convolutions with self-attention that draws an image of the given labels from noise.

    The spectral norm on every convolution and the attention are those of *Self-Attention Generative Adversarial
    Networks* (Zhang et al., 2019, https://arxiv.org/abs/1805.08318), as is the uniform initialization of Glorot and
    Bengio, which the authors' code uses. Where the paper has residual blocks with conditional normalization, ours has
    the transposed convolutions of a DCGAN; labels pass a linear layer and a ReLU and are joined to the noise.

    For 64x64 images and 64 base channels the noise and labels (2 * latent_dim, 1, 1) become (512, 4, 4), (256, 8, 8),
    (128, 16, 16) with attention, (64, 32, 32) with attention, and the image (3, 64, 64); each halving of
    `sample_size` drops the first of these widths.

    Args:
        num_classes: Number of labels, the width of `class_labels`.
        sample_size: Height and width of the images in pixels, a power of two of at least 16.
        out_channels: Channels of the images.
        latent_dim: Width of the noise, and of the labels that are joined to it.
        base_channels: Channels of the last hidden stage, a multiple of 8; each stage before has twice as many.
        label_activation: Whether a ReLU follows the labels' linear layer.
        standardized: Whether the network draws the images' deviation from their mean, in units of its deviation, in
            the place of images that a tanh bounds; `set_data_statistics` says what these are.

    Raises:
        ValueError: If `sample_size` is not a power of two of at least 16, or `base_channels` no multiple of 8.
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
        label_activation: bool = True,
        standardized: bool = False,
    ) -> None:
        super().__init__()
        num_stages = _count_stages(sample_size)
        _check_base_channels(base_channels)
        widths = [base_channels * 2**stage for stage in reversed(range(num_stages))]
        self.label_embedding = nn.Linear(num_classes, latent_dim)
        layers: list[nn.Module] = []
        for stage, (before, after) in enumerate(pairwise([2 * latent_dim, *widths])):
            stride, padding = (1, 0) if stage == 0 else (2, 1)
            convolution = nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False)
            layers += [_normalize(convolution), nn.BatchNorm2d(after), nn.ReLU()]
            if stage >= num_stages - 2:
                layers.append(SelfAttention(after))
        layers += [_normalize(nn.ConvTranspose2d(widths[-1], out_channels, 4, 2, 1))]
        layers += [] if standardized else [nn.Tanh()]
        self.layers = nn.Sequential(*layers)
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


class SAGANDiscriminator(ModelMixin, ConfigMixin):
    """Discriminator of strided convolutions with self-attention that sees the labels as one more channel.

    The mirror of `SAGANGenerator` and of the same paper: spectral norm on every convolution in the place of batch
    normalization. Ours maps the labels to a plane of H * W numbers by a linear layer where the paper projects them,
    and takes the slope 0.1 from the plain network of *Spectral Normalization for Generative Adversarial Networks*
    (Miyato et al., 2018, https://arxiv.org/abs/1802.05957).

    For 64x64 images and 64 base channels an image and its plane (3 + 1, 64, 64) become (64, 32, 32), (128, 16, 16),
    (256, 8, 8) with attention, (512, 4, 4) with attention, and one logit; each halving of `sample_size` drops the
    last of these widths.

    Args:
        num_classes: Number of labels, the width of `class_labels`.
        sample_size: Height and width of the images in pixels, a power of two of at least 16.
        in_channels: Channels of the images.
        base_channels: Channels of the first stage, a multiple of 8; each stage after it has twice as many.

    Raises:
        ValueError: If `sample_size` is not a power of two of at least 16, or `base_channels` no multiple of 8.
    """

    @register_to_config
    def __init__(
        self, num_classes: int = 24, sample_size: int = 64, in_channels: int = 3, *, base_channels: int = 64
    ) -> None:
        super().__init__()
        num_stages = _count_stages(sample_size)
        _check_base_channels(base_channels)
        widths = [base_channels * 2**stage for stage in range(num_stages)]
        self.label_embedding = nn.Linear(num_classes, sample_size**2)
        layers: list[nn.Module] = []
        for stage, (before, after) in enumerate(pairwise([in_channels + 1, *widths])):
            layers += [_normalize(nn.Conv2d(before, after, 4, 2, 1)), nn.LeakyReLU(0.1)]
            if stage >= num_stages - 2:
                layers.append(SelfAttention(after))
        layers.append(_normalize(nn.Conv2d(widths[-1], 1, 4)))
        self.layers = nn.Sequential(*layers)

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


def _normalize(convolution: nn.Conv2d | nn.ConvTranspose2d) -> nn.Module:
    """Draws the weight anew and divides it by its spectral norm from then on."""
    nn.init.xavier_uniform_(convolution.weight)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return spectral_norm(convolution)


def _check_base_channels(base_channels: int) -> None:
    if base_channels < 8 or base_channels % 8:
        below = base_channels // 8 * 8
        nearest = [str(channels) for channels in (below, below + 8) if channels > 0]
        raise ValueError(
            "`base_channels` must be a multiple of 8, since attention looks at an eighth of the channels, got"
            f" {base_channels}; take {' or '.join(nearest)}."
        )


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

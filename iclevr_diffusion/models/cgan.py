from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class CGANGenerator(ModelMixin, ConfigMixin):
    """Generator whose fully connected stem reads noise and labels before transposed convolutions draw the image.

    Noise and labels enter side by side, as in *Conditional Generative Adversarial Nets* (Mirza and Osindero, 2014,
    https://arxiv.org/abs/1411.1784), whose network is fully connected throughout; without labels it is the generator
    of *Generative Adversarial Networks* (Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661). Ours goes on in
    transposed convolutions and draws every weight from N(0, 0.02^2), both as in a DCGAN.

    For 64x64 images and 64 base channels the joined row (latent_dim + num_classes) becomes 1024, then 512 * 4 * 4
    numbers, reshaped to (512, 4, 4), then (256, 8, 8), (128, 16, 16), (64, 32, 32) and the image (3, 64, 64); each
    halving of `sample_size` drops the first of the four widths.

    Args:
        num_classes: Number of labels, the width of `class_labels`; 0 makes a GAN without labels.
        sample_size: Height and width of the images in pixels, a power of two of at least 16.
        out_channels: Channels of the images.
        latent_dim: Width of the noise.
        base_channels: Channels of the last hidden stage; each stage before has twice as many.
        hidden_dim: Width of the first fully connected layer.

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
        hidden_dim: int = 1024,
    ) -> None:
        super().__init__()
        widths = [base_channels * 2**stage for stage in reversed(range(_count_stages(sample_size)))]
        layers: list[nn.Module] = []
        for before, after in pairwise([latent_dim + num_classes, hidden_dim, widths[0] * 4 * 4]):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
        layers.append(nn.Unflatten(1, (widths[0], 4, 4)))
        for before, after in pairwise(widths):
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.ConvTranspose2d(widths[-1], out_channels, 4, 2, 1), nn.Tanh()]
        self.layers = nn.Sequential(*layers).apply(_initialize)

    def forward(self, latents: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Draws one image for each row of noise.

        Args:
            latents: Noise (B, latent_dim), of unit variance.
            class_labels: Multi-hot rows (B, num_classes); `None` where `num_classes` is 0.

        Returns:
            Images (B, out_channels, H, W) in [-1, 1].

        Raises:
            ValueError: If a shape does not fit.
        """
        _check_shape("latents", latents, ("batch", self.config.latent_dim), "draw them with `torch.randn`")
        class_labels = _check_labels(class_labels, latents, self.config.num_classes)
        return self.layers(torch.cat([latents, class_labels], dim=1))


class CGANDiscriminator(ModelMixin, ConfigMixin):
    """Discriminator of strided convolutions whose fully connected layers read the labels beside the features.

    The mirror of `CGANGenerator` and of the same papers: labels enter at the fully connected layers, which come last
    here. It has no sigmoid, since every loss here takes logits.

    For 64x64 images and 64 base channels the image (3, 64, 64) becomes (64, 32, 32), (128, 16, 16), (256, 8, 8),
    (512, 4, 4); the 512 * 4 * 4 numbers are joined by the labels and become 1024 numbers and one logit; each halving
    of `sample_size` drops the last of the four widths.

    Args:
        num_classes: Number of labels, the width of `class_labels`; 0 makes a GAN without labels.
        sample_size: Height and width of the images in pixels, a power of two of at least 16.
        in_channels: Channels of the images.
        base_channels: Channels of the first stage; each stage after it has twice as many.
        hidden_dim: Width of the first fully connected layer.

    Raises:
        ValueError: If `sample_size` is not a power of two of at least 16.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 24,
        sample_size: int = 64,
        in_channels: int = 3,
        *,
        base_channels: int = 64,
        hidden_dim: int = 1024,
    ) -> None:
        super().__init__()
        widths = [base_channels * 2**stage for stage in range(_count_stages(sample_size))]
        layers = [nn.Conv2d(in_channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Flatten()).apply(_initialize)
        self.head = nn.Sequential(
            nn.Linear(widths[-1] * 4 * 4 + num_classes, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden_dim, 1),
        ).apply(_initialize)

    def forward(self, pixel_values: Tensor, class_labels: Tensor | None = None) -> tuple[Tensor, None]:
        """Judges whether images are real and show their labels.

        Args:
            pixel_values: Images (B, in_channels, H, W) in [-1, 1].
            class_labels: Multi-hot rows (B, num_classes); `None` where `num_classes` is 0.

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
        class_labels = _check_labels(class_labels, pixel_values, self.config.num_classes)
        return self.head(torch.cat([self.layers(pixel_values), class_labels], dim=1)).flatten(), None


class CGANEmbeddingGenerator(ModelMixin, ConfigMixin):
    """Generator that joins a learned embedding of the class to the noise, for small images such as digits.

    A conditional GAN after *Conditional Generative Adversarial Nets* (Mirza and Osindero, 2014,
    https://arxiv.org/abs/1411.1784) with the common convolutional network for MNIST, weights drawn from N(0, 0.02^2).
    The embedding is a linear layer without bias, which for one-hot rows picks a row of a table as `nn.Embedding`
    does for their indices; for several labels it adds their rows.

    For 28x28 images and 64 base channels the joined row (latent_dim + embedding_dim) becomes 128 * 7 * 7 numbers,
    reshaped to (128, 7, 7), then (64, 14, 14) and the image (1, 28, 28).

    Args:
        num_classes: Number of classes, the width of `class_labels`.
        sample_size: Height and width of the images in pixels, a multiple of 4.
        out_channels: Channels of the images.
        latent_dim: Width of the noise.
        embedding_dim: Width of the embedding.
        base_channels: Channels of the last hidden stage; the stage before has twice as many.

    Raises:
        ValueError: If `sample_size` is not a multiple of 4.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 10,
        sample_size: int = 28,
        out_channels: int = 1,
        *,
        latent_dim: int = 100,
        embedding_dim: int = 10,
        base_channels: int = 64,
    ) -> None:
        super().__init__()
        _check_multiple_of_4(sample_size)
        small_size, num_features = sample_size // 4, 2 * base_channels * (sample_size // 4) ** 2
        self.label_embedding = nn.Linear(num_classes, embedding_dim, bias=False)
        nn.init.normal_(self.label_embedding.weight)  # of the noise's own size, as `nn.Embedding` draws its table
        self.layers = nn.Sequential(
            nn.Linear(latent_dim + embedding_dim, num_features, bias=False),
            nn.BatchNorm1d(num_features),
            nn.ReLU(),
            nn.Unflatten(1, (2 * base_channels, small_size, small_size)),
            nn.ConvTranspose2d(2 * base_channels, base_channels, 4, 2, 1, bias=False),
            nn.BatchNorm2d(base_channels),
            nn.ReLU(),
            nn.ConvTranspose2d(base_channels, out_channels, 4, 2, 1),
            nn.Tanh(),
        ).apply(_initialize)

    def forward(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        """Draws one image for each row of noise.

        Args:
            latents: Noise (B, latent_dim), of unit variance.
            class_labels: One-hot or multi-hot rows (B, num_classes).

        Returns:
            Images (B, out_channels, H, W) in [-1, 1].

        Raises:
            ValueError: If a shape does not fit.
        """
        _check_shape("latents", latents, ("batch", self.config.latent_dim), "draw them with `torch.randn`")
        class_labels = _check_labels(class_labels, latents, self.config.num_classes)
        return self.layers(torch.cat([latents, self.label_embedding(class_labels)], dim=1))


class CGANEmbeddingDiscriminator(ModelMixin, ConfigMixin):
    """Discriminator that sees a learned embedding of the class as further, constant channels of the image.

    The mirror of `CGANEmbeddingGenerator`, of the same paper and with an embedding of its own. It has no sigmoid,
    since every loss here takes logits.

    For 28x28 images and 64 base channels the image and its embedding (1 + 10, 28, 28) become (64, 14, 14),
    (128, 7, 7) and one logit.

    Args:
        num_classes: Number of classes, the width of `class_labels`.
        sample_size: Height and width of the images in pixels, a multiple of 4.
        in_channels: Channels of the images.
        embedding_dim: Width of the embedding.
        base_channels: Channels of the first stage; the second has twice as many.

    Raises:
        ValueError: If `sample_size` is not a multiple of 4.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 10,
        sample_size: int = 28,
        in_channels: int = 1,
        *,
        embedding_dim: int = 10,
        base_channels: int = 64,
    ) -> None:
        super().__init__()
        _check_multiple_of_4(sample_size)
        self.label_embedding = nn.Linear(num_classes, embedding_dim, bias=False)
        nn.init.normal_(self.label_embedding.weight)
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels + embedding_dim, base_channels, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(base_channels, 2 * base_channels, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * base_channels),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * base_channels * (sample_size // 4) ** 2, 1),
        ).apply(_initialize)

    def forward(self, pixel_values: Tensor, class_labels: Tensor) -> tuple[Tensor, None]:
        """Judges whether images are real and show their class.

        Args:
            pixel_values: Images (B, in_channels, H, W) in [-1, 1].
            class_labels: One-hot or multi-hot rows (B, num_classes).

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
        class_labels = _check_labels(class_labels, pixel_values, self.config.num_classes)
        embedding = self.label_embedding(class_labels)[:, :, None, None].expand(-1, -1, size, size)
        return self.layers(torch.cat([pixel_values, embedding], dim=1)).flatten(), None


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, mean=1.0, std=0.02)


def _check_labels(class_labels: Tensor | None, beside: Tensor, num_classes: int) -> Tensor:
    """Returns the labels in the dtype of the tensor `beside` them, a row of no width where there are no classes."""
    if class_labels is None and num_classes == 0:
        return beside.new_zeros(len(beside), 0)
    _check_shape(
        "class_labels", class_labels, (len(beside), num_classes), "`pipe.encode_labels` makes them from names"
    )
    return class_labels.to(beside.dtype)


def _check_multiple_of_4(sample_size: int) -> None:
    if sample_size < 4 or sample_size % 4:
        below = sample_size // 4 * 4
        nearest = [f"{size}x{size}" for size in (below, below + 4) if size > 0]
        raise ValueError(
            f"`sample_size` must be a multiple of 4, got {sample_size}; resize the images to {' or '.join(nearest)}."
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

import itertools
from typing import Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

# What `hidden_widths` is where it is not given.
HIDDEN_WIDTHS = {"mlp": (400,), "conv": (32, 64, 128, 256)}


class MultiLabelVAE(ModelMixin, ConfigMixin):
    """Variational auto-encoder of images, with or without labels.

    *Auto-Encoding Variational Bayes* (Kingma and Welling, 2014, https://arxiv.org/abs/1312.6114): the encoder gives
    the normal distribution q(z | x) = N(mean, exp(log_variance)) of an image's latents, the decoder an image of latents,
    which are N(0, 1) where images are made up. Labels enter both, as in *Learning Structured Output Representation
    using Deep Conditional Generative Models* (Sohn et al., 2015,
    https://papers.nips.cc/paper/2015/hash/8d55a249e6baa5c06772297520da2051-Abstract.html).

    `mlp` is the network of the paper in the sizes of PyTorch's own example, 400 hidden ReLU units instead of 500
    tanh units and PyTorch's initialisation; its shapes for 28x28x1 digits and 20 latents:

        encoder  784 + num_classes -> 400 -> 2 * 20, the means and the logarithms of the variances
        decoder  20 + num_classes -> 400 -> 784

    `conv` has the layers of *Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
    Networks* (Radford et al., 2016, https://arxiv.org/abs/1511.06434) in place of the hidden ones: 4x4 convolutions
    of stride 2 with BatchNorm and LeakyReLU, mirrored with ReLU; the labels enter the encoder as constant planes. Its
    shapes for 64x64x3:

        encoder  3 + num_classes -> 32, 32x32 -> 64, 16x16 -> 128, 8x8 -> 256, 4x4 -> 2 * latent_dim
        decoder  latent_dim + num_classes -> 256, 4x4 -> 128, 8x8 -> 64, 16x16 -> 32, 32x32 -> 3, 64x64

    The decoder gives the logits of each pixel's brightness, which is (pixel + 1) / 2 for images in [-1, 1]. Hence an
    image is `2 * sigmoid(logits) - 1`: the paper's sigmoid, whatever likelihood the model is trained with.

    The encoder sees `(pixels - data_mean) / data_std`. These statistics are saved with the weights, and leave images as
    they are until `set_data_statistics` is called.

    Args:
        latent_dim: Number of latents.
        num_classes: Number of labels, the width of `class_labels`; 0 is the model without labels.
        sample_size: Height and width of the images in pixels; with `conv` a multiple of 2 for each of its layers.
        in_channels: Channels of the images.
        architecture: `mlp` for digits, `conv` for larger images.
        hidden_widths: Units of the hidden layers of `mlp`, or channels of the layers of `conv`, outermost first; by
            default those above.

    Raises:
        ValueError: If the sizes do not fit each other, or `architecture` is unknown.
    """

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 60,
        num_classes: int = 24,
        sample_size: int = 64,
        in_channels: int = 3,
        architecture: Literal["mlp", "conv"] = "conv",
        hidden_widths: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if architecture not in HIDDEN_WIDTHS:
            raise ValueError(f"`architecture` must be `mlp` or `conv`, got {architecture!r}.")
        for name, value, least in (("latent_dim", latent_dim, 1), ("num_classes", num_classes, 0)):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        widths = HIDDEN_WIDTHS[architecture] if hidden_widths is None else tuple(hidden_widths)
        if not widths:
            raise ValueError("`hidden_widths` must hold at least one width, got none.")
        if architecture == "mlp":
            image_shape = (in_channels, sample_size, sample_size)
            self.encoder, self.decoder = _make_mlp(image_shape, latent_dim, num_classes, widths)
        else:
            _check_conv_size(sample_size, len(widths))
            self.encoder, self.decoder = _make_conv(sample_size, in_channels, latent_dim, num_classes, widths)
        self.register_buffer("data_mean", torch.zeros(in_channels, sample_size, sample_size))
        self.register_buffer("data_std", torch.ones(()))

    def set_data_statistics(self, mean: Tensor | np.ndarray, std: float) -> None:
        """Has the encoder see images less `mean` (in_channels, H, W), divided by `std`; both in units of [-1, 1].

        Raises:
            ValueError: If `mean` is no such image, or `std` is not positive.
        """
        mean = torch.as_tensor(mean)
        if mean.shape != self.data_mean.shape or not std > 0:
            raise ValueError(
                f"`mean` must have shape {tuple(self.data_mean.shape)} and `std` be positive, got {tuple(mean.shape)} and"
                f" {std}; `store.statistics` gives both."
            )
        self.data_mean.copy_(mean)
        self.data_std.fill_(std)

    def encode(self, pixel_values: Tensor, class_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the distribution of the latents of images.

        Args:
            pixel_values: Images (B, in_channels, H, W) in [-1, 1].
            class_labels: Multi-hot rows (B, num_classes) of them; `None` for the model without labels.

        Returns:
            The means and the logarithms of the variances, each (B, latent_dim).

        Raises:
            ValueError: If a shape does not fit.
        """
        config = self.config
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` must have shape (batch, {', '.join(map(str, expected))}), got"
                f" {tuple(pixel_values.shape)}; resize the images, or build a model with another `sample_size` or"
                " `in_channels`."
            )
        self._check_labels(class_labels, len(pixel_values))
        inputs = (pixel_values - self.data_mean) / self.data_std
        if config.architecture == "mlp":
            inputs = inputs.flatten(1)
        if class_labels is not None:
            class_labels = class_labels.to(inputs.dtype)
            if config.architecture == "conv":
                class_labels = class_labels[:, :, None, None].expand(-1, -1, *pixel_values.shape[2:])
            inputs = torch.cat([inputs, class_labels], dim=1)
        mean, log_variance = self.encoder(inputs).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, latents: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Maps latents (B, latent_dim) and multi-hot rows (B, num_classes) to images (B, in_channels, H, W) in [-1, 1].

        Raises:
            ValueError: If a shape does not fit.
        """
        return logits_to_images(self.decode_logits(latents, class_labels))

    def decode_logits(self, latents: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Maps what `decode` takes to the logits (B, in_channels, H, W) of the pixels' brightness."""
        if latents.ndim != 2 or latents.shape[1] != self.config.latent_dim:
            raise ValueError(
                f"`latents` must have shape (batch, {self.config.latent_dim}), got {tuple(latents.shape)}."
            )
        self._check_labels(class_labels, len(latents))
        if class_labels is not None:
            latents = torch.cat([latents, class_labels.to(latents.dtype)], dim=1)
        return self.decoder(latents)

    def forward(self, pixel_values: Tensor, class_labels: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes images, draws latents of them and decodes these: what the bound on the likelihood is made of.

        The latents are `mean + exp(log_variance / 2) * noise`, with noise of torch's global generator, so that gradients go
        through them (Kingma and Welling, section 2.4).

        Args:
            pixel_values: Images (B, in_channels, H, W) in [-1, 1].
            class_labels: Multi-hot rows (B, num_classes) of them; `None` for the model without labels.

        Returns:
            The logits (B, in_channels, H, W) of the decoded pixels' brightness, for `logits_to_images`, and what
            `encode` returns.

        Raises:
            ValueError: If a shape does not fit.
        """
        mean, log_variance = self.encode(pixel_values, class_labels)
        latents = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return self.decode_logits(latents, class_labels), mean, log_variance

    def _check_labels(self, class_labels: Tensor | None, batch_size: int) -> None:
        num_classes = self.config.num_classes
        if num_classes == 0:
            if class_labels is not None:
                raise ValueError(
                    "`class_labels` must be left out: this model was built with num_classes=0 and knows no labels."
                )
        elif class_labels is None or tuple(class_labels.shape) != (batch_size, num_classes):
            got = None if class_labels is None else tuple(class_labels.shape)
            raise ValueError(
                f"`class_labels` must have shape ({batch_size}, {num_classes}), got {got}; `pipe.encode_labels` makes"
                " them from names."
            )


def logits_to_images(logits: Tensor) -> Tensor:
    """Maps the decoder's logits to pixels in [-1, 1]: 2 * sigmoid(logits) - 1, written with one call."""
    return (logits / 2).tanh()


def _make_mlp(
    image_shape: tuple[int, int, int], latent_dim: int, num_classes: int, widths: tuple[int, ...]
) -> tuple[nn.Module, nn.Module]:
    num_pixels = image_shape[0] * image_shape[1] * image_shape[2]

    def layers(*sizes: int) -> list[nn.Module]:
        made = [[nn.Linear(before, after), nn.ReLU()] for before, after in itertools.pairwise(sizes)]
        return [layer for pair in made for layer in pair][:-1]

    encoder = nn.Sequential(*layers(num_pixels + num_classes, *widths, 2 * latent_dim))
    decoder = nn.Sequential(
        *layers(latent_dim + num_classes, *reversed(widths), num_pixels), nn.Unflatten(1, image_shape)
    )
    return encoder, decoder


def _make_conv(
    sample_size: int, in_channels: int, latent_dim: int, num_classes: int, widths: tuple[int, ...]
) -> tuple[nn.Module, nn.Module]:
    innermost = sample_size // 2 ** len(widths)
    encoder: list[nn.Module] = []
    for before, after in itertools.pairwise((in_channels + num_classes, *widths)):
        # A bias would be cancelled by the normalization after it.
        encoder += [nn.Conv2d(before, after, 4, stride=2, padding=1, bias=False)]
        encoder += [nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
    encoder += [nn.Flatten(), nn.Linear(widths[-1] * innermost**2, 2 * latent_dim)]
    decoder: list[nn.Module] = [
        nn.Linear(latent_dim + num_classes, widths[-1] * innermost**2),
        nn.Unflatten(1, (widths[-1], innermost, innermost)),
        nn.ReLU(),
    ]
    for before, after in itertools.pairwise(reversed(widths)):
        decoder += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False)]
        decoder += [nn.BatchNorm2d(after), nn.ReLU()]
    decoder += [nn.ConvTranspose2d(widths[0], in_channels, 4, stride=2, padding=1)]
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


def _check_conv_size(sample_size: int, num_layers: int) -> None:
    multiple = 2**num_layers
    if sample_size < multiple or sample_size % multiple:
        below = sample_size // multiple * multiple
        nearest = [size for size in (below, below + multiple) if size > 0]
        raise ValueError(
            f"`sample_size` must be a multiple of 2 ** len(hidden_widths) = {multiple}, got {sample_size}; resize the"
            f" images to {' or '.join(map(str, nearest))}, or give fewer `hidden_widths`."
        )

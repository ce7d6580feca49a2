"""Random changes of images.

A judge is trained on sharp, clean images and then reads generated ones, which are shifted, blurred, noisy and off in
light: `augment`, which leaves the labels true (mirrored ones only where a mirror leaves them true). A discriminator that sees few images learns them by heart unless it,
and the generator through it, sees them changed: `diff_augment`. Every function takes and returns `pixel_values`
(B, C, H, W), where C is 1 for grey, 3 for RGB and 4 for RGBA, draws afresh for each image of the batch, and draws from `generator` alone, so
that the same generator state gives the same images.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _uniform(
    pixel_values: Tensor, low: float, high: float, generator: torch.Generator | None, channels: int = 1
) -> Tensor:
    """Draws (B, channels, 1, 1) numbers from [low, high)."""
    shape = (len(pixel_values), channels, 1, 1)
    draw = torch.rand(shape, generator=generator, device=pixel_values.device, dtype=pixel_values.dtype)
    return low + (high - low) * draw


def random_flip(pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mirrors half of the images left to right, for labels that a mirror keeps, as it does colour and shape."""
    return torch.where(_uniform(pixel_values, 0, 1, generator) < 0.5, pixel_values.flip(-1), pixel_values)


def random_shift(pixel_values: Tensor, max_shift: int = 4, generator: torch.Generator | None = None) -> Tensor:
    """Moves each image by up to `max_shift` whole pixels both ways and repeats the border where nothing is left."""
    batch, _, height, width = pixel_values.shape
    shift = torch.randint(-max_shift, max_shift + 1, (2, batch, 1), generator=generator, device=pixel_values.device)
    rows = (torch.arange(height, device=shift.device) + shift[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=shift.device) + shift[1]).clamp(0, width - 1)
    image = torch.arange(batch, device=shift.device)[:, None, None]
    # Indexing moves the channels last: (B, H, W, C).
    return pixel_values.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_blur(
    pixel_values: Tensor, low: float = -0.5, high: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Mixes each image with its blurred copy: 1 is the blur (a 5x5 binomial), 0 the image, below 0 sharpens."""
    weight = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=pixel_values.device, dtype=pixel_values.dtype) / 16
    padded = F.pad(pixel_values, (2, 2, 2, 2), mode="replicate")
    channels = pixel_values.shape[1]
    blurred = F.conv2d(padded, weight.expand(channels, 1, 1, 5), groups=channels)
    blurred = F.conv2d(blurred, weight[:, None].expand(channels, 1, 5, 1), groups=channels)
    return torch.lerp(pixel_values, blurred, _uniform(pixel_values, low, high, generator))


def random_resample(pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Shrinks a quarter of the images to half and a quarter to three quarters of their size, and enlarges them again."""
    size, draw = pixel_values.shape[-2:], _uniform(pixel_values, 0, 1, generator)
    result = pixel_values
    for factor, low, high in ((0.5, 0.0, 0.25), (0.75, 0.25, 0.5)):
        small_size = [max(1, round(factor * side)) for side in size]
        small = F.interpolate(pixel_values, small_size, mode="bilinear", antialias=True)
        result = torch.where((draw >= low) & (draw < high), F.interpolate(small, size, mode="bilinear"), result)
    return result


def random_light(
    pixel_values: Tensor,
    brightness: float = 0.15,
    contrast: float = 0.25,
    tint: float = 0.05,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Changes contrast about the image's mean by a factor, then adds a brightness, and to each channel a tint.

    The fourth channel, opacity, is no light and stays.

    Args:
        pixel_values: Images (B, C, H, W).
        brightness: Largest amount added to or taken from an image.
        contrast: The factor lies in [1 - contrast, 1 + contrast).
        tint: Largest amount added to or taken from one channel; small, because colours are labels.
        generator: Source of the draws.
    """
    light, opacity = pixel_values[:, :3], pixel_values[:, 3:]
    mean = light.mean((1, 2, 3), keepdim=True)
    factor = _uniform(light, 1 - contrast, 1 + contrast, generator)
    offset = _uniform(light, -brightness, brightness, generator)
    tints = _uniform(light, -tint, tint, generator, channels=light.shape[1])
    return torch.cat([mean + factor * (light - mean) + offset + tints, opacity], dim=1)


def random_noise(pixel_values: Tensor, max_std: float = 0.1, generator: torch.Generator | None = None) -> Tensor:
    """Adds Gaussian noise of a standard deviation drawn for each image from [0, max_std)."""
    noise = torch.randn(pixel_values.shape, generator=generator, device=pixel_values.device, dtype=pixel_values.dtype)
    return pixel_values + _uniform(pixel_values, 0, max_std, generator) * noise


def augment(pixel_values: Tensor, generator: torch.Generator | None = None, *, flip: bool = True) -> Tensor:
    """Flips, shifts, resamples, blurs or sharpens, relights and roughens images in [-1, 1]; cuts the result to [-1, 1].

    Args:
        pixel_values: Images (B, C, H, W), which are moved by up to a sixteenth of their width.
        generator: Source of the draws.
        flip: Whether half of the images are mirrored, as labels such as "left" or digits forbid.
    """
    pixel_values = random_flip(pixel_values, generator) if flip else pixel_values
    pixel_values = random_shift(pixel_values, max(1, pixel_values.shape[-1] // 16), generator)
    pixel_values = random_resample(pixel_values, generator)
    pixel_values = random_light(random_blur(pixel_values, generator=generator), generator=generator)
    return random_noise(pixel_values, generator=generator).clamp(-1, 1)


def random_brightness(pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Adds to each image one number from [-0.5, 0.5)."""
    return pixel_values + _uniform(pixel_values, -0.5, 0.5, generator)


def random_saturation(pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Scales each pixel's distance from its own gray by a factor from [0, 2), one for all pixels of an image."""
    gray = pixel_values.mean(1, keepdim=True)
    return gray + _uniform(pixel_values, 0, 2, generator) * (pixel_values - gray)


def random_contrast(pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Scales each image's distance from its own mean by a factor from [0.5, 1.5)."""
    mean = pixel_values.mean((1, 2, 3), keepdim=True)
    return mean + _uniform(pixel_values, 0.5, 1.5, generator) * (pixel_values - mean)


def random_translation(pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Moves each image by up to an eighth of its side in whole pixels both ways; what comes in is 0, middle gray."""
    batch, _, *sides = pixel_values.shape
    for dim, side in zip((2, 3), sides, strict=True):
        shift = torch.randint(-(side // 8), side // 8 + 1, (batch, 1), generator=generator, device=pixel_values.device)
        source = torch.arange(side, device=shift.device) - shift  # (B, side)
        shape = [batch, 1, side, 1] if dim == 2 else [batch, 1, 1, side]
        index = source.clamp(0, side - 1).view(shape).expand_as(pixel_values)
        outside = ((source < 0) | (source >= side)).view(shape)
        pixel_values = pixel_values.gather(dim, index).masked_fill(outside, 0)
    return pixel_values


def random_cutout(pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Sets to 0, middle gray, a box of half the image's sides around a random point; the border may cut the box."""
    batch, _, *sides = pixel_values.shape
    covered = []
    for side in sides:
        length = side // 2
        centre = torch.randint(  # a box of even length has its centre between pixels, and so one place more
            0, side + 1 - length % 2, (batch, 1), generator=generator, device=pixel_values.device
        )
        distance = torch.arange(side, device=centre.device) - (centre - length // 2)
        covered.append((distance >= 0) & (distance < length))  # (B, side)
    box = covered[0][:, None, :, None] & covered[1][:, None, None, :]
    return pixel_values.masked_fill(box, 0)


DIFF_AUGMENT_POLICIES = {
    "color": (random_brightness, random_saturation, random_contrast),
    "translation": (random_translation,),
    "cutout": (random_cutout,),
}


def diff_augment(pixel_values: Tensor, policy: Sequence[str], generator: torch.Generator | None = None) -> Tensor:
    """Changes real and generated images before a discriminator sees them, and lets gradients through.

    *Differentiable Augmentation for Data-Efficient GAN Training* (Zhao et al., 2020,
    https://arxiv.org/abs/2006.10738), with the strengths of the authors' code. It is meant for every image that the
    discriminator sees, in its own step and in the generator's, each time with draws of its own. Labels need not
    survive it (a color may fade to gray, a box hide an object): what reads labels should see the images as they were.
    Results are not cut to [-1, 1], since that would stop gradients.

    Args:
        pixel_values: Images (B, C, H, W) in [-1, 1].
        policy: Some of "color", "translation" and "cutout", applied in this order; none leaves the images as they are.
        generator: Source of the draws.

    Returns:
        The changed images, of the same shape.

    Raises:
        ValueError: If `policy` holds an unknown name, or the images do not have four dimensions.
    """
    unknown = [name for name in policy if name not in DIFF_AUGMENT_POLICIES]
    if isinstance(policy, str) or unknown:
        raise ValueError(f"`policy` must be a tuple of {', '.join(map(repr, DIFF_AUGMENT_POLICIES))}, got {policy!r}.")
    if pixel_values.ndim != 4:
        raise ValueError(
            f"`pixel_values` must have shape (batch, channels, height, width), got {tuple(pixel_values.shape)}."
        )
    for name in policy:
        for change in DIFF_AUGMENT_POLICIES[name]:
            pixel_values = change(pixel_values, generator)
    return pixel_values


def discriminate(
    discriminator: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]],
    pixel_values: Tensor,
    class_labels: Tensor,
    policy: Sequence[str],
) -> tuple[Tensor, Tensor | None]:
    """Has a discriminator tell changed images apart, but read the labels of the images as they are.

    Args:
        discriminator: Maps images (B, C, H, W) and labels (B, K) to logits (B,) and class logits (B, K), or `None` in
            their place.
        pixel_values: Images (B, C, H, W) in [-1, 1].
        class_labels: Multi-hot rows (B, K).
        policy: That of `diff_augment`.

    Returns:
        Logits of the changed images, and class logits of the images as they are if the discriminator gives any.
    """
    logits, class_logits = discriminator(diff_augment(pixel_values, policy), class_labels)
    if policy and class_logits is not None:
        _, class_logits = discriminator(pixel_values, class_labels)
    return logits, class_logits

from collections.abc import Sequence
from typing import Literal

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

from .label_vocabulary import LabelVocabulary
from .labelled_pipeline import ConditionalImageOutput, Images, LabelledPipeline


class CycleGANPipeline(LabelledPipeline, DiffusionPipeline):
    """Maps images of one domain to images of another, and back, by one call of a generator.

    *Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks* (Zhu et al., 2017,
    https://arxiv.org/abs/1703.10593). Nothing is random, and an image does not depend on its neighbours but for
    rounding, which differs by batch shape.

    Args:
        generator_a_to_b: The network that maps domain A to B: images (B, C, H, W) in [-1, 1] to images in [-1, 1].
        generator_b_to_a: The network of the other direction.
    """

    # Named here too, as diffusers fetches only the files that this one imports itself; there are no labels.
    vocabulary: LabelVocabulary | None = None

    def __init__(self, generator_a_to_b: nn.Module, generator_b_to_a: nn.Module) -> None:
        super().__init__()
        self.register_modules(generator_a_to_b=generator_a_to_b, generator_b_to_a=generator_b_to_a)
        self.image_processor = VaeImageProcessor(do_resize=False, do_convert_rgb=False)

    @torch.no_grad()
    def __call__(
        self,
        image: PIL.Image.Image | Sequence[PIL.Image.Image] | np.ndarray | Tensor,
        direction: Literal["a_to_b", "b_to_a"] = "a_to_b",
        *,
        micro_batch_size: int | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
    ) -> ConditionalImageOutput | tuple[Images]:
        """Maps each image to the other domain.

        Args:
            image: A PIL image or a list of them, of any size and mode; or of the network's own size an array
                (H, W, C) or (B, H, W, C), or a tensor (C, H, W) or (B, C, H, W): uint8, or floating point in [0, 1].
                For a domain of noise, `torch.rand(B, C, H, W)` will do.
            direction: `a_to_b` or `b_to_a`.
            micro_batch_size: Images that go through the network at once; the last chunk is padded to it. Without it,
                all at once up to 64.
            output_type: `pil` for a list of images, `np` for float32 (B, H, W, C) in [0, 1], `pt` for a tensor
                (B, C, H, W) in [0, 1].
            return_dict: Whether to return a `ConditionalImageOutput` rather than a tuple `(images,)`.

        Returns:
            The images; there are no seeds.

        Raises:
            ValueError: If an argument is not of the form above.
        """
        if direction not in ("a_to_b", "b_to_a"):
            raise ValueError(f"`direction` must be `a_to_b` or `b_to_a`, got {direction!r}.")
        network = self.generator_a_to_b if direction == "a_to_b" else self.generator_b_to_a
        pixel_values = self._to_pixel_values(image, network.config.in_channels, network.config.sample_size)
        self._check_output_type(output_type)
        dtype, device = network.dtype, self._execution_device

        def draw(rows: Tensor) -> list[Tensor]:
            return [network(pixel_values[rows].to(device, dtype)).float().cpu()]

        (pixels,) = self._draw_in_chunks(len(pixel_values), micro_batch_size, draw)
        images = self._to_images(pixels, output_type)
        self.maybe_free_model_hooks()
        return ConditionalImageOutput(images=images, seeds=[]) if return_dict else (images,)

    @staticmethod
    def _to_pixel_values(
        image: PIL.Image.Image | Sequence[PIL.Image.Image] | np.ndarray | Tensor, num_channels: int, size: int
    ) -> Tensor:
        """Makes one batch (B, C, H, W) in [-1, 1], float32 on the CPU, of images in any form that a call accepts."""
        images = [image] if isinstance(image, PIL.Image.Image) else image
        if isinstance(images, (list, tuple)) and images and all(isinstance(item, PIL.Image.Image) for item in images):
            mode = {1: "L", 3: "RGB", 4: "RGBA"}[num_channels]
            # Resized directly, without keeping the aspect, as training images are.
            images = [item.convert(mode).resize((size, size), PIL.Image.Resampling.BILINEAR) for item in images]
            images = np.stack([np.asarray(item).reshape(size, size, num_channels) for item in images])
        if isinstance(images, np.ndarray) and images.ndim >= 3:
            images = torch.from_numpy(images).movedim(-1, -3)
        if not isinstance(images, Tensor):
            raise ValueError(
                "`image` must be a PIL image, a list of them, an array (B, H, W, C) or a tensor (B, C, H, W), got"
                f" {f'an array of shape {images.shape}' if isinstance(images, np.ndarray) else repr(images)[:80]}."
            )
        batch = images[None] if images.ndim == 3 else images
        expected = (num_channels, size, size)
        if batch.ndim != 4 or len(batch) == 0 or tuple(batch.shape[1:]) != expected:
            raise ValueError(
                f"`image` must be of the network's {num_channels} channels and {size}x{size} pixels, or PIL images,"
                f" which are resized; got (B, C, H, W) = {tuple(images.shape)}."
            )
        if batch.dtype == torch.uint8:
            return batch.cpu().float().div(127.5).sub(1)
        if not batch.is_floating_point() or not ((batch >= 0) & (batch <= 1)).all():
            raise ValueError(
                "`image` must be uint8, or floating point in [0, 1], got"
                f" {batch.dtype} from {batch.min().item():.3g} to {batch.max().item():.3g}."
            )
        return 2 * batch.cpu().float() - 1

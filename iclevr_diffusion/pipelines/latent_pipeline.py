"""What the pipelines share that make an image of latents by one call of a network: those of GANs and VAEs."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from .labelled_pipeline import ConditionalImageOutput, Images, LabelledPipeline


class LatentPipeline(LabelledPipeline):
    """Part of a `DiffusionPipeline`, named before it among the bases; no pipeline by itself.

    A pipeline says what its network is, with `latent_dim` in the configuration, and what makes images of latents.
    """

    @property
    def _network(self) -> nn.Module:
        raise NotImplementedError

    def _decode(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        """Makes images (B, C, H, W) in [-1, 1] of latents (B, latent_dim) and multi-hot rows (B, num_classes)."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[Sequence[str | int]] | Tensor | np.ndarray | None = None,
        num_images: int | None = None,
        *,
        latents: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: Sequence[int] | int | None = None,
        micro_batch_size: int | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
    ) -> ConditionalImageOutput | tuple[Images]:
        """Draws one image for each row of labels.

        Args:
            class_labels: A list with one inner list of names or indices an image, a matrix (batch, num_classes) with
                entries >= 0, or a 1-D integer tensor with one label an image.
            num_images: How many images a model without labels draws.
            latents: What the images are made of (batch, latent_dim), in the place of random numbers; no seed or
                generator goes with it.
            generator: Source of the images' seeds, or a list with one source an image. Without it and `seeds`, torch's
                global generator is the source.
            seeds: The seed of each image, or one seed for an image drawn alone.
            micro_batch_size: Images that go through the network at once; the last chunk is padded to it. Without it,
                all at once up to 64.
            output_type: `pil` for a list of images, `np` for float32 (B, H, W, C) in [0, 1], `pt` for a tensor
                (B, C, H, W) in [0, 1].
            return_dict: Whether to return a `ConditionalImageOutput` rather than a tuple `(images,)`.

        Returns:
            The images and their seeds, of which there are none with `latents`.

        Raises:
            ValueError: If an argument is not of the form above.
        """
        multi_hot = self.encode_labels(class_labels, num_images)
        self._check_output_type(output_type)
        if latents is None:
            seeds = self._image_seeds(len(multi_hot), generator, seeds)
            latents = self._latents(seeds)
        else:
            expected = (len(multi_hot), self._network.config.latent_dim)
            if seeds is not None or generator is not None:
                raise ValueError(
                    "`latents` must be given without `seeds` and `generator`, which would make other ones."
                )
            if tuple(latents.shape) != expected:
                raise ValueError(
                    f"`latents` must have shape {expected}, one row an image, got {tuple(latents.shape)}."
                )
            seeds = []
        dtype, device = self._network.dtype, self._execution_device
        self._network.eval()  # BatchNorm by the batch at hand would make an image depend on its neighbours

        def draw(rows: Tensor) -> list[Tensor]:
            images = self._decode(latents[rows].to(device, dtype), multi_hot[rows].to(device, dtype))
            return [images.float().cpu()]

        (pixels,) = self._draw_in_chunks(len(multi_hot), micro_batch_size, draw)
        images = self._to_images(pixels, output_type)
        self.maybe_free_model_hooks()
        return ConditionalImageOutput(images=images, seeds=seeds) if return_dict else (images,)

    def encode_labels(
        self, class_labels: Sequence[Sequence[str | int]] | Tensor | np.ndarray | None, num_images: int | None = None
    ) -> Tensor:
        """Makes the multi-hot matrix (batch, num_classes), float32, of labels in any spelling that a call accepts.

        Without labels it is `num_images` rows of no columns.

        Raises:
            ValueError: If the labels do not fit the vocabulary, or both or neither of the arguments are given.
        """
        if self.vocabulary is None:
            if class_labels is not None or num_images is None:
                raise ValueError("`num_images` must be given, and no `class_labels`: this model knows no labels.")
            return torch.zeros(self._positive("num_images", num_images, 1), 0)
        if class_labels is None or num_images is not None:
            raise ValueError(
                "`class_labels` must be given, and no `num_images`; ask for several images of the same labels by"
                " repeating them: [labels] * n."
            )
        return self.vocabulary.encode(class_labels).cpu()

    def _latents(self, seeds: Sequence[int]) -> Tensor:
        size = self._network.config.latent_dim
        return torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

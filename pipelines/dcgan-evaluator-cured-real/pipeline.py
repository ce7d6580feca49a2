from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .label_vocabulary import LabelVocabulary
from .labelled_pipeline import ConditionalImageOutput, Images, LabelledPipeline


class ConditionalGANPipeline(LabelledPipeline, DiffusionPipeline):
    """Draws images that show given labels by one call of a generator, the one of a GAN.

    *Generative Adversarial Networks* (Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661), with labels as in
    *Conditional Generative Adversarial Nets* (Mirza and Osindero, 2014, https://arxiv.org/abs/1411.1784). A generator
    with no labels (`num_classes` of 0) is called with `num_images` in the place of labels.

    An image depends on the weights, its labels and its seed, not on its place or its neighbours: its latents come from
    a random stream of its own, drawn on the CPU in float32. Kernels round by batch shape, so equality to the bit needs
    one `micro_batch_size` on one machine; other sizes differ by rounding alone.

    Args:
        generator: The network: `generator(latents (B, latent_dim), class_labels (B, num_classes))` gives images
            (B, C, H, W) in [-1, 1].
        label_names: Names of the labels by index, as a list or as the mapping {"0": name, ...} that is saved.
    """

    # Named here too, as diffusers fetches only the files that this one imports itself.
    vocabulary: LabelVocabulary | None

    def __init__(self, generator: nn.Module, label_names: Sequence[str] | Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.register_modules(generator=generator)
        self._register_label_names(label_names, generator.config.num_classes)

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
            num_images: How many images a generator without labels draws.
            latents: What the generator starts from (batch, latent_dim), in the place of random numbers; no seed or
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
            expected = (len(multi_hot), self.generator.config.latent_dim)
            if seeds is not None or generator is not None:
                raise ValueError(
                    "`latents` must be given without `seeds` and `generator`, which would make other ones."
                )
            if tuple(latents.shape) != expected:
                raise ValueError(
                    f"`latents` must have shape {expected}, one row an image, got {tuple(latents.shape)}."
                )
            seeds = []
        dtype, device = self.generator.dtype, self._execution_device
        self.generator.eval()  # BatchNorm by the batch at hand would make an image depend on its neighbours

        def draw(rows: Tensor) -> list[Tensor]:
            images = self.generator(latents[rows].to(device, dtype), multi_hot[rows].to(device, dtype))
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
                raise ValueError("`num_images` must be given, and no `class_labels`: this generator knows no labels.")
            return torch.zeros(self._positive("num_images", num_images, 1), 0)
        if class_labels is None or num_images is not None:
            raise ValueError(
                "`class_labels` must be given, and no `num_images`; ask for several images of the same labels by"
                " repeating them: [labels] * n."
            )
        return self.vocabulary.encode(class_labels).cpu()

    def _latents(self, seeds: Sequence[int]) -> Tensor:
        size = self.generator.config.latent_dim
        return torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .label_vocabulary import LabelVocabulary
from .labelled_pipeline import ConditionalImageOutput, Images, LabelledPipeline


class ConditionalVAEPipeline(LabelledPipeline, DiffusionPipeline):
    """Draws images that show given labels by one call of a decoder, and encodes images, with a variational auto-encoder.

    *Auto-Encoding Variational Bayes* (Kingma and Welling, 2014, https://arxiv.org/abs/1312.6114), with labels as in
    *Learning Structured Output Representation using Deep Conditional Generative Models* (Sohn et al., 2015,
    https://papers.nips.cc/paper/2015/hash/8d55a249e6baa5c06772297520da2051-Abstract.html). A model with no labels
    (`num_classes` of 0) is called with `num_images` in the place of labels.

    An image is the mean of what the decoder gives for its latents, N(0, 1). It depends on the weights, its labels and
    its seed, and but for rounding not on its place or its neighbours: its latents come from a random stream of its own,
    drawn on the CPU in float32. Kernels round by batch shape and row, so equality to the bit needs the same chunks of
    images on one machine.

    Args:
        vae: The network: `vae.decode(latents (B, latent_dim), class_labels (B, num_classes))` gives images (B, C, H, W)
            in [-1, 1], `vae.encode(images, class_labels)` the means and logarithms of the variances of their latents.
        label_names: Names of the labels by index, as a list or as the mapping {"0": name, ...} that is saved.
    """

    # Named here too, as diffusers fetches only the files that this one imports itself.
    vocabulary: LabelVocabulary | None

    def __init__(self, vae: nn.Module, label_names: Sequence[str] | Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.register_modules(vae=vae)
        self._register_label_names(label_names, vae.config.num_classes)

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
            latents: What the decoder starts from (batch, latent_dim), in the place of random numbers, such as a mean
                that `encode` returned; no seed or generator goes with it.
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
            expected = (len(multi_hot), self.vae.config.latent_dim)
            if seeds is not None or generator is not None:
                raise ValueError(
                    "`latents` must be given without `seeds` and `generator`, which would make other ones."
                )
            if tuple(latents.shape) != expected:
                raise ValueError(
                    f"`latents` must have shape {expected}, one row an image, got {tuple(latents.shape)}."
                )
            seeds = []
        dtype, device = self.vae.dtype, self._execution_device
        self.vae.eval()  # BatchNorm by the batch at hand would make an image depend on its neighbours

        def draw(rows: Tensor) -> list[Tensor]:
            images = self.vae.decode(latents[rows].to(device, dtype), self._labels_of(multi_hot, rows))
            return [images.float().cpu()]

        (pixels,) = self._draw_in_chunks(len(multi_hot), micro_batch_size, draw)
        images = self._to_images(pixels, output_type)
        self.maybe_free_model_hooks()
        return ConditionalImageOutput(images=images, seeds=seeds) if return_dict else (images,)

    @torch.no_grad()
    def encode(
        self,
        images: PIL.Image.Image | Sequence[PIL.Image.Image] | np.ndarray | Tensor,
        class_labels: Sequence[Sequence[str | int]] | Tensor | np.ndarray | None = None,
        *,
        micro_batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the normal distribution of the latents of each image.

        Args:
            images: Images in any form that a call returns, of the network's size and number of channels: PIL images,
                an array (B, H, W, C) or a tensor (B, C, H, W), both floating point in [0, 1].
            class_labels: The labels of each, in any spelling that a call accepts; none for a model without labels.
            micro_batch_size: As in a call.

        Returns:
            The means and the logarithms of the variances, each float32 (batch, latent_dim) on the CPU. A call with the
            means as `latents` and the same labels draws the reconstructions.

        Raises:
            ValueError: If an argument is not of the form above.
        """
        if isinstance(images, (np.ndarray, Tensor)):
            values = torch.as_tensor(images)
            if values.ndim != 4 or not values.is_floating_point() or not ((values >= 0) & (values <= 1)).all():
                raise ValueError(
                    "`images` as array or tensor must have four dimensions and floating point entries in [0, 1], as"
                    f" `output_type` np and pt have, got {tuple(values.shape)} of {values.dtype}; divide bytes by 255,"
                    " and map [-1, 1] by `x / 2 + 0.5`."
                )
        pixel_values = self.image_processor.preprocess(images)
        num_images = len(pixel_values)
        if self.vocabulary is None and class_labels is not None:
            raise ValueError("`class_labels` must be left out: this model knows no labels.")
        multi_hot = self.encode_labels(class_labels, num_images if self.vocabulary is None else None)
        if len(multi_hot) != num_images:
            raise ValueError(
                f"`class_labels` must hold one row an image, got {len(multi_hot)} for {num_images} images."
            )
        dtype, device = self.vae.dtype, self._execution_device
        self.vae.eval()

        def read(rows: Tensor) -> list[Tensor]:
            distribution = self.vae.encode(pixel_values[rows].to(device, dtype), self._labels_of(multi_hot, rows))
            return [parameters.float().cpu() for parameters in distribution]

        mean, log_variance = self._draw_in_chunks(num_images, micro_batch_size, read)
        self.maybe_free_model_hooks()
        return mean, log_variance

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

    def _labels_of(self, multi_hot: Tensor, rows: Tensor) -> Tensor | None:
        return None if self.vocabulary is None else multi_hot[rows].to(self._execution_device, self.vae.dtype)

    def _latents(self, seeds: Sequence[int]) -> Tensor:
        size = self.vae.config.latent_dim
        return torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

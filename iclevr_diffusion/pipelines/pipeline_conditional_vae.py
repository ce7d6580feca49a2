from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .label_vocabulary import LabelVocabulary
from .labelled_pipeline import LabelledPipeline
from .latent_pipeline import LatentPipeline


class ConditionalVAEPipeline(LatentPipeline, LabelledPipeline, DiffusionPipeline):
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

    # Named here too, like `LabelledPipeline` above, as diffusers fetches only the files that this one imports itself.
    vocabulary: LabelVocabulary | None

    def __init__(self, vae: nn.Module, label_names: Sequence[str] | Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.register_modules(vae=vae)
        self._register_label_names(label_names, vae.config.num_classes)

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
            labels = self._labels_for_network(multi_hot[rows].to(device, dtype))
            distribution = self.vae.encode(pixel_values[rows].to(device, dtype), labels)
            return [parameters.float().cpu() for parameters in distribution]

        mean, log_variance = self._draw_in_chunks(num_images, micro_batch_size, read)
        self.maybe_free_model_hooks()
        return mean, log_variance

    @property
    def _network(self) -> nn.Module:
        return self.vae

    def _decode(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        return self.vae.decode(latents, self._labels_for_network(class_labels))

    def _labels_for_network(self, class_labels: Tensor) -> Tensor | None:
        return None if self.vocabulary is None else class_labels

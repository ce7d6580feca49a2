"""What the pipelines of this package share: label names, a seed for each image, micro-batches and publishing."""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from torch import Tensor

from .label_vocabulary import LabelVocabulary

Images = list[PIL.Image.Image] | np.ndarray | Tensor

# Without a `micro_batch_size`, at most this many images go through the network at once.
LARGEST_BATCH = 64


@dataclass
class ConditionalImageOutput(BaseOutput):
    """What a conditional pipeline returns.

    Args:
        images: The images as asked for by `output_type`.
        seeds: The seed of each image: drawing it again by `seeds=[...]` gives the same image.
        states: With `num_states`, the image batches on the way from noise to `images`, noisiest first.
    """

    images: Images
    seeds: list[int]
    states: list[Images] | None = None


class LabelledPipeline:
    """Part of a `DiffusionPipeline`, named before it among the bases; no pipeline by itself."""

    vocabulary: LabelVocabulary | None

    def _register_label_names(
        self, label_names: Sequence[str] | Mapping[str, str] | None, num_classes: int, **config: int | float | None
    ) -> None:
        """Makes the vocabulary and registers it with the other arguments of the pipeline, to be saved."""
        if num_classes == 0:
            if label_names:
                raise ValueError(f"`label_names` must be left out for a network without labels, got {label_names}.")
            self.vocabulary, saved = None, None
        else:
            if label_names is None:
                raise ValueError(
                    "`label_names` must be the list of the label names in the order of `class_labels`, got None."
                )
            if isinstance(label_names, Mapping):
                label_names = [label_names[str(index)] for index in range(len(label_names))]
            self.vocabulary = LabelVocabulary(label_names)
            if len(self.vocabulary) != num_classes:
                raise ValueError(
                    f"`label_names` must name the network's {num_classes} labels, got {len(self.vocabulary)}."
                )
            # A list in model_index.json would be taken for a component when the folder is loaded from a hub.
            saved = {str(index): name for index, name in enumerate(self.vocabulary)}
        self.register_to_config(label_names=saved, **config)
        self.image_processor = VaeImageProcessor(do_resize=False, do_convert_rgb=False)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:  # noqa: ANN401 -- diffusers' own
        """Saves the pipeline as diffusers does; `push_to_hub=True` is refused, since it would upload the whole folder.

        Raises:
            ValueError: If `push_to_hub` is given.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError(
                "`push_to_hub` must be left out: it would upload whatever lies in the folder; use"
                " `pipe.push_to_hub(repo_id)`, which uploads the model, its code and its card alone."
            )
        super().save_pretrained(save_directory, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        dry_run: bool = False,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> Any:  # noqa: ANN401 -- the commit, or the files of a dry run
        """Uploads this pipeline with its code and a model card, as `iclevr_diffusion.hub.push_to_hub` does.

        It takes the package `iclevr_diffusion`, and a pipeline that `iclevr_diffusion.load_pipeline` has opened.
        """
        # By its name, since diffusers asks people to install whatever a published file has an import statement for.
        hub = importlib.import_module("iclevr_diffusion.hub")
        return hub.push_to_hub(
            self,
            repo_id,
            private=private,
            dry_run=dry_run,
            token=token,
            revision=revision,
            commit_message=commit_message,
        )

    def _draw_in_chunks(
        self, num_images: int, micro_batch_size: int | None, draw: Callable[[Tensor], list[Tensor]]
    ) -> list[Tensor]:
        """Draws chunk by chunk, the last one padded by the last image, so that every chunk has the same shape.

        Args:
            num_images: Number of images.
            micro_batch_size: Images of a chunk; without it all at once, up to 64.
            draw: Given the numbers of the images of a chunk, returns batches of one row each.

        Returns:
            These batches for all images.
        """
        size = self._positive("micro_batch_size", micro_batch_size, min(num_images, LARGEST_BATCH))
        chunks = []
        for start in range(0, num_images, size):
            rows = torch.arange(start, start + size).clamp(max=num_images - 1)
            chunks.append([batch[: num_images - start] for batch in draw(rows)])
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    def _to_images(self, pixels: Tensor, output_type: str) -> Images:
        """Turns pixels in [-1, 1] into what `output_type` asks for."""
        return self.image_processor.postprocess(pixels, output_type=output_type)

    @staticmethod
    def _check_output_type(output_type: str) -> None:
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"`output_type` must be `pil`, `np` or `pt`, got {output_type!r}.")

    @staticmethod
    def _image_seeds(
        num_images: int, generator: torch.Generator | list[torch.Generator] | None, seeds: Sequence[int] | int | None
    ) -> list[int]:
        if seeds is not None:
            if generator is not None:
                raise ValueError("`seeds` and `generator` must not both be given; `seeds` has one integer an image.")
            seeds = [seeds] if isinstance(seeds, int) else list(seeds)
            is_seed = [isinstance(seed, (int, np.integer)) and 0 <= seed < 2**63 for seed in seeds]
            if len(seeds) != num_images or not all(is_seed):
                raise ValueError(
                    f"`seeds` must hold {num_images} integers from 0 to 2**63 - 1, one an image, got {len(seeds)}:"
                    f" {str(seeds)[:80]}."
                )
            return [int(seed) for seed in seeds]
        if not isinstance(generator, list):
            device = "cpu" if generator is None else generator.device
            return torch.randint(2**63 - 1, (num_images,), generator=generator, device=device).tolist()
        if len(generator) != num_images:
            raise ValueError(
                f"`generator` must be one, or a list of {num_images}, one an image; got {len(generator)}."
            )
        return [torch.randint(2**63 - 1, (), generator=source, device=source.device).item() for source in generator]

    @staticmethod
    def _positive(name: str, value: int | None, default: int) -> int:
        if value is None:
            return default
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        return int(value)

"""Measures drawn images by what a judge reads in them, and by real images of the same label sets."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iclevr_diffusion.data import ImageStore
from iclevr_diffusion.distribution import frechet_distance, kernel_distance, relative_diversity
from iclevr_diffusion.judging import Reading, read_images
from iclevr_diffusion.scores import score_conditions, score_images

METRICS = ("top_k", "exact_match")


class Yardstick:
    """Label sets that real images show, the images to be drawn of them, and how these are measured.

    The sets have one label, two, and so on in turn; of each number first those that most real images show, whose
    differences can be compared. Everything that is measured by one yardstick has the same labels, numbers of images
    and real images to be held against, so that two of its measures differ in the drawn images alone.

    Args:
        store: Real images; none of them should be one that what is measured was trained on.
        indices: Which of them to take.
        judge: A network that reads which labels an image shows, and had no part in any training that is measured. It
            is shown images of another size than its own enlarged.
        num_conditions: Label sets, at most.
        images_a_condition: Images to be drawn of each; as many real ones are held against them, where there are.

    Raises:
        ValueError: If no real image shows a label, or so few do that there is nothing to compare.
    """

    def __init__(
        self, store: ImageStore, indices: np.ndarray, judge: nn.Module, *, num_conditions: int, images_a_condition: int
    ) -> None:
        if num_conditions < 1 or images_a_condition < 2:
            raise ValueError(
                "`num_conditions` must be at least 1 and `images_a_condition` at least 2, got"
                f" {num_conditions} and {images_a_condition}: one image of each shows no differences."
            )
        self.judge, self.images_a_condition = judge, images_a_condition
        self.label_names = list(store.vocabulary.names)
        rows, counts = np.unique(store.class_labels[indices], axis=0, return_counts=True)
        sizes = rows.sum(axis=1)
        groups = [
            sorted(np.flatnonzero(sizes == size), key=lambda row: (-counts[row], row))
            for size in np.unique(sizes[sizes > 0])
        ]
        longest = max(map(len, groups), default=0)
        chosen = [group[i] for i in range(longest) for group in groups if i < len(group)][:num_conditions]
        shown = [indices[(store.class_labels[indices] == rows[row]).all(axis=1)] for row in chosen]
        shown = [alike[:: -(-len(alike) // images_a_condition)] for alike in shown]  # from all over the store
        if sum(map(len, shown)) < 2:
            raise ValueError("`store` must hold at least two labelled images to compare with; give more of them.")
        self.class_labels = torch.from_numpy(rows[chosen]).float()  # (num_conditions, num_classes)
        self.real_numbers = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(alike) for alike in shown]))
        self.real = np.array(store.pixel_values[np.concatenate(shown)])
        self.real_reading = self.read(self.real)

    @property
    def drawn_labels(self) -> Tensor:
        """Labels (num_conditions * images_a_condition, num_classes) of the images to be drawn, set by set."""
        return self.class_labels.repeat_interleave(self.images_a_condition, dim=0)

    def measure_real(self) -> dict[str, Any]:
        """Scores the real images: what the judge reads in them is as much as drawn ones can reach."""
        labels = self.class_labels[self.real_numbers]
        return score_images(self.real_reading.logits, labels, threshold=self.judge.config.threshold)

    def measure(self, pixel_values: np.ndarray) -> dict[str, Any]:
        """Measures the images that were drawn of `drawn_labels`.

        Args:
            pixel_values: Images, uint8 (num_conditions * images_a_condition, 3, H, W) in [0, 255].

        Returns:
            Top-k and exact match with intervals, in all and by number of objects; the distances to the real images in
            the judge's features; how different images of one label set are, relative to real ones, in pixels; and for
            `score_difference` the judge's `logits` (num_conditions, images_a_condition, num_classes).
        """
        reading = self.read(pixel_values)
        logits = reading.logits.unflatten(0, (len(self.class_labels), self.images_a_condition))
        scores = score_conditions(
            logits,
            self.class_labels,
            label_names=self.label_names,
            threshold=self.judge.config.threshold,
            resampled="conditions",
        )
        numbers = torch.arange(len(self.class_labels)).repeat_interleave(self.images_a_condition)
        diversity = relative_diversity(_flat(self.real), self.real_numbers, _flat(pixel_values), numbers)
        return {
            "num_images": len(pixel_values),
            **{name: scores["all"][name] for name in METRICS},
            "by_num_objects": {
                size: {name: part[name] for name in METRICS} for size, part in scores["by_num_objects"].items()
            },
            "kernel_distance": kernel_distance(self.real_reading.features, reading.features),
            "frechet_distance": frechet_distance(self.real_reading.features, reading.features),
            "diversity": diversity["value"],
            "logits": logits,
        }

    def read(self, pixel_values: np.ndarray) -> Reading:
        """Lets the judge read images, uint8 (N, 3, H, W), enlarged to its size where they have another."""
        size = self.judge.config.image_size
        if pixel_values.shape[-1] != size:
            images = F.interpolate(torch.from_numpy(pixel_values).float(), (size, size), mode="bicubic")
            pixel_values = images.round().clamp(0, 255).byte().numpy()
        return read_images(self.judge, pixel_values)


def format_score(score: Mapping[str, float | None]) -> str:
    """Writes a score as `0.812 [0.790, 0.833]`, or without the interval where it has none."""
    text = f"{score['value']:.3f}"
    return text if score["low"] is None else f"{text} [{score['low']:.3f}, {score['high']:.3f}]"


def _flat(pixel_values: np.ndarray) -> Tensor:
    return torch.from_numpy(pixel_values).flatten(1).float() / 255

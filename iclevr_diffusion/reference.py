"""The real images that an evaluation is held against: what judges make of them, and how far from them drawn ones are."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from iclevr_diffusion.data import ImageStore
from iclevr_diffusion.distribution import compare_features, memorisation, relative_diversity
from iclevr_diffusion.images import make_grid, to_image
from iclevr_diffusion.inception import InceptionFeatures, standard_fid_kid
from iclevr_diffusion.judging import Reading, read_images
from iclevr_diffusion.scores import score_images

MIN_COMPARED = 20  # images, below which a distribution is not worth comparing
MAX_ALIKE = 8  # real images of one condition, chosen by lot, whose differences stand for those of all
NUM_NEAREST = 16  # pairs on the sheet of the images that lie closest to a training image


class Reference:
    """Held-out real images, which stand for what can be reached, and training images, which must not be copied.

    Args:
        store: The real images.
        judges: The judges by name.
        inception: `InceptionFeatures`, where FID and KID are wanted too.
    """

    def __init__(
        self, store: ImageStore, judges: Mapping[str, nn.Module], inception: InceptionFeatures | None = None
    ) -> None:
        self.store = store
        self.judges = judges
        self.inception = inception
        self.held_out = store.indices("held-out")
        if len(self.held_out) == 0:
            raise ValueError("`store` must have held-out images, and has none: the data set is too small to split.")
        self.labelled = self.held_out[store.class_labels[self.held_out].any(axis=1)]  # as in the matched protocol
        self.stand_ins = self._stand_ins()
        self.readings = {name: self._read(judge, self.held_out) for name, judge in judges.items()}

    def scores(self) -> dict[str, Any]:
        """Gives each judge's own score on the held-out images, in all and by number of objects."""
        class_labels = torch.from_numpy(self.store.class_labels[self.held_out]).float()
        return {
            "data_sha256": self.store.sha256,
            "num_images": len(self.held_out),
            "judges": {
                name: score_images(reading.logits, class_labels, threshold=self.judges[name].config.threshold)
                for name, reading in self.readings.items()
            },
        }

    @property
    def num_compared(self) -> int:
        """Number of held-out images with labels that training images have too: those that drawn ones are compared with."""
        return int((self.stand_ins >= 0).sum())

    def distribution(
        self, pixel_values: np.ndarray, readings: Mapping[str, Reading], *, trained_on: str | None
    ) -> tuple[dict[str, Any], Image.Image]:
        """Compares images drawn for the held-out images' labels with the held-out images themselves.

        Args:
            pixel_values: The drawn images, uint8 (N, C, H, W).
            readings: What each judge makes of them.
            trained_on: The split of these images that the pipeline was trained on, `train` or `all`; `others` if it was
                trained on other images, and None if it is not known: that no image of the train split is copied says
                little then.

        Returns:
            For each judge the distances in its features, beside those of as many training images with the same labels,
            which are what images as good as real ones reach; what was copied of the training images; and a sheet of the
            drawn images closest to a training image, each with that image at its right.
        """
        store, held_out = self.store, self.labelled
        rows = np.flatnonzero(self.stand_ins >= 0)
        judges = {}
        for name, judge in self.judges.items():
            real = self.readings[name].features[np.isin(self.held_out, held_out[rows])]
            judges[name] = {
                "generated": compare_features(real, readings[name].features[rows]),
                "real": compare_features(real, self._read(judge, self.stand_ins[rows]).features),
            }
        train = store.indices("all" if trained_on == "all" else "train")
        copies = memorisation(
            pixel_values, store.pixel_values[train], store.scenes[train], held_out=store.pixel_values[held_out]
        )
        nearest, ratios = copies.pop("nearest"), copies.pop("distance_ratios")
        pairs = []
        for row in np.argsort(ratios, kind="stable")[:NUM_NEAREST]:
            pairs += [pixel_values[row], store.pixel_values[train[nearest[row]]]]
        captions = ["drawn", "closest training image"] * (len(pairs) // 2)
        sheet = make_grid([to_image(image) for image in pairs], captions, columns=8)
        distribution = {
            "data_sha256": store.sha256,
            "num_generated": len(rows),
            "num_real": len(rows),
            "judges": judges,
            "memorisation": copies | {"trained_on_these": None if trained_on is None else trained_on != "others"},
        }
        if self.inception is not None:
            real_pixels = store.pixel_values[held_out[rows]]
            distribution["inception"] = {
                "generated": standard_fid_kid(self.inception, real_pixels, pixel_values[rows]),
                "real": standard_fid_kid(self.inception, real_pixels, store.pixel_values[self.stand_ins[rows]]),
            }
        return distribution, sheet

    def _stand_ins(self) -> np.ndarray:
        """Chooses for each held-out image with labels a training image with the same ones, -1 where there is none."""
        by_labels: dict[bytes, list[int]] = {}
        for index in np.random.default_rng(0).permutation(self.store.indices("train")).tolist():
            by_labels.setdefault(self.store.class_labels[index].tobytes(), []).append(index)
        stand_ins = []
        for index in self.labelled.tolist():
            same = by_labels.get(self.store.class_labels[index].tobytes(), [])
            stand_ins.append(same.pop() if same else -1)
        return np.array(stand_ins)

    def diversity(
        self, conditions: Sequence[frozenset[str]], pixel_values: np.ndarray, features: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Compares how much images of one condition differ from each other with how much real ones do.

        Args:
            conditions: The labels of each drawn image.
            pixel_values: The drawn images, uint8 (N, C, H, W).
            features: Each judge's features (N, D) of them.
        """
        store = self.store
        names = np.array(store.vocabulary.names)
        wanted = {condition: number for number, condition in enumerate(dict.fromkeys(conditions))}
        numbers = np.array([wanted.get(frozenset(names[row > 0].tolist()), -1) for row in store.class_labels])
        shown = self._some_alike(numbers)
        real_conditions = torch.from_numpy(numbers[shown])
        drawn_conditions = torch.tensor([wanted[condition] for condition in conditions])
        found: dict[str, Any] = {
            "pixels": relative_diversity(
                _flat(store.pixel_values[shown]), real_conditions, _flat(pixel_values), drawn_conditions
            ),
            "judges": {},
        }
        for name, judge in self.judges.items():
            real_features = self._read(judge, shown).features
            found["judges"][name] = relative_diversity(
                real_features, real_conditions, features[name], drawn_conditions
            )
        return found

    @staticmethod
    def _some_alike(numbers: np.ndarray) -> np.ndarray:
        """Chooses images, at most `MAX_ALIKE` of one condition; `numbers` are the conditions, -1 is none."""
        order = np.random.default_rng(0).permutation(len(numbers))
        order = order[np.argsort(numbers[order], kind="stable")]
        _, starts = np.unique(numbers[order], return_index=True)
        rank = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
        return np.sort(order[(numbers[order] >= 0) & (rank < MAX_ALIKE)])

    def _read(self, judge: nn.Module, indices: np.ndarray) -> Reading:
        return read_images(judge, self.store.pixel_values[indices])


def _flat(pixel_values: np.ndarray) -> Tensor:
    return torch.from_numpy(pixel_values).flatten(1).float() / 255

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from filelock import FileLock

from iclevr_diffusion.data.split import SPLITS, Split, split_of_scene
from iclevr_diffusion.files import is_unwritable
from iclevr_diffusion.labels import LabelVocabulary

_MANY = 50_000  # images, from which on their statistics are kept
_CHUNK_SIZE = 512  # images in memory at a time where all are gone through


class Blocks(NamedTuple):
    """Consecutive images that are read together, such as the row groups of a Parquet file.

    Attributes:
        starts: Position of the first image of each block, int64 (num_blocks,), ascending from 0.
        shuffle_size: Number of images among which a shuffled pass may go to and fro.
    """

    starts: np.ndarray
    shuffle_size: int


class ImageSet:
    """Images of one size with their labels, by position, wherever the pixels come from.

    Attributes:
        pixel_values: Images, uint8 (num_images, C, H, W) in [0, 255]: an array, or what has the shape of one and reads
            images when a position, a slice or an array of positions asks for them. C is 1 for grey, 3 for RGB and 4 for
            RGBA.
        class_labels: 1 where an image shows an object, uint8 (num_images, num_classes).
        scenes: Number of each image's scene, int64 (num_images,): images of one scene fall into one split.
        vocabulary: Names of the classes.
        sha256: Hash of the images, labels and names.
        blocks: Which images are best read together; None where each is read by itself.
        cache_dir: Where what takes long to find out is kept; None keeps nothing.
    """

    pixel_values: np.ndarray
    class_labels: np.ndarray
    scenes: np.ndarray
    vocabulary: LabelVocabulary
    sha256: str
    blocks: Blocks | None = None
    cache_dir: Path | None = None

    def __len__(self) -> int:
        return len(self.class_labels)

    @property
    def resolution(self) -> int:
        """Height and width of the images in pixels."""
        return self.pixel_values.shape[-1]

    def indices(self, split: Split | Literal["all"]) -> np.ndarray:
        """Returns the int64 positions of a split's images, ascending; `"all"` breaks the hold-out."""
        if split == "all":
            return np.arange(len(self), dtype=np.int64)
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {', '.join(SPLITS)} or all, got {split!r}.")
        return np.flatnonzero(self._splits == SPLITS.index(split)).astype(np.int64)

    def statistics(self, indices: np.ndarray) -> tuple[np.ndarray, float]:
        """Returns the mean image and the standard deviation around it of the images at `indices`.

        Those of many images, all of which must be read, are kept in `cache_dir`, for the next run and for the processes
        that want them at the same time.

        Returns:
            The mean image, float32 (C, H, W) in [-1, 1], and the root mean square over images, channels and pixels of
            what is left when it is subtracted, in the same unit.
        """
        if len(indices) == 0:
            raise ValueError("`indices` must hold at least one image, got none; see `store.indices`.")
        if self.cache_dir is None or len(indices) < _MANY:
            return self._measure(indices)
        key = hashlib.sha256(f"statistics of {self.sha256}".encode() + np.asarray(indices, dtype="<i8").tobytes())
        path = self.cache_dir / f"statistics-{key.hexdigest()[:32]}.npz"
        if not path.exists():
            measured, unfinished = None, path.with_suffix(".tmp.npz")
            try:
                self.cache_dir.mkdir(parents=True, exist_ok=True)
                with FileLock(path.with_suffix(".lock")):
                    if not path.exists():
                        measured = self._measure(indices)
                        np.savez(unfinished, mean=measured[0], std=measured[1])
                        os.replace(unfinished, path)
            except OSError as error:  # a cache that others share can be read-only, or a disk full
                if not is_unwritable(error):
                    raise
                with contextlib.suppress(OSError):
                    unfinished.unlink()
                return measured or self._measure(indices)
        with np.load(path) as file:
            return file["mean"], float(file["std"])

    def _measure(self, indices: np.ndarray) -> tuple[np.ndarray, float]:
        """Returns the statistics of images, read from the first to the last."""
        # In integers, which are exact: the result depends neither on the order nor on the chunks.
        total, total_of_squares = np.zeros(self.pixel_values.shape[1:], dtype=np.int64), 0
        for chunk in chunks(indices):
            pixel_values = self.pixel_values[chunk].astype(np.int32)
            total += pixel_values.sum(axis=0)
            total_of_squares += int(np.square(pixel_values).sum(dtype=np.int64))
        square_of_totals = int(np.square(total.astype(object)).sum())
        variance = (len(indices) * total_of_squares - square_of_totals) / (len(indices) ** 2 * total.size)
        return (total / len(indices) / 127.5 - 1).astype(np.float32), math.sqrt(variance) / 127.5

    def conditions(self, indices: np.ndarray) -> list[tuple[str, ...]]:
        """Returns the distinct label sets of the images at `indices`, fewest labels first, then by class index."""
        rows = np.unique(self.class_labels[indices], axis=0)
        label_sets = sorted((np.flatnonzero(row).tolist() for row in rows), key=lambda row: (len(row), row))
        return [tuple(self.vocabulary.names[i] for i in label_set) for label_set in label_sets]

    @cached_property
    def _splits(self) -> np.ndarray:
        """Position in `SPLITS` of each image's split, uint8 (num_images,)."""
        splits = (SPLITS.index(split_of_scene(scene)) for scene in map(int, self.scenes))
        return np.fromiter(splits, dtype=np.uint8, count=len(self))


def chunks(items: np.ndarray | list[str]) -> Iterator[np.ndarray | list[str]]:
    """Yields the items in parts of as many images as may be in memory at a time."""
    for start in range(0, len(items), _CHUNK_SIZE):
        yield items[start : start + _CHUNK_SIZE]

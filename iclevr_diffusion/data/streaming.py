from pathlib import Path

import numpy as np

from iclevr_diffusion.data.image_set import Blocks, ImageSet
from iclevr_diffusion.data.labelled_images import LabelledImages
from iclevr_diffusion.data.parquet_folder import ParquetFolder
from iclevr_diffusion.data.source import ImageSource, read_pixels
from iclevr_diffusion.files import cache_folder


class StreamedImages(ImageSet):
    """Images of a source that are read and decoded whenever they are asked for; nothing is written.

    It takes the place of an `ImageStore` where there is no room for one: labels are in memory, pixels in the files of
    the source. What goes through all images, such as `statistics`, decodes all of them.

    Args:
        source: The images. Those of Parquet files have the row groups for `blocks`.
        resolution: Height and width of the images; others are resized as the source does.
        cache_dir: Where statistics are kept, by default where `open_store` writes stores.

    Attributes:
        sha256: The source's fingerprint; that of Parquet files goes by their footers instead of their time stamps, so that
            a run may go on with copies of them. Other attributes are those of an `ImageSet`.
    """

    def __init__(self, source: ImageSource, resolution: int, cache_dir: str | Path | None = None) -> None:
        self.cache_dir = cache_folder(cache_dir)
        self.vocabulary = source.vocabulary
        self.class_labels = source.class_labels
        self.scenes = source.scenes
        self.pixel_values = _DecodedPixels(source, resolution)
        if isinstance(source, LabelledImages) and isinstance(source.table, ParquetFolder):
            column = source.table.images
            self.blocks = Blocks(column.starts, column.shuffle_size)
            self.sha256 = source.fingerprint(resolution, files=[column.name, *column.footers])
        else:
            self.sha256 = source.fingerprint(resolution)

    @property
    def file_names(self) -> list[str]:
        """Name of each image in its source."""
        return self.pixel_values.source.file_names


class _DecodedPixels:
    """Looks like an array uint8 (num_images, C, H, W), and decodes the images that it is indexed with."""

    dtype = np.dtype(np.uint8)

    def __init__(self, source: ImageSource, resolution: int) -> None:
        self.source = source
        self.shape = (len(source.class_labels), source.num_channels, resolution, resolution)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, positions: int | slice | np.ndarray) -> np.ndarray:
        if isinstance(positions, slice):
            positions = np.arange(*positions.indices(len(self)))
        rows = np.asarray(positions, dtype=np.int64)
        pixel_values = np.empty((rows.size, *self.shape[1:]), dtype=self.dtype)
        for i, row in enumerate(rows.reshape(-1).tolist()):
            pixel_values[i] = read_pixels(self.source, self.shape[-1], self.source.file_names[row])
        return pixel_values.reshape(*rows.shape, *self.shape[1:])

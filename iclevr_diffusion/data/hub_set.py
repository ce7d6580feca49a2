import bisect
import io
import os
from typing import Any, BinaryIO

import datasets
from datasets.exceptions import DatasetGenerationError

from iclevr_diffusion.data.metadata_file import find_class_names
from iclevr_diffusion.data.parquet_folder import choose_image_column, holds_images, image_bytes
from iclevr_diffusion.data.split import split_named

PREFIX = "hub:"


class HubSet:
    """A data set that `datasets` opens by its id, fetched once into its cache; an `ImageTable`.

    All its splits are read. Those called `train`, `validation` or `test` are the parts of the set. With the environment
    variable HF_HUB_OFFLINE=1 a set that was fetched before needs no connection.

    Args:
        address: `hub:user/name` or `hub:user/name@revision`; or `hub:` and the path of a local folder.
        image_column: The column of the images. By default the only one of that type, or the one called `image`.
        config: Name of the set's configuration, where it has several.
    """

    faults = unread = remarks = ()  # a damaged file of these is refused as a whole

    def __init__(self, address: str, image_column: str | None = None, config: str | None = None) -> None:
        self.name = address
        identity, _, revision = address.removeprefix(PREFIX).partition("@")
        if os.path.isdir(address.removeprefix(PREFIX)):
            identity, revision = address.removeprefix(PREFIX), ""
        try:
            parts = datasets.load_dataset(identity, config, revision=revision or None)
        except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(
                f"`{address}` cannot be opened by `datasets`: {str(error).rstrip('.')}. Expected {PREFIX}user/name, with @revision if any,"
                f" or {PREFIX} and a local folder; a first opening needs a connection."
            ) from error
        features = next(iter(parts.values())).features
        for split, part in parts.items():
            if part.features != features:
                raise ValueError(f"`{address}`, split {split}: expected the columns of the other splits.")
        found = [field.name for field in features.arrow_schema if holds_images(field.type)]
        image_column = choose_image_column(address, image_column, list(features), found)
        self._image_column = image_column
        if isinstance(features[image_column], datasets.Image):
            parts = parts.cast_column(image_column, datasets.Image(decode=False))
        self._names = list(parts)
        self._parts = list(parts.values())
        self._firsts = [0]
        for part in self._parts:
            self._firsts.append(self._firsts[-1] + len(part))
        if not self._firsts[-1]:
            raise ValueError(f"`{address}` holds no row; there must be one an image.")
        self.columns = [name for name in features if name != image_column]
        self.class_names = find_class_names(features)
        self.file_names = [
            f"{name}/{i:07d}" for name, part in zip(self._names, self._parts, strict=True) for i in range(len(part))
        ]
        splits = [split_named(name) for name in self._names]
        self.splits = (
            None
            if None in splits
            else [split for split, part in zip(splits, self._parts, strict=True) for _ in range(len(part))]
        )

    def where(self, row: int) -> str:
        """Names a row by its split and its number in it, from 1."""
        i = self._part_of(row)
        return f"`{self.name}`, split {self._names[i]}, row {row - self._firsts[i] + 1}"

    def read_column(self, name: str) -> list[Any]:
        """Returns the cells of a column."""
        return [cell for part in self._parts for cell in part[name][:]]

    def open_file(self, row: int) -> BinaryIO:
        """Opens a row's image."""
        i = self._part_of(row)
        part = self._parts[i]
        cell = part[row - self._firsts[i]][self._image_column]
        # The paths of a set of files are those that `datasets` found; in another set anyone may have written any path.
        is_file = part.info.builder_name == "imagefolder" and isinstance(cell, dict) and cell["bytes"] is None
        if is_file and cell["path"]:
            return open(cell["path"], "rb")
        return io.BytesIO(image_bytes(cell, self.where(row)))

    def key(self) -> list[Any]:
        """Returns name, size and time stamp of the files that `datasets` holds, which it writes anew for new data."""
        paths = [file["filename"] for part in self._parts for file in part.cache_files]
        statuses = [os.stat(path) for path in paths]
        return [
            self._image_column,
            [(path, s.st_size, s.st_mtime_ns) for path, s in zip(paths, statuses, strict=True)],
        ]

    def _part_of(self, row: int) -> int:
        return bisect.bisect_right(self._firsts, row) - 1

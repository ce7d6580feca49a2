import bisect
import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from iclevr_diffusion.data.metadata_file import class_names_of_schema
from iclevr_diffusion.data.parquet_column import ParquetColumn
from iclevr_diffusion.data.split import Split, split_named


class ParquetFolder:
    """Parquet files that hold images beside their labels, as `datasets` writes them; an `ImageTable`.

    Labels are read when they are asked for; the images of a few row groups are in memory at a time, never the set. Files
    that are all called after a part of the set, or lie in folders that are, such as `train-00000-of-00002.parquet` and
    `test/0000.parquet`, say so.

    Args:
        root: The folder; the files lie in it or below.
        image_column: The column of the images, their bytes or `datasets`' struct of bytes and path. By default
            the only one of this kind, or the one called `image`.

    Attributes:
        paths: The files, by name.
        images: The images' column, read by the number of the row.
    """

    faults = unread = remarks = ()  # a damaged file of these is refused as a whole

    def __init__(self, root: Path, image_column: str | None = None) -> None:
        self.name = str(root)
        self.paths = find_parquet(root)
        schemas, counts = [], []
        for path in self.paths:
            try:
                with pq.ParquetFile(path) as file:
                    schemas.append(file.schema_arrow)
                    counts.append(file.metadata.num_rows)
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"`{path}` is not a readable Parquet file ({error}); write it again.") from None
        names = schemas[0].names
        class_names = [class_names_of_schema(schema) for schema in schemas]
        for path, schema, own_class_names in zip(self.paths, schemas, class_names, strict=True):
            if schema.names != names or own_class_names != class_names[0]:
                raise ValueError(
                    f"`{path}` must have the columns of `{self.paths[0]}`, {', '.join(names)}, and number classes as it"
                    f" does, got {', '.join(schema.names)}; write both alike."
                )
        if not sum(counts):
            raise ValueError(f"`{root}` holds Parquet files without a row; there must be one an image.")
        self.class_names = class_names[0]
        self.image_column = choose_image_column(
            self.name, image_column, names, [field.name for field in schemas[0] if holds_images(field.type)]
        )
        self.columns = [name for name in names if name != self.image_column]
        self.images = ParquetColumn(self.paths, self.image_column)
        self._firsts = [sum(counts[:i]) for i in range(len(counts))]

        stems = [path.relative_to(root).with_suffix("").as_posix() for path in self.paths]
        self.file_names = [f"{stem}/{j:07d}" for stem, count in zip(stems, counts, strict=True) for j in range(count)]
        if "file_name" in self.columns:
            names = self.read_column("file_name")
            if all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names):
                self.file_names = names
        splits = [_split_of(stem) for stem in stems]
        self.splits = (
            None
            if None in splits
            else [split for split, count in zip(splits, counts, strict=True) for _ in range(count)]
        )

    def where(self, row: int) -> str:
        """Names a row by its file and its number in it, from 1."""
        i = bisect.bisect_right(self._firsts, row) - 1
        return f"`{self.paths[i]}`, row {row - self._firsts[i] + 1}"

    def read_column(self, name: str) -> list[Any]:
        """Returns the cells of a column."""
        return [cell for path in self.paths for cell in pq.read_table(path, columns=[name])[name].to_pylist()]

    def open_file(self, row: int) -> BinaryIO:
        """Opens a row's image."""
        return io.BytesIO(image_bytes(self.images[row], self.where(row)))

    def key(self) -> list[Any]:
        """Returns name, size and time stamps of the files."""
        statuses = [(path.name, os.stat(path)) for path in self.paths]
        return [self.image_column, *((n, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for n, s in statuses)]


def _split_of(stem: str) -> Split | None:
    """Returns the split that a file, or else the nearest of the folders it lies in, is called after, if any."""
    return next(filter(None, map(split_named, reversed(stem.split("/")))), None)


def find_parquet(root: Path) -> list[Path]:
    """Returns the Parquet files in `root` and below, by name."""
    return sorted(path for path in root.rglob("*.parquet") if path.is_file())


def choose_image_column(name: str, wanted: str | None, columns: list[str], found: list[str]) -> str:
    """Returns the column that holds the images.

    Args:
        name: What has the columns, for messages.
        wanted: The one that was named, if any.
        columns: All columns.
        found: Those whose type is one of images.
    """
    if wanted is None and "image" in found:
        return "image"
    if wanted is None and len(found) == 1:
        return found[0]
    if wanted is None or wanted not in found:
        raise ValueError(
            f"`image_column` must name a column of `{name}` that holds images, got"
            f" {'nothing' if wanted is None else wanted}; columns of images: {', '.join(found) or 'none'}, all columns:"
            f" {', '.join(columns)}. Name it in a YAML file beside `images`."
        )
    return wanted


def image_bytes(cell: Any, where: str) -> bytes:  # noqa: ANN401
    """Returns the file in a cell, the bytes themselves or `datasets`' mapping of bytes and path."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        raise ValueError(
            f"{where}: expected the bytes of an image, got"
            f" {'none' if content is None else type(content).__name__}; write the set with its images inside, as"
            " `datasets.table.embed_table_storage` does."
        )
    return content


def holds_images(kind: pa.DataType) -> bool:
    """Tells whether a column's type is one of images: bytes, or `datasets`' struct of bytes and path."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

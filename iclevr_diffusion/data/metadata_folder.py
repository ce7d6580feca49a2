from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from iclevr_diffusion.data.image_file import check_path, file_status
from iclevr_diffusion.data.metadata_file import SUFFIXES, MetadataFile, refuse_faults
from iclevr_diffusion.data.split import split_named

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class MetadataFolder:
    """Image files and a table of what they show, in the layout of `datasets`' ImageFolder; an `ImageTable`.

    ```
    root/metadata.jsonl     {"file_name": "0001.png", "labels": ["red cube", "blue sphere"]}, a line an image;
                            or metadata.csv, or metadata.parquet
    root/0001.png           the images: PNG, JPEG or WebP, here or in folders below
    ```
    Without such a table in `root` itself, each folder in it that has one is a part of the set, and one called `train`,
    `validation` or `test` says which. The folder is only read, never written.

    Args:
        root: The folder.
        image_column: The column that names the image files, relative to their table.

    Raises:
        ValueError: If a table is damaged, or lacks the column; rows at fault are in `faults`.
    """

    def __init__(self, root: Path, image_column: str = "file_name") -> None:
        self.name = str(root)
        self._tables = [MetadataFile(path) for path in find_metadata(root)]
        self._folders = [table.path.parent for table in self._tables]
        self._places = [(i, j) for i, table in enumerate(self._tables) for j in range(len(table))]
        for table in self._tables:
            if image_column not in table.columns:
                raise ValueError(
                    f"`{table.path}` must have a column `{image_column}` that names the image files, got"
                    f" {', '.join(table.columns)}; name the right one as `image_column` in a YAML file beside `images`."
                )
        self._image_names = [self._tables[i].columns[image_column][j] for i, j in self._places]
        firsts = [sum(map(len, self._tables[:i])) for i in range(len(self._tables))]
        line_faults = {
            first + j: fault
            for first, table in zip(firsts, self._tables, strict=True)
            for j, fault in table.faults.items()
        }
        self.unread = set(line_faults)
        self.faults = [*line_faults.items(), *self._faults_of_image_names()]
        delimiters = dict.fromkeys(table.delimiter for table in self._tables if table.delimiter != ",")
        self.remarks = [f"cells separated by {delimiter!r}" for delimiter in delimiters]
        self.columns = [
            name for name in dict.fromkeys(n for t in self._tables for n in t.columns) if name != image_column
        ]
        self.class_names = self._tables[0].class_names
        for table in self._tables:
            if table.class_names != self.class_names:
                raise ValueError(f"`{table.path}` must number its classes as `{self._tables[0].path}` does.")
        prefixes = [folder.relative_to(root).as_posix() for folder in self._folders]
        self.file_names = [
            ("" if prefixes[i] == "." else f"{prefixes[i]}/") + name if isinstance(name, str) else ""
            for (i, _), name in zip(self._places, self._image_names, strict=True)
        ]
        splits = [split_named(prefix) for prefix in prefixes]
        self.splits = None if None in splits else [splits[i] for i, _ in self._places]

    def unnamed_files(self) -> list[str]:
        """Returns the image files beside and below the tables that no row names, relative to the root."""
        paths = (
            path for folder in self._folders for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
        )
        found = {path.relative_to(self.name).as_posix() for path in paths if path.is_file()}
        return sorted(found - set(self.file_names))

    def where(self, row: int) -> str:
        """Names a row by its file and line."""
        i, j = self._places[row]
        return self._tables[i].where(j)

    def read_column(self, name: str) -> list[Any]:
        """Returns the cells of a column; `None` where a table lacks it."""
        return [cell for table in self._tables for cell in table.columns.get(name, [None] * len(table))]

    def open_file(self, row: int) -> BinaryIO:
        """Opens a row's image file."""
        self._file_status(row)
        return open(self._folders[self._places[row][0]] / self._image_names[row], "rb")

    def key(self) -> list[Any]:
        """Returns size and time stamps of the image files; of missing ones, all are named."""
        stamps, faults = [], []
        for row in range(len(self._places)):
            try:
                stamps.append(self._file_status(row))
            except FileNotFoundError as error:
                faults.append(str(error))
        try:
            refuse_faults(faults)
        except ValueError as error:
            raise FileNotFoundError(str(error)) from None
        return stamps

    def _file_status(self, row: int) -> tuple[int, int, int]:
        return file_status(self.where(row), self._folders[self._places[row][0]], self._image_names[row])

    def _faults_of_image_names(self) -> Iterator[tuple[int, str]]:
        first_rows: dict[tuple[int, str], int] = {}
        for row, name in enumerate(self._image_names):
            i = self._places[row][0]
            if row in self.unread:
                continue
            if not isinstance(name, str):
                yield row, f"{self.where(row)}: expected the name of an image file, got {name!r}."
                continue
            first = first_rows.setdefault((i, name), row)
            if first != row:
                yield row, f"{self.where(row)}: `{name}` is named already in {self.where(first)}; keep one of them."
            try:
                check_path(f"{self.where(row)}, {name!r}", self._folders[i], name, "0001.png")
            except ValueError as error:
                yield row, str(error)


def find_metadata(root: Path) -> list[Path]:
    """Returns the tables of `root`: its own, or else those of the folders in it; none where it is no such folder.

    Raises:
        ValueError: If a folder holds two.
    """
    for folders in ([root], sorted(path for path in root.iterdir() if path.is_dir())):
        found = []
        for folder in folders:
            paths = [path for suffix in SUFFIXES if (path := folder / f"metadata{suffix}").is_file()]
            if len(paths) > 1:
                raise ValueError(
                    f"`{folder}` must hold one table of its images, got {' and '.join(path.name for path in paths)};"
                    " keep the right one."
                )
            found += paths
        if found:
            return found
    return []

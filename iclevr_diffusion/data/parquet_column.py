import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

# What a shuffled pass keeps of the files at a time: as many rows as fit, but no more than mix the images well.
_BUFFER_SIZE = 128 * 2**20  # bytes
_MAX_SHUFFLE_SIZE = 16_384  # rows


class ParquetColumn:
    """One column of Parquet files, read by the number of the row.

    Parquet files are read by row group, so a row group stays in memory after one of its rows was asked for, until others
    have taken its place. How many there are at a time depends on the size of their values, not on that of the files.
    Several threads may read at once.

    Args:
        paths: The files; their rows are counted through in this order.
        name: The column.

    Attributes:
        starts: Number of the first row of each row group, int64 (num_row_groups,).
        shuffle_size: Number of rows among which a pass may go to and fro without reading a row group twice.
        footers: Hash of the footer of each file, in which place and size of all values are; other than a time stamp it is
            the same on every machine.

    Raises:
        ValueError: If a file is no Parquet file, lacks the column, or they have no row.
    """

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self.name = name
        self._row_groups: list[tuple[Path, int]] = []
        self.footers: list[str] = []
        sizes, num_bytes = [], 0
        for path in paths:
            with _open(path) as file:
                self.footers.append(_hash_footer(path))
                if name not in file.schema_arrow.names:
                    columns = ", ".join(file.schema_arrow.names)
                    raise ValueError(f"`{path}` must have the column {name!r}, got {columns}.")
                for number in range(file.num_row_groups):
                    row_group = file.metadata.row_group(number)
                    if row_group.num_rows == 0:
                        continue
                    self._row_groups.append((path, number))
                    sizes.append(row_group.num_rows)
                    columns = map(row_group.column, range(row_group.num_columns))
                    # The image columns of `datasets` are structs: `image.bytes` and `image.path`.
                    num_bytes += sum(
                        column.total_uncompressed_size
                        for column in columns
                        if column.path_in_schema.split(".")[0] == name
                    )
        if not sizes:
            raise ValueError(f"`paths` must hold rows, got {len(paths)} files without any.")
        self._stops = np.cumsum(sizes)
        self.starts = self._stops - sizes
        self.shuffle_size = min(_MAX_SHUFFLE_SIZE, max(1, _BUFFER_SIZE * len(self) // max(1, num_bytes)))
        # A pass that shuffles over `shuffle_size` rows has row groups of so many rows open, the first and the last in
        # part, and threads that read ahead open some more.
        self._capacity = self.shuffle_size * 3 // 2 + 2 * max(sizes)
        self._cache: OrderedDict[int, pyarrow.ChunkedArray] = OrderedDict()
        self._num_cached = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, row: int) -> Any:  # noqa: ANN401
        """Returns the value in a row as Python has it: bytes, or a dictionary for a struct."""
        if not 0 <= row < len(self):
            raise IndexError(f"`row` must lie between 0 and {len(self) - 1}, got {row}.")
        row_group = int(np.searchsorted(self._stops, row, side="right"))
        return self._values(row_group)[int(row - self.starts[row_group])].as_py()

    def _values(self, row_group: int) -> pyarrow.ChunkedArray:
        with self._lock:
            values = self._cache.get(row_group)
            if values is None:
                path, number = self._row_groups[row_group]
                with _open(path) as file:
                    try:
                        values = file.read_row_group(number, columns=[self.name], use_threads=False).column(0)
                    except (pyarrow.ArrowException, OSError) as error:
                        raise ValueError(f"`{path}`, row group {number}: cannot be read ({error}).") from None
                self._cache[row_group] = values
                self._num_cached += len(values)
                while self._num_cached > self._capacity:
                    self._num_cached -= len(self._cache.popitem(last=False)[1])
            self._cache.move_to_end(row_group)
            return values


def _hash_footer(path: Path) -> str:
    """Returns the hash of a Parquet file's end: the footer, its length in four bytes, and four letters."""
    with open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(file.read()).hexdigest()


def _open(path: Path) -> parquet.ParquetFile:
    try:
        return parquet.ParquetFile(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"`{path}` does not exist.") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"`{path}` is not a Parquet file ({error}).") from None

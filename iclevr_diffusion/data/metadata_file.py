"""A file of rows that says what images show: metadata.jsonl, metadata.csv or metadata.parquet."""

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".jsonl", ".csv", ".parquet")
NUM_FAULTS_SHOWN = 10


class MetadataFile:
    """The columns of such a file, and where each row stands in it.

    Args:
        path: The file. JSON lines and CSV are UTF-8; the first line of CSV names the columns.

    Attributes:
        columns: The cells of each column, one a row; `None` where a row of JSON lines lacks the key.
        lines: The line of each row in the file; in Parquet its number, from 1.
        class_names: Names by number of the columns that `datasets` wrote as `ClassLabel`, in Parquet.
        faults: What is wrong with the lines that could not be read, by row; their cells are `None`.
        delimiter: What stands between the cells of CSV: a comma, or what a header without commas tells, `;` or a tab.

    Raises:
        ValueError: If the file is damaged, or no line of it can be read; of lines, the first ones are named at length.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.class_names: dict[str, list[str]] = {}
        self.faults: dict[int, str] = {}
        self.delimiter = ","
        read = {".jsonl": self._read_jsonl, ".csv": self._read_csv, ".parquet": self._read_parquet}[path.suffix]
        try:
            self.columns, self.lines = read()
        except UnicodeDecodeError as error:
            raise ValueError(f"`{path}` must be text in UTF-8 ({error}); save it as such.") from None
        if len(self.faults) == len(self.lines):
            refuse_faults(list(self.faults.values()))
        if not self.lines:
            raise ValueError(f"`{path}` holds no row; it must have one an image.")

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int) -> str:
        """Names a row by its file and line, for messages."""
        return f"`{self.path}`, {'row' if self.path.suffix == '.parquet' else 'line'} {self.lines[row]}"

    def _read_jsonl(self) -> tuple[dict[str, list[Any]], Sequence[int]]:
        rows, lines = [], []
        for number, line in enumerate(self.path.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            where = f"`{self.path}`, line {number}"
            row = {}
            try:
                row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=refuse_repeated_keys)
            except UnicodeDecodeError:
                raise
            except (ValueError, RecursionError) as error:
                self.faults[len(rows)] = f"{where} is not valid JSON: {error}."
            if not isinstance(row, dict):
                self.faults[len(rows)] = (
                    f'{where}: expected an object such as {{"file_name": "0001.png", "labels": ["red"]}}.'
                )
                row = {}
            rows.append(row)
            lines.append(number)
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}, lines

    def _read_csv(self) -> tuple[dict[str, list[Any]], Sequence[int]]:
        rows, lines = [], []
        with open(self.path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, delimiter=self.delimiter)
            header: list[str] = []
            try:
                header = next(filter(None, reader), [])
                if self.delimiter == "," and len(header) == 1 and re.search("[;\t]", header[0]):
                    self.delimiter = max(";", "\t", key=header[0].count)
                    return self._read_csv()
                repeated = [name for name, count in Counter(header).items() if count > 1 or not name]
                if repeated:
                    raise ValueError(
                        f"`{self.path}`, line {reader.line_num} must name each column, and once, got {', '.join(header)}."
                    )
                for row in reader:
                    if not row:
                        continue
                    where = f"`{self.path}`, line {reader.line_num}"
                    if len(row) != len(header):
                        held = "commas" if self.delimiter == "," else repr(self.delimiter)
                        self.faults[len(rows)] = (
                            f"{where}: expected {len(header)} cells ({', '.join(header)}), got {len(row)}; put quotes"
                            f" around a cell that holds {held}."
                        )
                        row = [None] * len(header)
                    rows.append(row)
                    lines.append(reader.line_num)
            except csv.Error as error:  # nothing behind it can be read
                self.faults[len(rows)] = f"`{self.path}`, line {reader.line_num} is not valid CSV: {error}."
                rows.append([None] * len(header))
                lines.append(reader.line_num)
        return {name: [row[i] for row in rows] for i, name in enumerate(header)}, lines

    def _read_parquet(self) -> tuple[dict[str, list[Any]], Sequence[int]]:
        try:
            table = pq.read_table(self.path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"`{self.path}` is not a readable Parquet file ({error}); write it again.") from None
        self.class_names = class_names_of_schema(table.schema)
        return table.to_pydict(), range(1, len(table) + 1)


def find_class_names(features: datasets.Features) -> dict[str, list[str]]:
    """Returns the names by number of the columns that hold one `ClassLabel` a row, or a list of them."""
    found = {}
    for column, feature in features.items():
        item = getattr(feature, "feature", feature)
        if isinstance(item, datasets.ClassLabel) and item.names:
            found[column] = list(item.names)
    return found


def class_names_of_schema(schema: pa.Schema) -> dict[str, list[str]]:
    """Returns what `find_class_names` does of a Parquet file; one that `datasets` did not write has none."""
    if b"huggingface" not in (schema.metadata or {}):  # and may have columns of types that `datasets` does not know
        return {}
    return find_class_names(datasets.Features.from_arrow_schema(schema))


def refuse_faults(faults: list[str]) -> None:
    """Raises a ValueError that names the first faults, and counts the others, if there are any."""
    if faults:
        more = len(faults) - NUM_FAULTS_SHOWN
        shown = faults[:NUM_FAULTS_SHOWN] + ([f"and {more:,} more."] if more > 0 else [])
        raise ValueError("\n".join(shown))


def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object of JSON, for `object_pairs_hook`; one that names a key twice is refused."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the entry {repeated!r} occurs twice")
    return entries

"""The images that an evaluation has drawn, kept so that judges can look at them at any time."""

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from iclevr_diffusion.images import to_image


class Unit(NamedTuple):
    """One image of an evaluation: which condition of which protocol it shows, and for the how-manieth time."""

    protocol: str
    position: int
    replicate: int


class Batch(NamedTuple):
    """Images that were drawn together.

    Args:
        units: What the images are.
        pixel_values: The images, uint8 (B, C, H, W).
        record: What was written with them, such as how long they took.
    """

    units: list[Unit]
    pixel_values: np.ndarray
    record: dict[str, Any]


class Drawings:
    """A folder of Parquet files, one a batch, each whole or absent; several processes may add to it at once.

    A file has a row an image: `protocol`, `position`, `replicate`, `labels`, `seed` and `image`, the bytes of a PNG file
    as `datasets` keeps them, so that `load_dataset("parquet", ...)` shows the images. A record of the batch, as JSON,
    lies in the file's metadata.

    Args:
        folder: The folder, made by the first batch.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def add(
        self,
        units: Sequence[Unit],
        pixel_values: np.ndarray,
        *,
        labels: Sequence[Sequence[str]],
        seeds: Sequence[int],
        record: dict[str, Any],
        process_index: int = 0,
    ) -> None:
        """Writes a batch of images, uint8 (B, C, H, W) with C of 1, 3 or 4, into a file of its own."""
        columns = {
            "protocol": pa.array([unit.protocol for unit in units], pa.string()),
            "position": pa.array([unit.position for unit in units], pa.int32()),
            "replicate": pa.array([unit.replicate for unit in units], pa.int32()),
            "labels": pa.array([list(row) for row in labels], pa.list_(pa.string())),
            "seed": pa.array(seeds, pa.int64()),
            "image": pa.array([{"bytes": _to_png(image), "path": None} for image in pixel_values], _IMAGE),
        }
        table = pa.table(columns).replace_schema_metadata({_RECORD: json.dumps(record)})
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier = [
            int(path.stem.rpartition("-")[2]) for path in self.folder.glob(f"process-{process_index:05d}-*.parquet")
        ]
        path = self.folder / f"process-{process_index:05d}-{max(earlier, default=-1) + 1:06d}.parquet"
        unfinished = path.with_suffix(".unfinished")
        pq.write_table(table, unfinished, compression="none")  # PNG files do not get smaller
        os.replace(unfinished, path)

    def units(self) -> set[Unit]:
        """Returns what has been drawn."""
        drawn: set[Unit] = set()
        for path in self._files():
            drawn.update(_units(pq.read_table(path, columns=list(Unit._fields))))
        return drawn

    def records(self) -> Iterator[tuple[list[Unit], dict[str, Any]]]:
        """Yields for each batch what it holds and its record, without reading the images."""
        for path in self._files():
            table = pq.read_table(path, columns=list(Unit._fields))
            yield _units(table), json.loads(table.schema.metadata[_RECORD])

    def batches(self, wanted: Callable[[Unit], bool] = lambda unit: True) -> Iterator[Batch]:
        """Yields all batches with their images, in no special order, less the images that are not `wanted`."""
        for path in self._files():
            table = pq.read_table(path, columns=[*Unit._fields, "image"])
            mask = [wanted(unit) for unit in _units(table)]
            if any(mask):
                table = table.filter(pa.array(mask))
                images = [_from_png(image["bytes"]) for image in table["image"].to_pylist()]
                yield Batch(_units(table), np.stack(images), json.loads(table.schema.metadata[_RECORD]))

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("process-*.parquet"))


_RECORD = b"record"
_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def _units(table: pa.Table) -> list[Unit]:
    return [Unit(*row) for row in zip(*(table[name].to_pylist() for name in Unit._fields), strict=True)]


def _to_png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    to_image(image).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _from_png(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        pixel_values = np.asarray(image)  # (H, W) or (H, W, C)
    return pixel_values.reshape(*pixel_values.shape[:2], -1).transpose(2, 0, 1)

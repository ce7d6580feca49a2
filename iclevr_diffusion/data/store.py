import hashlib
import json
import math
import os
import struct
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from iclevr_diffusion.data.digits import load_digits, load_mnist
from iclevr_diffusion.data.folder import IclevrFolder
from iclevr_diffusion.data.source import ImageSource
from iclevr_diffusion.data.split import SPLITS, Split, scene_of_file, split_of_scene
from iclevr_diffusion.files import cache_folder
from iclevr_diffusion.labels import LabelVocabulary

# Sources that have a name instead of a folder.
NAMED_SOURCES = {"digits": load_digits, "mnist": load_mnist}
_CHUNK_SIZE = 512  # images in memory at a time while a store is written or summed up
_NUM_THREADS = 4  # decoding gains nothing from threads at 64x64, waiting for a slow disk does


class ImageStore:
    """All images of a source as one uint8 array in a file that is mapped, not read, into memory.

    The file is a safetensors file, so other tools read it too. Its SHA-256 is checked in whole when it is opened,
    which takes 0.2 s for the 221 MB of i-CLEVR at 64x64. Use `open_store` to make one from a folder of images or
    another source.

    Args:
        path: The file.

    Attributes:
        pixel_values: Images, uint8 (num_images, C, H, W) in [0, 255], in the order of the source; C is 3, or 1 for grey.
        class_labels: 1 where an image shows an object, uint8 (num_images, num_classes).
        file_names: Name of each image's file.
        scenes: Number of each image's scene, int64 (num_images,).
        vocabulary: Names of the classes.
        sha256: Hash of pixels, labels and names: the same for the same data, wherever it was made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                header, data_start = _read_header(file)
            metadata = header["__metadata__"]
            data = np.memmap(self.path, dtype=np.uint8, mode="r", offset=data_start)
            arrays = {}
            for name in ("class_labels", "pixel_values"):
                start, stop = header[name]["data_offsets"]
                arrays[name] = data[start:stop].reshape(header[name]["shape"])
            names = {name: json.loads(text) for name, text in metadata.items() if name != "sha256"}
            file_names, label_names = names["file_names"], names["label_names"]
            recorded_sha256: str = metadata["sha256"]
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise ValueError(f"`{self.path}` is not a whole image store ({error}); delete it.") from None
        if _hash(names, data).hexdigest() != recorded_sha256:
            raise ValueError(f"`{self.path}` is damaged: its content does not have the recorded SHA-256; delete it.")

        self.pixel_values: np.memmap = arrays["pixel_values"]
        self.class_labels = np.array(arrays["class_labels"])
        self.file_names: list[str] = file_names
        self.scenes = np.array(names.get("scenes") or _scenes_of_files(file_names), dtype=np.int64)
        self.vocabulary = LabelVocabulary(label_names)
        self.sha256 = recorded_sha256

    def __len__(self) -> int:
        return len(self.file_names)

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
        split_of = {scene: split_of_scene(scene) for scene in set(self.scenes.tolist())}
        return np.flatnonzero([split_of[scene] == split for scene in self.scenes.tolist()]).astype(np.int64)

    def statistics(self, indices: np.ndarray) -> tuple[np.ndarray, float]:
        """Returns the mean image and the standard deviation around it of the images at `indices`.

        Returns:
            The mean image, float32 (C, H, W) in [-1, 1], and the root mean square over images, channels and pixels of
            what is left when it is subtracted, in the same unit.
        """
        if len(indices) == 0:
            raise ValueError("`indices` must hold at least one image, got none; see `store.indices`.")
        # In integers, which are exact: the result depends neither on the order nor on the chunks.
        total, total_of_squares = np.zeros(self.pixel_values.shape[1:], dtype=np.int64), 0
        for chunk in _chunks(indices):
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


def open_store(
    source: str | Path | ImageSource | None = None,
    *,
    resolution: int = 64,
    cache_dir: str | Path | None = None,
    vocabulary: LabelVocabulary | None = None,
    progress: bool = True,
) -> ImageStore:
    """Opens the store of a folder's images or another source's, and writes it first where there is none.

    A store belongs to the images as they are (of files: names, sizes, time stamps; of MNIST: its revision), their
    labels and the resolution: change one and another store is written. It is written under a temporary name and renamed
    when it is whole. Of several processes that need the same one, one writes and the others wait.

    Args:
        source: Folder in the course's layout, see `IclevrFolder`, where `None` takes the environment variable
            ICLEVR_ROOT; `"digits"`, those of scikit-learn, or `"mnist"`, of the Hub (a folder of that name is
            `"./digits"`); or any other `ImageSource`.
        resolution: Height and width of the stored images; others are resized directly to it.
        cache_dir: Where stores lie. By default the environment variable ICLEVR_CACHE, or `iclevr_diffusion` in the
            user's cache folder. Old stores in it can be deleted at any time.
        vocabulary: Label names and their indices, by default those of `objects.json`, or the ten digits.
        progress: Whether to show a progress bar while writing.

    Raises:
        ValueError: If the source is not what it should be, or `vocabulary` is given for an `ImageSource`, which has one.
    """
    if isinstance(source, str) and source in NAMED_SOURCES:
        source = NAMED_SOURCES[source](vocabulary)
    elif source is None or isinstance(source, str | Path):
        source = IclevrFolder(source, vocabulary)
    elif vocabulary is not None:
        raise ValueError(
            "`vocabulary` must be left out for an `ImageSource`, which has its own; build it with that one."
        )
    fingerprint = source.fingerprint(resolution)
    path = cache_folder(cache_dir) / f"images-{resolution}-{fingerprint[:32]}.safetensors"
    if (store := _open_if_whole(path)) is not None:
        return store
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            # Another process may have written it while this one waited.
            if (store := _open_if_whole(path)) is None:
                _write_store(path, source, resolution, fingerprint, progress)
                store = ImageStore(path)
            return store
    except PermissionError as error:
        raise PermissionError(
            f"Cannot write the image store into `{path.parent}` ({error}); give another `cache_dir` or set the"
            " environment variable ICLEVR_CACHE."
        ) from error


def _open_if_whole(path: Path) -> ImageStore | None:
    try:
        return ImageStore(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        warnings.warn(f"{error} It is written again from the images.", stacklevel=3)
        return None


def _write_store(path: Path, source: ImageSource, resolution: int, fingerprint: str, progress: bool) -> None:
    shapes = {
        "class_labels": source.class_labels.shape,
        "pixel_values": (len(source.file_names), source.num_channels, resolution, resolution),
    }
    names = {"file_names": source.file_names, "label_names": list(source.vocabulary.names)}
    if source.scenes.tolist() != _scenes_of_files(source.file_names):
        names["scenes"] = source.scenes.tolist()

    def read(file_name: str) -> np.ndarray:
        pixel_values = np.asarray(source.read_image(file_name, resolution))  # (H, W) or (H, W, 3)
        return pixel_values.reshape(resolution, resolution, source.num_channels).transpose(2, 0, 1)

    temporary = path.with_suffix(".tmp")
    try:
        with (
            open(temporary, "wb") as file,
            ThreadPoolExecutor(_NUM_THREADS) as pool,
            tqdm(
                total=len(source.file_names), unit="image", desc="Writing the image store", disable=not progress
            ) as bar,
        ):
            file.write(_header(shapes, names, sha256="0" * 64))
            sha256 = _hash(names, source.class_labels)
            file.write(source.class_labels.tobytes())
            for chunk in _chunks(source.file_names):
                pixel_values = np.stack(list(pool.map(read, chunk))).tobytes()
                sha256.update(pixel_values)
                file.write(pixel_values)
                bar.update(len(chunk))
            file.seek(0)
            file.write(_header(shapes, names, sha256=sha256.hexdigest()))
            file.flush()
            os.fsync(file.fileno())
        if source.fingerprint(resolution) != fingerprint:
            raise ValueError(f"The images in `{source.name}` changed while they were read; call again.")
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut."""
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _chunks(items: np.ndarray | list[str]) -> Iterator[np.ndarray | list[str]]:
    for start in range(0, len(items), _CHUNK_SIZE):
        yield items[start : start + _CHUNK_SIZE]


def _scenes_of_files(file_names: list[str]) -> list[int]:
    return [scene_of_file(file_name) for file_name in file_names]


def _hash(names: dict[str, list], data: np.ndarray) -> "hashlib._Hash":
    """Returns the hash of a store's names and of the data, or of those that come first when more are added to it."""
    sha256 = hashlib.sha256(json.dumps([names[name] for name in sorted(names)]).encode())
    sha256.update(data)
    return sha256


def _header(shapes: dict[str, tuple[int, ...]], names: dict[str, list], sha256: str) -> bytes:
    """Returns the header of a safetensors file that holds uint8 arrays; its length does not depend on the hash."""
    metadata = {name: json.dumps(values) for name, values in names.items()} | {"sha256": sha256}
    header: dict[str, object] = {"__metadata__": metadata}
    stop = 0
    for name, shape in shapes.items():
        start, stop = stop, stop + int(np.prod(shape))
        header[name] = {"dtype": "U8", "shape": list(shape), "data_offsets": [start, stop]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    return struct.pack("<Q", len(content)) + content


def _read_header(file: BinaryIO) -> tuple[dict, int]:
    """Returns the header of a safetensors file and the position where the data start."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > os.fstat(file.fileno()).st_size:
        raise ValueError("its header is cut off")
    return json.loads(file.read(length)), 8 + length

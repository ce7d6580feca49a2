import contextlib
import hashlib
import json
import math
import os
import struct
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from iclevr_diffusion.data.image_set import ImageSet, chunks
from iclevr_diffusion.data.labelled_images import LabelledImages
from iclevr_diffusion.data.opening import open_source
from iclevr_diffusion.data.source import ImageSource, read_pixels
from iclevr_diffusion.data.split import scene_of_file
from iclevr_diffusion.files import cache_folder, write_text, writing_to_cache
from iclevr_diffusion.labels import LabelVocabulary

# The tensors of the file: scenes come first, as eight bytes must not straddle, and file_names is a JSON list.
_DTYPES = {
    "scenes": np.dtype("<i8"),
    "file_names": np.dtype("u1"),
    "class_labels": np.dtype("u1"),
    "pixel_values": np.dtype("u1"),
}
_COARSEST_TIME_STAMP = 2_000_000_000  # nanoseconds, of FAT
_NUM_THREADS = 4  # decoding gains nothing from threads at 64x64, waiting for a slow disk does


class ImageStore(ImageSet):
    """All images of a source as one uint8 array in a file that is mapped, not read, into memory.

    The file is a safetensors file, so other tools read it too. Its SHA-256 is checked in whole when it is opened for the
    first time, which takes 0.2 s for the 221 MB of i-CLEVR at 64x64. A file beside it, `.checked`, keeps the size and the
    time stamps that it had then, and while it has them it is not read through again; delete that file to have it
    checked once more. Use `open_store` to make a store from a folder of images or another source.

    Args:
        path: The file.

    Attributes:
        sha256: Hash of pixels, labels and names: the same for the same data, wherever it was made. Other attributes are
            those of an `ImageSet`; `pixel_values`, `class_labels` and `scenes` are mapped.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.cache_dir = self.path.parent
        try:
            with open(self.path, "rb") as file:
                header, data_start = _read_header(file)
            metadata = header["__metadata__"]
            arrays = {}
            for name, dtype in _DTYPES.items():
                # PyTorch warns of arrays that cannot be written to; "c" can, with no effect on the file. Pixels are left
                # out, because a system may refuse to promise that much memory for copies.
                mode = "r" if name == "pixel_values" else "c"
                start, shape = data_start + header[name]["data_offsets"][0], tuple(header[name]["shape"])
                arrays[name] = np.memmap(self.path, dtype=dtype, mode=mode, offset=start, shape=shape)
            self.vocabulary = LabelVocabulary(json.loads(metadata["label_names"]))
            self.sha256: str = metadata["sha256"]
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise ValueError(f"`{self.path}` is not a whole image store ({error}); delete it.") from None
        self.pixel_values: np.memmap = arrays["pixel_values"]
        self.class_labels = np.asarray(arrays["class_labels"])
        self.scenes = np.asarray(arrays["scenes"])
        self._file_names = arrays["file_names"]
        self._check(data_start + header["class_labels"]["data_offsets"][0])

    @property
    def file_names(self) -> list[str]:
        """Name of each image's file, made into a list at every call: most have no use for 200,000 names."""
        return json.loads(self._file_names.tobytes())

    def _check(self, hashed_start: int) -> None:
        """Compares the file with its SHA-256, unless that was done since it was last written to."""
        record = self.path.with_suffix(".checked")
        status = _status(self.path)
        with contextlib.suppress(OSError, ValueError):
            if json.loads(record.read_text()) == status:
                return
        try:
            sha256 = _hash_names(self.file_names, self.vocabulary, self.scenes)
            with open(self.path, "rb") as file:
                file.seek(hashed_start)
                while block := file.read(2**20):
                    sha256.update(block)
            if sha256.hexdigest() != self.sha256:
                raise ValueError("its content does not have the recorded SHA-256")
        except ValueError as error:  # also of names that are no JSON any more
            raise ValueError(f"`{self.path}` is damaged: {error}; delete it.") from None
        # Time stamps are coarse, so what was written a moment ago could change and keep them.
        is_old = time.time_ns() - max(status["mtime_ns"], status["ctime_ns"]) > _COARSEST_TIME_STAMP
        if is_old and _status(self.path) == status:
            with contextlib.suppress(OSError):  # a cache that others share can be read-only
                write_text(record, json.dumps(status))


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
    labels, the resolution and how they are brought to it: change one and another store is written. It is written under a temporary name and renamed
    when it is whole. Of several processes that need the same one, one writes and the others wait.

    Args:
        source: What `open_source` opens: a folder of images, a data set of the Hub, ...; or any other `ImageSource`.
        resolution: Height and width of the stored images; others are resized to it.
        cache_dir: Where stores lie. By default the environment variable ICLEVR_CACHE, or `iclevr_diffusion` in the
            user's cache folder. Old stores in it can be deleted at any time.
        vocabulary: Label names and their indices, by default those of the source.
        progress: Whether to show a progress bar while writing, and how someone's own images are read.

    Raises:
        ValueError: If the source is not what it should be, or `vocabulary` is given for an `ImageSource`, which has one.
        PermissionError: If the store cannot be written where it should lie.
    """
    if source is None or isinstance(source, str | Path):
        source = open_source(source, vocabulary)
    elif vocabulary is not None:
        raise ValueError(
            "`vocabulary` must be left out for an `ImageSource`, which has its own; build it with that one."
        )
    fingerprint = source.fingerprint(resolution)
    path = cache_folder(cache_dir) / f"store-{resolution}-{fingerprint[:32]}.safetensors"
    if (store := _open_if_whole(path)) is not None:
        return store
    with writing_to_cache("the image store", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            # Another process may have written it while this one waited.
            if (store := _open_if_whole(path)) is None:
                if progress and isinstance(source, LabelledImages):
                    print(source.describe(), file=sys.stderr)
                _write_store(path, source, resolution, fingerprint, progress)
                store = ImageStore(path)
            return store


def _open_if_whole(path: Path) -> ImageStore | None:
    try:
        return ImageStore(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        warnings.warn(f"{error} It is written again from the images.", stacklevel=3)
        return None


def _write_store(path: Path, source: ImageSource, resolution: int, fingerprint: str, progress: bool) -> None:
    file_names = json.dumps(source.file_names).encode()
    shapes = {
        "scenes": source.scenes.shape,
        "file_names": (len(file_names),),
        "class_labels": source.class_labels.shape,
        "pixel_values": (len(source.file_names), source.num_channels, resolution, resolution),
    }

    temporary = path.with_suffix(".tmp")
    try:
        with (
            open(temporary, "wb") as file,
            ThreadPoolExecutor(_NUM_THREADS) as pool,
            tqdm(
                total=len(source.file_names), unit="image", desc="Writing the image store", disable=not progress
            ) as bar,
        ):
            file.write(_header(shapes, source.vocabulary, sha256="0" * 64))
            file.write(source.scenes.astype(_DTYPES["scenes"]).tobytes())
            file.write(file_names)
            file.write(source.class_labels.tobytes())
            sha256 = _hash_names(source.file_names, source.vocabulary, source.scenes)
            sha256.update(source.class_labels.tobytes())
            for chunk in chunks(source.file_names):
                pixel_values = np.stack(list(pool.map(partial(read_pixels, source, resolution), chunk))).tobytes()
                sha256.update(pixel_values)
                file.write(pixel_values)
                bar.update(len(chunk))
            file.seek(0)
            file.write(_header(shapes, source.vocabulary, sha256=sha256.hexdigest()))
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


def _scenes_of_files(file_names: list[str]) -> list[int]:
    return [scene_of_file(file_name) for file_name in file_names]


def _status(path: Path) -> dict[str, int]:
    """Returns what changes when a file is written to."""
    status = os.stat(path)
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def _hash_names(file_names: list[str], vocabulary: LabelVocabulary, scenes: np.ndarray) -> "hashlib._Hash":
    """Returns the hash of a store's names, to which class labels and pixels are to be added."""
    names = [file_names, list(vocabulary.names)]
    if (scenes := scenes.tolist()) != _scenes_of_files(file_names):
        names.append(scenes)
    return hashlib.sha256(json.dumps(names).encode())


def _header(shapes: dict[str, tuple[int, ...]], vocabulary: LabelVocabulary, sha256: str) -> bytes:
    """Returns the header of a store's safetensors file; its length does not depend on the hash."""
    header: dict[str, object] = {"__metadata__": {"label_names": json.dumps(list(vocabulary.names)), "sha256": sha256}}
    stop = 0
    for name, shape in shapes.items():
        start, stop = stop, stop + math.prod(shape) * _DTYPES[name].itemsize
        dtype = {"u": "U", "i": "I"}[_DTYPES[name].kind] + str(8 * _DTYPES[name].itemsize)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    return struct.pack("<Q", len(content)) + content


def _read_header(file: BinaryIO) -> tuple[dict, int]:
    """Returns the header of a safetensors file and the position where the data start."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > os.fstat(file.fileno()).st_size:
        raise ValueError("its header is cut off")
    return json.loads(file.read(length)), 8 + length

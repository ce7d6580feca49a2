import hashlib
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from iclevr_diffusion.data.image_file import check_path, file_status
from iclevr_diffusion.data.metadata_file import refuse_repeated_keys
from iclevr_diffusion.data.source import check_resolution
from iclevr_diffusion.data.split import scene_of_file
from iclevr_diffusion.labels import LabelVocabulary

IMAGE_FOLDER = "iclevr"
# Says what `IclevrFolder.read_image` does to the pixels. Change both together: it is part of the key by which stores and
# Arrow files are found again.
TRANSFORM = "png, rgb, direct bilinear resize, 1"


class IclevrFolder:
    """Images and the names of the objects in them, in the layout of the i-CLEVR course files.

    ```
    root/objects.json   the vocabulary, {"gray cube": 0, ...}
    root/train.json     the objects in each image, {"CLEVR_train_000000_0.png": ["gray cube"], ...}
    root/iclevr/        the images, PNG files of any size
    ```
    Everything that can be wrong with such a folder is refused here, with the file and the entry named. The folder is
    only read, never written.

    Args:
        root: The folder. `None` takes it from the environment variable ICLEVR_ROOT.
        vocabulary: Object names and their indices, read from `objects.json` by default.

    Attributes:
        file_names: Names of the images, sorted.
        labels: Object names of each image, in the order of `file_names` and, within an image, of `train.json`.
        class_labels: The same as a uint8 array of 0 and 1 (num_images, num_classes).
        scenes: Number of each image's scene, int64 (num_images,).
    """

    num_channels = 3

    def __init__(self, root: str | Path | None = None, vocabulary: LabelVocabulary | None = None) -> None:
        if root is None:
            root = os.environ.get("ICLEVR_ROOT")
        if not root:
            raise ValueError(
                "`root` must name the folder that holds objects.json, train.json and iclevr/, got nothing;"
                " give it or set the environment variable ICLEVR_ROOT."
            )
        self.root = Path(root)
        self.image_folder = self.root / IMAGE_FOLDER
        if not self.image_folder.is_dir():
            raise FileNotFoundError(
                f"`{self.image_folder}` is not a folder; `root` must hold objects.json, train.json and {IMAGE_FOLDER}/"
                " with the images."
            )
        self.vocabulary = LabelVocabulary.from_json(self.root / "objects.json") if vocabulary is None else vocabulary
        self._annotations = self.root / "train.json"
        entries = self._read_annotations()
        self.file_names = sorted(entries)
        self.labels = [entries[file_name] for file_name in self.file_names]
        self.scenes = np.array([scene_of_file(file_name) for file_name in self.file_names], dtype=np.int64)
        self.class_labels = np.zeros((len(self.file_names), len(self.vocabulary)), dtype=np.uint8)
        for i, file_name in enumerate(self.file_names):
            try:
                indices = [self.vocabulary.index(label) for label in self.labels[i]]
            except ValueError as error:
                raise ValueError(f"`{self._annotations}`, entry {file_name!r}: {error}") from None
            if len(set(indices)) < len(indices):
                raise ValueError(
                    f"`{self._annotations}`, entry {file_name!r}: expected each object name once, got {self.labels[i]}."
                )
            self.class_labels[i, indices] = 1

    @property
    def name(self) -> str:
        """The folder of the images, for messages."""
        return str(self.image_folder)

    def _read_annotations(self) -> dict[str, list[str]]:
        if not self._annotations.is_file():
            raise FileNotFoundError(f"`{self._annotations}` does not exist; it must map image file names to labels.")
        content = self._annotations.read_bytes()
        self._annotations_sha256 = hashlib.sha256(content).hexdigest()
        try:
            entries = json.loads(content, object_pairs_hook=refuse_repeated_keys)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`{self._annotations}` is not valid JSON: {error}") from None
        if not isinstance(entries, dict):
            raise ValueError(
                f"`{self._annotations}` must be a JSON object that maps image file names to lists of object names, got"
                f" a {type(entries).__name__}."
            )
        if not entries:
            raise ValueError(f"`{self._annotations}` names no image.")
        for file_name, labels in entries.items():
            if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
                raise ValueError(
                    f"`{self._annotations}`, entry {file_name!r}: expected a list of object names such as"
                    f' ["red cube", "blue sphere"], got {json.dumps(labels)[:100]}.'
                )
            check_path(
                f"`{self._annotations}`, entry {file_name!r}",
                self.image_folder,
                file_name,
                "CLEVR_train_000000_0.png",
            )
        return entries

    def fingerprint(self, resolution: int) -> str:
        """Returns a hash that changes with the labels, any image file, or what is done to the images.

        An image counts as changed when its size or a time stamp does. Looking at those takes a tenth of a second for
        18,009 files, reading them all many seconds on a slow disk.
        """
        check_resolution(resolution)
        files = [(file_name, *self._file_status(file_name)) for file_name in self.file_names]
        key = [TRANSFORM, resolution, self.vocabulary.names, self._annotations_sha256, files]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()

    def _file_status(self, file_name: str) -> tuple[int, int, int]:
        return file_status(f"`{self._annotations}`, entry {file_name!r}", self.image_folder, file_name)

    def read_file(self, file_name: str) -> bytes:
        """Returns the file of an image of `train.json`."""
        self._file_status(file_name)
        return (self.image_folder / file_name).read_bytes()

    def read_image(self, file_name: str, resolution: int) -> Image.Image:
        """Returns an image of `train.json` as RGB of `resolution` x `resolution` pixels.

        Another size is resized directly, without keeping the aspect, with the filter of torchvision's
        `Resize((resolution, resolution))`; an alpha channel is dropped, as the course's loaders do.
        """
        self._file_status(file_name)
        path = self.image_folder / file_name
        try:
            with Image.open(path, formats=["PNG"]) as image:
                image.verify()  # the checksums, which decoding does not look at
            with Image.open(path, formats=["PNG"]) as image:
                image.load()
        except Exception as error:  # Pillow lets struct.error, zlib.error, SyntaxError and others through
            raise ValueError(
                f"`{self._annotations}`, entry {file_name!r}: `{path}` is not a readable PNG ({error})."
            ) from error
        if image.mode not in ("RGB", "RGBA", "P", "L"):
            raise ValueError(
                f"`{self._annotations}`, entry {file_name!r}: `{path}` has mode {image.mode}; expected 8-bit RGB, RGBA,"
                " palette or grey."
            )
        image = image.convert("RGB")
        if image.size != (resolution, resolution):
            image = image.resize((resolution, resolution), Image.Resampling.BILINEAR)
        return image

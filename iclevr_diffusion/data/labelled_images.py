import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from iclevr_diffusion.data.image_file import TRANSFORM, fit, read_mode, read_upright
from iclevr_diffusion.data.image_table import ImageTable
from iclevr_diffusion.data.metadata_file import refuse_faults
from iclevr_diffusion.data.set_settings import SetSettings
from iclevr_diffusion.data.source import check_resolution
from iclevr_diffusion.data.split import SPLITS, scene_in_splits, scene_of_file, split_named
from iclevr_diffusion.labels import LabelVocabulary


class LabelledImages:
    """Anyone's images with any number of labels each, as an `ImageSource`.

    Images of one scene are in one split. Where the set itself says which images are for training, validation and
    testing, so it is; a split that it does not know is taken out of its training images, 5 % for each as everywhere.

    Args:
        table: The images and the columns beside them.
        settings: How the columns are read.
        vocabulary: The labels and their indices, instead of those that the settings name or that occur.

    Attributes:
        table: The images and the columns beside them.
        label_column: The column of the labels.

    Raises:
        ValueError: If a column is missing or a row is wrong; all rows at fault are named, the first ones at length.
    """

    def __init__(self, table: ImageTable, settings: SetSettings, vocabulary: LabelVocabulary | None = None) -> None:
        self.name = table.name
        self.file_names = table.file_names
        self.table = table
        self._settings = settings
        self._rows = {file_name: row for row, file_name in enumerate(self.file_names)}
        scene_column = self._column("scene_column", "scene")
        split_column = self._column("split_column", "split")
        self.label_column = self._column("label_column", "labels", "label")
        if self.label_column is None:
            left = [name for name in table.columns if name not in (scene_column, split_column, "file_name")]
            if len(left) != 1:
                raise ValueError(
                    f"`{self.name}` must have a column `labels` or `label`, got {', '.join(table.columns) or 'none'}; name"
                    f" the right one in a YAML file such as photos.yaml, with the lines `images: {settings.images}` and"
                    " `label_column: tags`, and give that file in the place of the folder."
                )
            self.label_column = left[0]
        cells = table.read_column(self.label_column)
        labels = self._parse_each(cells, self._labels_of)
        origin = "as given"
        self.vocabulary = vocabulary or settings.read_vocabulary()
        if self.vocabulary is None:
            origin = "as the set numbers them" if self.label_column in table.class_names else "those found, sorted"
            self.vocabulary = self._find_vocabulary(labels)
        self.class_labels = self._encode(labels)
        self.scenes = self._number_scenes(scene_column, split_column)
        self._choices = [
            f"{len(self.file_names):,} images",
            f"labels in the column `{self.label_column}`" + self._how_labels_stand(cells),
            f"{len(self.vocabulary)} labels, {origin}",
            f"images of one `{scene_column}` kept together" if scene_column else "each image a scene of its own",
            self._how_it_is_split(split_column),
            "largest square in the middle" if settings.center_crop else "resized directly",
        ]

    @cached_property
    def num_channels(self) -> int:
        """Channels of every image: as the settings say, or as the headers of all images do, which takes a look at all."""
        if self._settings.channels is not None:
            return self._settings.channels
        modes = self.modes
        if set(modes) <= {"L"}:
            return 1
        return 4 if set(modes) <= {"LA", "RGBA"} else 3

    @cached_property
    def modes(self) -> Counter[str]:
        """How many images are grey (L, with alpha LA) and coloured (RGB, with alpha RGBA)."""
        modes: Counter[str] = Counter()
        for row in range(len(self.file_names)):
            with contextlib.suppress(ValueError, OSError), self.table.open_file(row) as file:  # read_image refuses it
                modes[read_mode(file, self._where(row))] += 1
        return modes

    def describe(self) -> str:
        """Says how the set is read, in a line: what was given and what was found."""
        channels = f"{self.num_channels} channel{'s' if self.num_channels > 1 else ''}"
        if self._settings.channels is None:
            channels += f" ({', '.join(f'{count:,} {mode}' for mode, count in sorted(self.modes.items()))})"
        return f"{self.name}: {'; '.join([*self._choices, channels])}."

    def fingerprint(self, resolution: int, files: list[Any] | None = None) -> str:
        """Returns a hash that changes with the labels, scenes or splits, any image file, or what is done to the images.

        A file counts as changed when its size or a time stamp does, or when what stands for it in `files` does.
        """
        check_resolution(resolution)
        settings = [self._settings.center_crop, self._settings.channels]
        files = self.table.key() if files is None else files
        key = [TRANSFORM, resolution, *settings, self.vocabulary.names, self.file_names, files]
        sha256 = hashlib.sha256(json.dumps(key).encode())
        sha256.update(self.class_labels.tobytes())
        sha256.update(self.scenes.tobytes())
        return sha256.hexdigest()

    def read_file(self, file_name: str) -> bytes:
        """Returns the file of an image."""
        with self.table.open_file(self._rows[file_name]) as file:
            return file.read()

    def read_image(self, file_name: str, resolution: int) -> Image.Image:
        """Returns an image of `resolution` x `resolution` pixels in mode L, RGB or RGBA."""
        image = read_upright(self.read_file(file_name), self._where(self._rows[file_name]))
        return fit(image, resolution, self.num_channels, center_crop=self._settings.center_crop)

    def _where(self, row: int) -> str:
        return f"{self.table.where(row)}, {self.file_names[row]!r}"

    def _column(self, setting: str, *defaults: str) -> str | None:
        """Returns the column that a setting names, or the first that is called like one of `defaults`."""
        name = getattr(self._settings, setting)
        if name is None:
            return next((default for default in defaults if default in self.table.columns), None)
        if name not in self.table.columns:
            raise ValueError(
                f"`{setting}` must name a column of `{self.name}`, {', '.join(self.table.columns)}, got {name}."
            )
        return name

    def _parse_each(self, cells: list[Any], parse: Callable[[Any], Any]) -> list[Any]:
        """Reads the cells of a column, or refuses all that are wrong at once."""
        values, faults = [], []
        for row, cell in enumerate(cells):
            try:
                values.append(parse(cell))
            except ValueError as error:
                faults.append(f"{self._where(row)}: {error}")
        refuse_faults(faults)
        return values

    def _labels_of(self, cell: Any) -> list[str]:  # noqa: ANN401
        """Reads the labels in a cell: a list, text of one or several, or a number."""
        separator = self._settings.label_separator
        if isinstance(cell, str):
            if cell.lstrip().startswith("["):
                try:
                    cell = json.loads(cell)
                except ValueError:
                    raise ValueError(
                        f'expected a list of labels in JSON, such as ["red", "blue"], got {cell[:100]}; write double'
                        " quotes."
                    ) from None
            else:
                parts = [cell] if separator is None else cell.split(separator)
                cell = [] if not cell.strip() else [part.strip() for part in parts]
        elif cell is not None and not isinstance(cell, list):
            cell = [cell]
        names = self.table.class_names.get(self.label_column)
        labels = []
        for part in [None] if cell is None else cell:
            if isinstance(part, int) and not isinstance(part, bool):
                if names is not None and not 0 <= part < len(names):
                    raise ValueError(f"expected the number of one of {len(names)} classes, got {part}.")
                part = str(part) if names is None else names[part]
            if not isinstance(part, str) or not part or part.strip() != part:
                raise ValueError(
                    "expected labels without spaces around them in the column"
                    f" `{self.label_column}`, or [] for an image without, got {json.dumps(cell, default=repr)[:100]}."
                )
            labels.append(part)
        if len(set(labels)) < len(labels):
            raise ValueError(f"expected each label once, got {', '.join(labels)[:100]}.")
        return labels

    def _find_vocabulary(self, labels: list[list[str]]) -> LabelVocabulary:
        names = self.table.class_names.get(self.label_column)
        found = sorted({label for labels_of_image in labels for label in labels_of_image})
        if not found:
            raise ValueError(f"`{self.name}` must have a label in its column `{self.label_column}`, all are empty.")
        return LabelVocabulary(names or found)

    def _encode(self, labels: list[list[str]]) -> np.ndarray:
        class_labels = np.zeros((len(self.file_names), len(self.vocabulary)), dtype=np.uint8)
        indices = self._parse_each(labels, lambda shown: [self.vocabulary.index(label) for label in shown])
        for row, columns in enumerate(indices):
            class_labels[row, columns] = 1
        return class_labels

    def _how_labels_stand(self, cells: list[Any]) -> str:
        if any(isinstance(cell, list) for cell in cells):
            return " (lists)"
        if self._settings.label_separator is not None and any(isinstance(cell, str) for cell in cells):
            return f" (separated by {self._settings.label_separator!r})"
        return " (one each)"

    def _how_it_is_split(self, split_column: str | None) -> str:
        if split_column is not None:
            return f"splits by the column `{split_column}`"
        if self.table.splits is None or set(self.table.splits) == {"train"}:
            return "splits by chance, 90 : 5 : 5"
        return f"splits by the names of its parts, {', '.join(dict.fromkeys(self.table.splits))}"

    def _number_scenes(self, scene_column: str | None, split_column: str | None) -> np.ndarray:
        """Returns the scene of each image, int64 (num_images,), with numbers that fall into the splits that are named."""
        scenes = [scene_of_file(file_name) for file_name in self.file_names]
        if scene_column is not None:
            scenes = self._parse_each(self.table.read_column(scene_column), _scene_of_cell)
        splits = self.table.splits
        if split_column is not None:
            splits = self._parse_each(self.table.read_column(split_column), _split_of_cell)
        if splits is not None:
            # What the set does not name is taken out of its training images.
            places = {split: {split} for split in SPLITS}
            places["train"] = {"train"} | set(SPLITS) - set(splits)
            first_rows: dict[int, int] = {}
            faults = []
            for row, (scene, split) in enumerate(zip(scenes, splits, strict=True)):
                first = first_rows.setdefault(scene, row)
                if splits[first] != split:
                    faults.append(
                        f"{self._where(row)}: expected the split of its scene, which in {self._where(first)} is"
                        f" {splits[first]}, got {split}."
                    )
            refuse_faults(faults)
            moved = {scene: scene_in_splits(scene, places[splits[row]]) for scene, row in first_rows.items()}
            scenes = [moved[scene] for scene in scenes]
        return np.array(scenes, dtype=np.int64)


def _scene_of_cell(cell: Any) -> int:  # noqa: ANN401
    """Returns a scene's number: the number in a cell, or one made of its text."""
    if isinstance(cell, int) and not isinstance(cell, bool) and -(2**63) <= cell < 2**63:
        return cell
    if isinstance(cell, str) and cell:
        return -1 - (int.from_bytes(hashlib.sha256(cell.encode()).digest()[:8], "big") >> 2)
    raise ValueError(f"expected the scene's name or number, got {cell!r}.")


def _split_of_cell(cell: Any) -> str:  # noqa: ANN401
    split = split_named(cell) if isinstance(cell, str) else None
    if split is None:
        raise ValueError(f"expected a split, train, validation or held-out (or test), got {cell!r}.")
    return split

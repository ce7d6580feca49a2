import contextlib
import hashlib
import json
import re
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
from iclevr_diffusion.data.split import SPLITS, scene_in_splits, scene_of_file, scene_of_text, split_named
from iclevr_diffusion.labels import LabelVocabulary

_SEPARATORS = (";", "|", "/", ",")  # what people write between labels


class LabelledImages:
    """Anyone's images with any number of labels each, as an `ImageSource`.

    Images of one scene are in one split. Where the set itself says which images are for training, validation and
    testing, so it is; a split that it does not know is taken out of its training images, 5 % for each as everywhere.

    Args:
        table: The images and the columns beside them.
        settings: How the columns are read.
        vocabulary: The labels and their indices, instead of those that the settings name or that occur.
        skip_faults: Whether rows that are wrong are left out and noted in `faults`, to look at the others; no store is
            made of such a set. Otherwise it is refused.

    Attributes:
        table: The images and the columns beside them.
        label_column: The column of the labels.
        faults: What is wrong with rows, in their order.

    Raises:
        ValueError: If a column is missing or a row is wrong; all rows at fault are named, the first ones at length.
    """

    def __init__(
        self,
        table: ImageTable,
        settings: SetSettings,
        vocabulary: LabelVocabulary | None = None,
        *,
        skip_faults: bool = False,
    ) -> None:
        self.name = table.name
        self.table = table
        self._settings = settings
        self._faults: dict[int, list[str]] = {}
        for row, fault in table.faults:
            self._faults.setdefault(row, []).append(fault)
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
        scenes = self._number_scenes(scene_column, split_column)
        origin = "as given"
        self.vocabulary = vocabulary or settings.read_vocabulary()
        if self.vocabulary is None:
            origin = "as the set numbers them" if self.label_column in table.class_names else "those found, sorted"
            self.vocabulary = self._find_vocabulary(labels)
        indices = self._index(labels)
        self.faults = self._faults_in_order()
        rows = [row for row in range(len(cells)) if row not in self._faults]
        if not skip_faults or not rows:
            refuse_faults(self.faults)
        self.file_names = [table.file_names[row] for row in rows]
        self._rows = dict(zip(self.file_names, rows, strict=True))
        self.scenes = np.array([scenes[row] for row in rows], dtype=np.int64)
        self.class_labels = np.zeros((len(rows), len(self.vocabulary)), dtype=np.uint8)
        for i, row in enumerate(rows):
            self.class_labels[i, indices[row]] = 1
        self._has_text = any(isinstance(cell, str) and not cell.lstrip().startswith("[") for cell in cells)
        self._choices = [
            f"{len(self.file_names):,} images",
            f"labels in the column `{self.label_column}`" + self._how_labels_stand(cells),
            f"{len(self.vocabulary)} labels, {origin}",
            f"images of one `{scene_column}` kept together" if scene_column else "each image a scene of its own",
            self._how_it_is_split(split_column),
            "largest square in the middle" if settings.center_crop else "resized directly",
            *table.remarks,
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
        for row in self._rows.values():
            with contextlib.suppress(ValueError, OSError), self.table.open_file(row) as file:  # read_image refuses it
                modes[read_mode(file, self._where(row))] += 1
        return modes

    def describe(self) -> str:
        """Says how the set is read, in a line: what was given and what was found."""
        choices = list(self._choices)
        if self._settings.channels is not None or self.modes:  # without a readable image there is nothing to say
            choices.append(f"{self.num_channels} channel{'s' if self.num_channels > 1 else ''}")
        if self._settings.channels is None and self.modes:
            choices[-1] += f" ({', '.join(f'{count:,} {mode}' for mode, count in sorted(self.modes.items()))})"
        return f"{self.name}: {'; '.join(choices)}."

    def where(self, file_name: str) -> str:
        """Names an image by its row and file, for messages."""
        return self._where(self._rows[file_name])

    def likely_separator(self) -> str | None:
        """Returns what may separate labels in cells of text and is not taken to: labels are made of others by it."""
        if not self._has_text:
            return None
        for separator in _SEPARATORS:
            if separator != self._settings.label_separator:
                parts = {name: [part.strip() for part in name.split(separator)] for name in self.vocabulary}
                names_of_parts = Counter(part for own in parts.values() for part in set(own))
                if any(len(own) > 1 and all(p and names_of_parts[p] > 1 for p in own) for own in parts.values()):
                    return separator
        return None

    def fingerprint(self, resolution: int, files: list[Any] | None = None) -> str:
        """Returns a hash that changes with the labels, scenes or splits, any image file, or what is done to the images.

        A file counts as changed when its size or a time stamp does, or when what stands for it in `files` does.
        """
        check_resolution(resolution)
        refuse_faults(self.faults)
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
        name = self.table.file_names[row]
        return f"{self.table.where(row)}, {name!r}" if name else self.table.where(row)

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

    def _parse_each(self, cells: list[Any], parse: Callable[[Any], Any]) -> dict[int, Any]:
        """Reads the cells of a column by row, and notes those that are wrong."""
        values = {}
        for row, cell in enumerate(cells):
            if row in self.table.unread:
                continue
            try:
                values[row] = parse(cell)
            except ValueError as error:
                self._note(row, str(error))
        return values

    def _note(self, row: int, fault: str) -> None:
        self._faults.setdefault(row, []).append(f"{self._where(row)}: {fault}")

    def _faults_in_order(self) -> list[str]:
        return [fault for row in sorted(self._faults) for fault in self._faults[row]]

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
                parts = [part.strip() for part in ([cell] if separator is None else cell.split(separator))]
                if cell.strip() and "" in parts:
                    last = not parts[-1] and all(parts[:-1])
                    raise ValueError(
                        f"expected labels in the column `{self.label_column}`, got {cell[:100]!r} with an empty label;"
                        f" remove {'the last' if last else 'each superfluous'} {separator!r}."
                    )
                cell = parts if cell.strip() else []
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
        return labels

    def _find_vocabulary(self, labels: dict[int, list[str]]) -> LabelVocabulary:
        names = self.table.class_names.get(self.label_column)
        found = sorted({label for labels_of_image in labels.values() for label in labels_of_image})
        if not found:
            refuse_faults(self._faults_in_order())
            raise ValueError(f"`{self.name}` must have a label in its column `{self.label_column}`, all are empty.")
        return LabelVocabulary(names or found)

    def _index(self, labels: dict[int, list[str]]) -> dict[int, list[int]]:
        """Returns the indices of the labels in each row, and notes labels that are repeated or unknown."""
        indices: dict[int, list[int]] = {}
        for row, shown in labels.items():
            if len(set(shown)) < len(shown):
                self._note(row, f"expected each label once, got {', '.join(shown)[:100]}.")
            indices[row] = []
            for label in dict.fromkeys(shown):
                try:
                    indices[row].append(self.vocabulary.index(label))
                except ValueError as error:
                    separator = self._separator_of_known(label)
                    hint = "" if separator is None else f" Or label_separator: {json.dumps(separator)} in a YAML file?"
                    self._note(row, f"{error}{hint}")
        return indices

    def _separator_of_known(self, text: str) -> str | None:
        """Returns what splits a text into labels of the vocabulary, if anything does."""
        known = set(self.vocabulary)
        return next((s for s in _SEPARATORS if s in text and {part.strip() for part in text.split(s)} <= known), None)

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

    def _number_scenes(self, scene_column: str | None, split_column: str | None) -> dict[int, int]:
        """Returns the scene of each row, with numbers that fall into the splits that are named; notes what is wrong."""
        file_names = self.table.file_names
        wrong = {row for row, _ in self.table.faults}  # a wrong name tells no scene
        scenes = {row: scene_of_file(name) for row, name in enumerate(file_names) if row not in wrong}
        if scene_column is not None:
            scenes = self._parse_each(self.table.read_column(scene_column), _scene_of_cell)
        splits = None if self.table.splits is None else dict(enumerate(self.table.splits))
        if split_column is not None:
            splits = self._parse_each(self.table.read_column(split_column), _split_of_cell)
        if splits is not None:
            # What the set does not name is taken out of its training images.
            places = {split: {split} for split in SPLITS}
            places["train"] = {"train"} | set(SPLITS) - set(splits.values())
            first_rows: dict[int, int] = {}
            scenes = {row: scene for row, scene in scenes.items() if row in splits}
            for row, scene in scenes.items():
                first = first_rows.setdefault(scene, row)
                if splits[first] != splits[row]:
                    self._note(
                        row,
                        f"expected the split of its scene, which in {self._where(first)} is"
                        f" {splits[first]}, got {splits[row]}; write one split for both"
                        + (
                            f", or other values into `{scene_column}`."
                            if scene_column
                            else ", or a column `scene` with another value for each (by default names tell: images of one"
                            " i-CLEVR scene, or of one name but for its suffix, are of one scene)."
                        ),
                    )
            moved = {scene: scene_in_splits(scene, places[splits[row]]) for scene, row in first_rows.items()}
            scenes = {row: moved[scene] for row, scene in scenes.items()}
        return scenes


def _scene_of_cell(cell: Any) -> int:  # noqa: ANN401
    """Returns a scene's number: the number in a cell, as text too, which is all that CSV has; or one made of its text."""
    if isinstance(cell, str) and re.fullmatch(r"0|-?[1-9][0-9]{0,17}", cell):
        cell = int(cell)
    if isinstance(cell, int) and not isinstance(cell, bool) and -(2**63) <= cell < 2**63:
        return cell
    if isinstance(cell, str) and cell:
        return scene_of_text(cell)
    raise ValueError(f"expected the scene's name or number, got {cell!r}.")


def _split_of_cell(cell: Any) -> str:  # noqa: ANN401
    split = split_named(cell) if isinstance(cell, str) else None
    if split is None:
        raise ValueError(f"expected a split, train, validation or held-out (or test), got {cell!r}.")
    return split

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class LabelVocabulary:
    """The label names of a data set in a fixed order: the one place where names, indices and multi-hot rows meet.

    This file is published beside the pipelines, so it stands alone.

    Args:
        names: Distinct, non-empty label names; a name's position is its index.

    Raises:
        ValueError: If `names` is empty, or holds something other than distinct non-empty strings.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if isinstance(names, str) or not all(isinstance(name, str) and name.strip() == name != "" for name in names):
            raise ValueError(
                "`names` must be a list of non-empty strings without spaces around them,"
                f' got {_shorten(names)}; write for example ["red cube", "blue sphere"].'
            )
        repeated = sorted(name for name, count in Counter(names).items() if count > 1)
        if repeated or not names:
            problem = f"{_shorten(repeated)} more than once" if repeated else "no name at all"
            raise ValueError(f"`names` must hold at least one name and each name once, got {problem}; mend the list.")
        self.names: tuple[str, ...] = tuple(names)
        self._index_of = {name: index for index, name in enumerate(self.names)}

    @classmethod
    def from_json(cls, path: str | Path) -> "LabelVocabulary":
        """Reads a file of the form of i-CLEVR's `objects.json`: `{"gray cube": 0, "red cube": 1, ...}`.

        Raises:
            ValueError: If the file does not map names to the indices 0, 1, 2, ... without a gap.
        """
        try:
            pairs = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=list)
        except ValueError as error:  # of the JSON or of its encoding
            raise ValueError(f"{path} must be JSON in UTF-8: {error}.") from error
        is_mapping = isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs)
        index_of = dict(pairs) if is_mapping else pairs
        if is_mapping and len(index_of) != len(pairs):
            names = [name for name, _ in pairs]
            repeated = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"{path} must name each label once, got {_shorten(repeated)} more than once.")
        if not isinstance(index_of, dict) or any(type(index) is not int for index in index_of.values()):
            raise ValueError(
                f'{path} must map label names to whole numbers, as in {{"gray cube": 0, "red cube": 1}},'
                f" got {_shorten(index_of)}."
            )
        if sorted(index_of.values()) != list(range(len(index_of))):
            raise ValueError(
                f"{path} must number its labels 0 to {len(index_of) - 1} without a gap or a repeat,"
                f" got {_shorten(sorted(index_of.values()))}."
            )
        return cls(sorted(index_of, key=index_of.__getitem__))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LabelVocabulary) and self.names == other.names

    def __hash__(self) -> int:
        return hash(self.names)

    def __repr__(self) -> str:
        return f"LabelVocabulary({_shorten(list(self.names))})"

    def index(self, label: str | int) -> int:
        """Gives the index of a label named or numbered.

        Raises:
            ValueError: If there is no such label; an unknown name is answered with the nearest ones.
        """
        if isinstance(label, str):
            if label in self._index_of:
                return self._index_of[label]
            nearest = difflib.get_close_matches(label.strip().lower(), self.names, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(map(repr, nearest))}?" if nearest else f"known: {', '.join(self.names)}."
            )
            if {"and", "or", "not"} & set(label.split()):
                hint += " Commas join the labels of one image; AND and NOT, in capitals, stand between conditions."
            raise ValueError(f"Unknown label {label!r}; {hint}")
        if isinstance(label, (int, np.integer)) and not isinstance(label, bool):
            if 0 <= label < len(self):
                return int(label)
            raise ValueError(
                f"Label indices must lie between 0 and {len(self) - 1}, got {label}; a row of zeros and ones must be a"
                " tensor or an array."
            )
        raise ValueError(f"A label must be a name or an index, got {label!r} of type {type(label).__name__}.")

    def encode(self, class_labels: Any) -> Tensor:  # noqa: ANN401 -- refusing everything else is the point
        """Makes the multi-hot matrix of labels given in any accepted spelling.

        Args:
            class_labels: One of: a list with one inner list of names or indices an image (an empty inner list is an
                empty scene); a matrix (batch, num_classes) as tensor or array with finite entries of at least 0; a
                1-D integer tensor or array with one label index an image.

        Returns:
            A float32 tensor (batch, num_classes) on the CPU, or on the device of a given tensor.

        Raises:
            ValueError: For any other spelling, an unknown or repeated label, or no image at all.
        """
        if isinstance(class_labels, (str, list, tuple)):
            self._refuse_compositions(class_labels)
        if isinstance(class_labels, np.ndarray) and class_labels.dtype.kind not in "biuf":
            raise ValueError(
                f"`class_labels` must hold numbers, got an array of {class_labels.dtype}; give names as lists."
            )
        if isinstance(class_labels, (Tensor, np.ndarray)):
            return self._encode_array(torch.as_tensor(class_labels))
        if isinstance(class_labels, str):
            names = [name.strip() for name in class_labels.split(",")]
            raise ValueError(
                "`class_labels` must be a list with one inner list of labels an image, got the string"
                f" {class_labels!r}; for one image write [{names!r}]."
            )
        if not isinstance(class_labels, (list, tuple)):
            raise ValueError(
                "`class_labels` must be a list with one inner list of labels an image, a tensor or an array,"
                f" got {type(class_labels).__name__}; write for example {[[self.names[0]]]!r}."
            )
        if not class_labels:
            raise ValueError(
                "`class_labels` must ask for at least one image, got an empty list; [[]] asks for one empty scene."
            )
        if not all(isinstance(labels, (list, tuple)) for labels in class_labels):
            stray = next(labels for labels in class_labels if not isinstance(labels, (list, tuple)))
            flat = list(class_labels)
            raise ValueError(
                f"`class_labels` must hold one inner list of labels an image, got {_shorten(stray)} outside of one; for"
                f" one image write {_shorten([flat])}, for an image each {_shorten([[label] for label in flat])}."
            )
        multi_hot = torch.zeros(len(class_labels), len(self))
        for row, labels in enumerate(class_labels):
            try:
                indices = [self.index(label) for label in labels]
            except ValueError as error:
                raise ValueError(f"`class_labels[{row}]`: {error}") from None
            repeated = sorted({self.names[index] for index in indices if indices.count(index) > 1})
            if repeated:
                raise ValueError(
                    f"`class_labels[{row}]` must name a label once, got {_shorten(repeated)} more than once; a row of"
                    " zeros and ones must be a tensor or an array."
                )
            multi_hot[row, indices] = 1.0
        return multi_hot

    def _encode_array(self, class_labels: Tensor) -> Tensor:
        if class_labels.ndim == 1 and not class_labels.is_floating_point() and class_labels.dtype != torch.bool:
            if len(class_labels) == 0 or class_labels.min() < 0 or class_labels.max() >= len(self):
                raise ValueError(
                    f"`class_labels` of one dimension must hold label indices between 0 and {len(self) - 1}, one an"
                    f" image, got {_shorten(class_labels.tolist())}."
                )
            return torch.nn.functional.one_hot(class_labels.long(), len(self)).float()
        if class_labels.ndim != 2 or class_labels.shape[1] != len(self) or len(class_labels) == 0:
            raise ValueError(
                f"`class_labels` must have shape (batch, {len(self)}), or be a 1-D integer tensor with one label an"
                f" image, got {tuple(class_labels.shape)} of {class_labels.dtype}."
            )
        if class_labels.is_complex():
            raise ValueError(f"`class_labels` must hold real numbers, got {class_labels.dtype}.")
        class_labels = class_labels.float()
        if not torch.isfinite(class_labels).all() or (class_labels < 0).any():
            worst = class_labels[~torch.isfinite(class_labels) | (class_labels < 0)][0].item()
            raise ValueError(f"`class_labels` must hold finite entries of at least 0, got {worst}.")
        return class_labels

    def decode(self, class_labels: Tensor | np.ndarray) -> list[list[str]]:
        """Lists the names whose entries are above 0 in each row of a matrix (batch, num_classes)."""
        return [
            [self.names[index] for index in row.nonzero().flatten().tolist()]
            for row in self._encode_array(torch.as_tensor(class_labels))
        ]

    def _refuse_compositions(self, class_labels: str | Sequence[Any]) -> None:
        """Answers AND, NOT and `Condition` better than as labels that nobody knows."""
        entries = [class_labels] if isinstance(class_labels, str) else class_labels
        for entry in entries:
            for part in entry if isinstance(entry, (list, tuple)) else [entry]:
                has_words = isinstance(part, str) and not {"AND", "NOT"}.isdisjoint(part.split())
                is_condition = hasattr(part, "labels") and hasattr(part, "weight")
                if is_condition or (has_words and part not in self._index_of):
                    raise ValueError(
                        f"`class_labels` must ask for one condition an image here, got {_shorten(part)}; only the call"
                        " of a diffusion pipeline sums conditions, given as text or as a list of `Condition` an image."
                        " Labels that an image must show together are a list: [['red cube', 'blue sphere']]."
                    )


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."

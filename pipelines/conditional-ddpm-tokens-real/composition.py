"""Images composed of several conditions: how they are written down, and how predictions are summed."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """One of the conditions that an image is composed of.

    Args:
        labels: Names or indices of the labels that the condition asks for together; none ask for an empty scene.
        weight: How much it counts beside the others, a finite number other than 0; below 0, the image is led away
            from it.

    Raises:
        ValueError: If an argument is not of this form.
    """

    labels: Sequence[str | int]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.labels, (list, tuple)):
            raise ValueError(
                f"`labels` must be a list of label names or indices, got {self.labels!r}; write for example"
                ' Condition(["red cube"]).'
            )
        object.__setattr__(self, "labels", tuple(self.labels))
        is_number = isinstance(self.weight, Real) and not isinstance(self.weight, bool)
        if not is_number or not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(
                f"`weight` must be a finite number other than 0, got {self.weight!r}; leave the condition out if it is"
                " to have no say."
            )


class Composition(NamedTuple):
    """The conditions of some images, all of which have as many of them.

    Args:
        images: Numbers of the images (B,) in what a call asks for.
        class_labels: Multi-hot rows (num_conditions, B, num_classes); no condition leaves an image unconditioned.
        weights: Weights of the conditions (num_conditions, B).
        needs_null: Whether the sum takes the unconditional prediction: unless the weights of each image sum to 1.
    """

    images: Tensor
    class_labels: Tensor
    weights: Tensor
    needs_null: bool

    def of(self, rows: Tensor) -> "Composition":
        """Picks some of the images, by their place in `images`."""
        return Composition(self.images[rows], self.class_labels[:, rows], self.weights[:, rows], self.needs_null)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Composition":
        """Puts what a network and its predictions meet on their device, the rows of labels in the network's dtype."""
        return self._replace(class_labels=self.class_labels.to(device, dtype), weights=self.weights.to(device))

    def rows(self, *, with_null: bool) -> tuple[Tensor, Tensor | None]:
        """Lays the conditions out as rows of one call of a network, condition by condition, unconditional rows last.

        Returns:
            The class labels (num_rows * B, num_classes), and the mask of the unconditional rows, or None without them.
        """
        if not with_null:
            return self.class_labels.flatten(0, 1), None
        num_conditions, num_images, num_classes = self.class_labels.shape
        null_rows = self.class_labels.new_zeros(1, num_images, num_classes)
        null_mask = torch.arange((num_conditions + 1) * num_images, device=null_rows.device)
        return torch.cat([self.class_labels, null_rows]).flatten(0, 1), null_mask >= num_conditions * num_images

    def sum(self, predictions: Tensor) -> Tensor:
        """Sums the predictions of each image, `u + sum_i w_i (c_i - u)`.

        Conjunction and negation of *Compositional Visual Generation with Composable Diffusion Models* (Liu et al., 2022,
        https://arxiv.org/abs/2206.01714) in one formula, with the weights of `Condition`, which guidance multiplies
        afterwards. One condition of weight 1 is left as it is, to the bit.

        Args:
            predictions: The conditional predictions c_i and behind them, where `needs_null`, the unconditional one u:
                float32 (num_conditions or more, B, C, H, W).

        Returns:
            The sums (B, C, H, W).
        """
        weights = self.weights[..., None, None, None]
        composed = (weights * predictions[: len(weights)]).sum(dim=0)
        return composed + (1 - weights.sum(dim=0)) * predictions[-1] if self.needs_null else composed


def parse_prompt(prompt: str) -> list[Condition]:
    """Reads the conditions of one image from text such as `"red cube, blue sphere AND NOT gray cylinder:0.5"`.

    Conditions are joined by `AND`; each holds labels joined by commas, which the image must show together as the
    network learned them. `NOT` before a condition leads the image away from it. A colon and a positive number behind a
    condition are its weight, 1 if there are none. Both words are written in capitals, with spaces around them. Labels
    whose names hold such a word, a comma, or a number behind a colon are given to `Condition` instead.

    Raises:
        ValueError: If the text is not of this form; the labels themselves are not checked.
    """
    if not prompt.strip():
        return [Condition(())]
    conditions = []
    for part in re.split(r"(?<!\S)AND(?!\S)", prompt):
        negation, text = re.fullmatch(r"\s*(NOT(?!\S))?(.*?)\s*", part, flags=re.DOTALL).groups()
        if re.search(r"(?<!\S)NOT(?!\S)", text):
            raise ValueError(
                f"`NOT` must stand once at the start of a condition, got {prompt!r}; write for example"
                ' "red cube AND NOT blue sphere".'
            )
        text, weight = _split_weight(text)
        if not text.strip():
            raise ValueError(
                f"`AND` and `NOT` must have labels beside them, got {prompt!r}; write for example"
                ' "red cube AND NOT blue sphere".'
            )
        conditions.append(Condition([name.strip() for name in text.split(",")], -weight if negation else weight))
    return conditions


def _split_weight(text: str) -> tuple[str, float]:
    labels, colon, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        colon = ""
    if not colon:
        return text, 1.0
    if not 0 < weight < math.inf:
        raise ValueError(
            f"The weight behind a colon must be a positive finite number, got {text.strip()!r}; `NOT` before the"
            " condition makes it negative."
        )
    return labels, weight


def is_composed(class_labels: Any) -> bool:  # noqa: ANN401 -- anything may be asked for
    """Says whether labels are written as text or hold a `Condition`, so that `read_compositions` reads them."""
    if not isinstance(class_labels, (list, tuple)):
        return isinstance(class_labels, (str, Condition))
    return any(isinstance(entry, (str, Condition)) or _conditions_in(entry) for entry in class_labels)


def _conditions_in(entry: Any) -> int:  # noqa: ANN401 -- anything may be asked for
    return sum(isinstance(part, Condition) for part in entry) if isinstance(entry, (list, tuple)) else 0


def read_compositions(
    class_labels: str | Sequence[str | Sequence[Condition | str | int]], encode: Callable[[list[Any]], Tensor]
) -> list[Composition]:
    """Reads what each image is composed of, and puts images that are computed alike together.

    Args:
        class_labels: The text of one image as for `parse_prompt`, or a list with one entry an image: text, a list of
            conditions, or a list of labels, which is one condition.
        encode: Makes the multi-hot matrix (1, num_classes) of `[labels]`.

    Raises:
        ValueError: If an entry is none of these, or its labels do not fit.
    """
    entries = class_labels if isinstance(class_labels, (list, tuple)) else [class_labels]
    groups: dict[tuple[int, bool], list[tuple[int, Tensor, list[float]]]] = {}
    for number, entry in enumerate(entries):
        try:
            conditions = _read_entry(entry)
            rows = torch.cat([encode([list(condition.labels)]) for condition in conditions])
        except ValueError as error:
            message, of_this = str(error), f"`class_labels[{number}]`"
            if message.startswith("`class_labels[0]`"):  # of the list of one that was encoded
                raise ValueError(message.replace("`class_labels[0]`", of_this, 1)) from None
            raise ValueError(f"{of_this}: {message}") from None
        weights = [float(condition.weight) for condition in conditions]
        group = groups.setdefault((len(conditions), math.fsum(weights) != 1), [])
        group.append((number, rows, weights))
    compositions = []
    for (_, needs_null), group in groups.items():
        numbers, rows, weights = zip(*group, strict=True)
        compositions.append(
            Composition(torch.tensor(numbers), torch.stack(rows, dim=1), torch.tensor(weights).T, needs_null)
        )
    return compositions


def _read_entry(entry: Any) -> list[Condition]:  # noqa: ANN401 -- refusing everything else is the point
    if isinstance(entry, str):
        return parse_prompt(entry)
    if not isinstance(entry, (list, tuple)):
        raise ValueError(
            f"an image must be text, a list of conditions or a list of labels, got {entry!r}; for one image write"
            " [[Condition(...), Condition(...)]]."
        )
    if _conditions_in(entry) == 0:
        return [Condition(entry)]
    if _conditions_in(entry) != len(entry):
        stray = next(part for part in entry if not isinstance(part, Condition))
        raise ValueError(f"labels must not stand beside conditions, got {stray!r}; write Condition([{stray!r}]).")
    return list(entry)

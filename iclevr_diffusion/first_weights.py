import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from torch import Tensor

from iclevr_diffusion.files import read_json
from iclevr_diffusion.loading import find_folder, load_model

_OTHER_NETWORK = (
    "give other weights, or train the network that these are of (`network` or `model`, where a script has it)"
)


class LabelChange(NamedTuple):
    """What became of the labels of weights that went to a model with other labels.

    Args:
        kept: Labels that both have.
        new: Those that only the model has.
        dropped: Those that only the weights had.
    """

    kept: list[str]
    new: list[str]
    dropped: list[str]

    def __str__(self) -> str:
        def some(names: list[str]) -> str:
            return f"{len(names)}" + (f" ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})" if names else "")

        return f"{some(self.kept)} labels kept, {some(self.new)} new, {some(self.dropped)} dropped"


def load_weights(
    model: ModelMixin, source: str | Path, label_names: Sequence[str] | None = None, *, other_labels: bool = False
) -> LabelChange | None:
    """Puts the weights of another model of the same architecture, or of a pipeline's, into `model`.

    With `other_labels` the two may know different labels. The network is kept; what belongs to a label that both have
    goes with its name; what belongs to a new one starts as the mean of all labels that the weights knew, as in
    *Initializing New Word Embeddings for Pretrained Language Models* (Hewitt, 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html). Buffers of other images' height and width, as the mean image
    is one, stay the model's own.

    Args:
        model: The model.
        source: Folder of a model of this class, or folder, hub's `owner/name` or name in this package of a pipeline that
            has one.
        label_names: Names of the model's labels in their order; `None` takes those of a pipeline as they are.
        other_labels: Whether `source` may have other labels, or the same in another order.

    Returns:
        What became of the labels, where they differ.

    Raises:
        ValueError: If the source holds no such model, or one of other shapes, labels or channels, or one that predicts or
            puts out something else.
    """
    folder, theirs = _find_model(model, source)
    other = load_model(type(model), folder, torch.float32)
    if theirs is None:
        theirs = other.config.get("label_names")
    if other.config.get("prediction_type") != model.config.get("prediction_type"):
        raise ValueError(
            f"`source` {source} must hold a model that predicts {model.config.prediction_type!r}, got"
            f" {other.config.prediction_type!r}; train with its `prediction_type`."
        )
    for name in ("in_channels", "out_channels"):
        if other.config.get(name) != model.config.get(name):
            raise ValueError(
                f"`source` {source} must hold a model for images of as many channels as the data's,"
                f" {model.config[name]}, got one for {other.config[name]}; give it such images, or train from nothing."
            )
    ours = None if label_names is None else list(label_names)
    differ = ours is not None and theirs is not None and list(theirs) != ours
    if differ and not other_labels:
        raise ValueError(
            f"`source` {source} must hold a model for the {len(ours)} labels of the data, in their order,"
            f" got one for {len(theirs)}: {', '.join(theirs)[:200]}."
        )
    weights, change = other.state_dict(), None
    if differ:
        known = set(theirs)
        change = LabelChange(
            kept=[name for name in ours if name in known],
            new=[name for name in ours if name not in known],
            dropped=[name for name in theirs if name not in set(ours)],
        )
        for name, dim in _label_dimensions(other).items():
            weights[name] = _relabel(weights[name], dim, list(theirs), ours)
    own = model.state_dict()
    for name, _ in model.named_buffers():
        if name in weights and name in own and weights[name].shape[:1] == own[name].shape[:1]:
            weights[name] = weights[name] if weights[name].shape == own[name].shape else own[name]
    shapes, others = ({name: tuple(value.shape) for name, value in state.items()} for state in (own, weights))
    differing = [name for name in {**shapes, **others} if shapes.get(name) != others.get(name)]
    if differing:
        own_fields = {"num_classes", "label_names"} if differ else set()  # which `_relabel` has settled
        fields = {name: (_as_json(other.config.get(name)), _as_json(value)) for name, value in model.config.items()}
        settings = "; ".join(
            f"{name}: {before} there, {here} here"
            for name, (before, here) in fields.items()
            if name[0] != "_" and name not in own_fields and before != here
        )
        settings = f"its configuration has {settings}, and" if settings else "of its weights"
        shown = ", ".join(f"{name} {others.get(name)} there, {shapes.get(name)} here" for name in differing[:3])
        unnamed = "" if theirs is not None else " A pipeline's folder, unlike a network's, also names the labels."
        raise ValueError(
            f"`source` {source} must hold a model of the same architecture, but {settings} {len(differing)} tensors"
            f" differ: {shown}. Train with the settings that are in its config.json.{unnamed}"
        )
    if other.config.get("network_output") != model.config.get("network_output"):
        raise ValueError(
            f"`source` {source} must hold a model whose network puts out the {model.config.network_output}, got one that"
            f" puts out the {other.config.network_output}; train with its `network_output`."
        )
    model.load_state_dict(weights)
    return change


def _as_json(value: Any) -> str:  # noqa: ANN401 -- any JSON
    """Writes a field of a configuration, in which a list that was read stands for a tuple."""
    return json.dumps(value, sort_keys=True, default=str)


def _find_model(model: ModelMixin, source: str | Path) -> tuple[Path, list[str] | None]:
    """Finds the folder of a model of the same class, and the names of the labels where a pipeline gives them."""
    folder, kind, label_names = find_folder(source), type(model).__name__, None
    if (folder / "model_index.json").exists():
        index = read_json(folder / "model_index.json")
        names = index.get("label_names") or {}
        label_names = [names[str(i)] for i in range(len(names))]  # the file has them in the order 0, 1, 10, 11, ...
        parts = {name: entry[-1] for name, entry in index.items() if isinstance(entry, list) and name[0] != "_"}
        parts = {name: part for name, part in parts.items() if part is not None and name != "guide"}  # a worse network
        if kind not in parts.values():
            raise ValueError(
                f"`source` {source} must hold a {kind}, got a pipeline of {', '.join(parts.values())}; {_OTHER_NETWORK}."
            )
        folder = folder / next(name for name, part in parts.items() if part == kind)
    if not (folder / "config.json").exists():
        raise ValueError(f"`source` must be a pipeline's or a model's, got {source}, which has no config.json.")
    found = read_json(folder / "config.json").get("_class_name")
    if found != kind:
        raise ValueError(f"`source` {source} must hold a {kind}, got a {found}; {_OTHER_NETWORK}.")
    return folder, label_names


def _label_dimensions(model: ModelMixin) -> dict[str, int]:
    """Finds the dimension of each weight that has an entry a label: the one that would grow with another label."""
    arguments = {name: value for name, value in model.config.items() if not name.startswith("_")}
    arguments |= {"num_classes": model.config.num_classes + 1} | (
        {"label_names": None} if "label_names" in arguments else {}
    )
    with torch.device("meta"):
        wider = type(model)(**arguments).state_dict()
    dimensions = {}
    for name, value in model.state_dict().items():
        grown = [dim for dim, size in enumerate(value.shape) if wider[name].shape[dim] != size]
        if grown:
            (dimensions[name],) = grown
    return dimensions


def _relabel(value: Tensor, dim: int, theirs: list[str], ours: list[str]) -> Tensor:
    """Puts the entries of labels, the last ones along `dim`, into the order of other labels; new ones are their mean."""
    before, entries = value.split([value.shape[dim] - len(theirs), len(theirs)], dim)
    if not theirs:
        raise ValueError("`source` must hold a model that knows labels, got one without.")
    place = {name: i for i, name in enumerate(theirs)}
    mean = entries.mean(dim, keepdim=True)
    rows = [entries.narrow(dim, place[name], 1) if name in place else mean for name in ours]
    return torch.cat([before, *rows], dim)

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

LearningRateSchedule = Literal["constant", "linear", "cosine", "warmup-stable-decay", "milestones"]


def option(default: Any, help: str, *, may_change: bool = False) -> Any:  # noqa: ANN401
    """Returns a field of a configuration with the words of its flag.

    Args:
        default: The value where neither recipe nor command line gives one.
        help: One line for `--help`.
        may_change: Whether a resumed run may differ in it, because it leaves the trained weights as they are.
    """
    return field(default=default, metadata={"help": help, "may_change": may_change})


@dataclass(kw_only=True)
class TrainConfig:
    """What every training run is told; a script derives its own from it."""

    output_dir: str = option("outputs", "folder of everything that the run writes", may_change=True)
    seed: int = option(0, "decides initial weights, data order, noise")
    max_steps: int = option(
        2000,
        "optimisation steps; a resumed run may have others, and another schedule, where the learning rate so far agrees",
    )
    max_minutes: float | None = option(
        None,
        "minutes after which a run ends early, those before it was resumed counted in; none is no limit",
        may_change=True,
    )
    batch_size: int = option(64, "images a process and micro-step")
    gradient_accumulation_steps: int = option(1, "micro-steps whose gradients are averaged for one optimisation step")
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "no",
        "precision of the forward pass; weights stay float32, and bf16 is float32 where the device only emulates it",
    )
    max_grad_norm: float | None = option(1.0, "gradients longer than this are scaled down to it; none leaves them")
    learning_rate: float = option(1e-4, "learning rate after the warm-up")
    lr_schedule: LearningRateSchedule = option("constant", "course of the learning rate after the warm-up")
    warmup_steps: int = option(0, "steps over which the learning rate rises")
    decay_fraction: float = option(0.2, "last part of warmup-stable-decay, in which the learning rate falls to 0")
    milestones: tuple[int, ...] = option(
        (), "steps from which on the learning rate of `milestones` is a tenth as high"
    )
    log_every: int = option(50, "steps between lines of metrics.jsonl, which hold their means", may_change=True)
    save_every: int = option(1000, "steps between checkpoints; 0 saves at the end alone", may_change=True)
    num_checkpoints: int = option(2, "newest checkpoints to keep", may_change=True)
    report_to: tuple[str, ...] = option((), "trackers of Accelerate, such as tensorboard or wandb", may_change=True)

    def __post_init__(self) -> None:
        positive = ("max_steps", "batch_size", "gradient_accumulation_steps", "log_every", "num_checkpoints")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in vars(self):
            if (name.endswith("_every") or name == "warmup_steps") and getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` must lie in [0, 2**32 - 1], got {self.seed}.")
        for name in ("max_minutes", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive or none, got {value}.")
        if (self.lr_schedule == "milestones") != bool(self.milestones):
            raise ValueError(
                f"`milestones` must name steps for the schedule `milestones`, and none for another, got"
                f" {list(self.milestones)} for {self.lr_schedule}."
            )
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"`decay_fraction` must lie in [0, 1], got {self.decay_fraction}.")

    def learning_rate_factor(self, step: int) -> float:
        """Returns what the learning rate is multiplied by when `step` optimisation steps are done.

        The rise reaches 1 at the last of `warmup_steps`. `warmup-stable-decay` stays there until its last
        `decay_fraction` of `max_steps`, as in *MiniCPM: Unveiling the Potential of Small Language Models with Scalable
        Training Strategies* (Hu et al., 2024, https://arxiv.org/abs/2404.06395), with a straight decay.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.lr_schedule == "milestones":
            return 0.1 ** sum(step >= milestone for milestone in self.milestones)
        start = self.warmup_steps
        if self.lr_schedule == "warmup-stable-decay":
            start = max(start, self.max_steps - round(self.decay_fraction * self.max_steps))
        if self.lr_schedule == "constant" or step < start:
            return 1.0
        remaining = max(0.0, (self.max_steps - step) / max(1, self.max_steps - start))
        return (1 - math.cos(math.pi * remaining)) / 2 if self.lr_schedule == "cosine" else remaining


Config = TypeVar("Config", bound=TrainConfig)


def parse_config(config_class: type[Config], arguments: Sequence[str] | None = None) -> Config:
    """Makes a configuration from `--config recipe.yaml`, if given, and then the flags, which are its fields' names.

    Args:
        config_class: A dataclass derived from `TrainConfig`.
        arguments: The command line without the program's name; `None` is this process's.

    Raises:
        SystemExit: With the reason on standard error, if a flag, a key of the recipe or a value is wrong.
    """
    fields = {item.name: item for item in dataclasses.fields(config_class)}
    kinds = typing.get_type_hints(config_class)
    parser = argparse.ArgumentParser(description=config_class.__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="recipe.yaml", help="file of fields; flags go before it")
    for name, item in fields.items():
        origins = [typing.get_origin(kind) for kind in (kinds[name], *typing.get_args(kinds[name]))]
        several = {"nargs": "*"} if tuple in origins else {}
        alone = {"nargs": "?", "const": True} if kinds[name] is bool else {}
        text = f"{item.metadata.get('help', '')} ({_type_name(kinds[name])}; default {item.default})".replace(
            "%", "%%"
        )
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar="...", help=text, **several, **alone)
    given = vars(parser.parse_args(arguments))
    recipe = given.pop("config")
    try:
        values = {} if recipe is None else _read_recipe(recipe, fields)
        return config_class(
            **{name: _convert(name, value, kinds[name]) for name, value in {**values, **given}.items()}
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _read_recipe(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be a YAML file of fields and values: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one field and its value a line, got a {type(values).__name__}.")
    for key in values:
        if key not in fields:
            nearest = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{path}: unknown field {key!r}.{hint} The known ones are {', '.join(fields)}.")
    return values


def _convert(name: str, value: Any, kind: Any) -> Any:  # noqa: ANN401
    """Makes a value of YAML or the command line one of the field's type, or says what was expected."""
    fault = ValueError(f"`{name}` must be {_type_name(kind)}, got {value!r}.")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value in (None, "none", "null", ["none"], ["null"]):
            return None
        (kind,) = [argument for argument in arguments if argument is not types.NoneType]
        return _convert(name, value, kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise fault
        return tuple(_convert(name, item, arguments[0]) for item in value)
    if origin is Literal:
        value = (
            {False: "no"}.get(value, value) if isinstance(value, bool) else value
        )  # YAML reads a bare `no` as false
        if value not in arguments:
            raise fault
        return value
    if kind is bool:
        choices = {"true": True, "false": False}
        if str(value).lower() not in choices:
            raise fault
        return choices[str(value).lower()]
    if kind is str:
        if not isinstance(value, str):
            raise fault
        return value
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        raise fault
    try:
        return kind(value)  # also of text: YAML takes 1e-4 for a string
    except (TypeError, ValueError):
        raise fault from None


def _type_name(kind: Any) -> str:  # noqa: ANN401
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if argument is types.NoneType else _type_name(argument) for argument in arguments)
    if origin is tuple:
        return f"a list of {_type_name(arguments[0])}"
    if origin is Literal:
        return " or ".join(map(str, arguments))
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]

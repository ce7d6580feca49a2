import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline


def request_text(request: str | Sequence[str]) -> str:
    """Writes what one image was asked for, text or labels, on one line: `red cube, blue sphere AND NOT gray cube`."""
    return request if isinstance(request, str) else ", ".join(request)


def request_lines(request: str | Sequence[str]) -> str:
    """Writes what one image was asked for as a caption, with a label or a condition on each line."""
    return re.sub(r"\s+AND(?!\S)", "\nAND", request) if isinstance(request, str) else "\n".join(request)


def takes(pipeline: DiffusionPipeline, name: str) -> bool:
    """Says whether the call of a pipeline of this kind has an argument of this name."""
    return name in inspect.signature(type(pipeline).__call__).parameters


def call_options(pipeline: DiffusionPipeline, options: Mapping[str, Any]) -> dict[str, Any]:
    """Completes arguments of a pipeline's call by those for which it has a default of its own, `default_<name>`.

    Args:
        pipeline: A pipeline of any kind.
        options: Arguments by name; None is as good as none.

    Raises:
        ValueError: If this kind of pipeline has no such argument.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := [name for name in given if not takes(pipeline, name)]:
        raise ValueError(
            f"`options` must be arguments of {type(pipeline).__name__}'s call, got {', '.join(unknown)}; leave out what"
            " this kind of pipeline does not have."
        )
    own = {
        name.removeprefix("default_"): value
        for name, value in pipeline.config.items()
        if name.startswith("default_") and takes(pipeline, name.removeprefix("default_"))
    }
    return own | given

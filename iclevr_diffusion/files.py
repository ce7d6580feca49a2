import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file that is whole or as it was before: beside its place, and then moved there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    os.replace(unfinished, path)


def parse_json(file: Path) -> Any:  # noqa: ANN401 -- any JSON
    """Reads a JSON file that may come from a stranger.

    Raises:
        ValueError: If it is none.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of the JSON, its encoding or its depth
        raise ValueError(f"{file} must be JSON: {error}.") from error


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object, as `parse_json` does.

    Raises:
        ValueError: If the file is no JSON, or holds something else.
    """
    content = parse_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}.")
    return content


def run_name(path: str | PurePath) -> str:
    """Names what a path leads to by its last part, or by the run's folder where every run calls that part alike.

    The pipeline of another average, `run/pipeline-0.05`, is `run-0.05`.
    """
    path = PurePath(path)
    alike = re.fullmatch(r"(?:pipeline|best_pipeline|judge)|pipeline(-\d[\d.e-]*)", path.name)
    return f"{path.parent.name}{alike[1] or ''}" if alike and path.parent.name else path.name


def judge_name(path: str | PurePath) -> str:
    """Names a judge, which may also be the course's checkpoint."""
    return run_name(path).removesuffix(".pth")


def is_unwritable(error: OSError) -> bool:
    """Whether nothing could be written because of whose, on what, or how full a folder is, or because it has no locks."""
    names = ("EROFS", "ENOSPC", "EDQUOT", "ENOLCK")  # not all of which every system has
    numbers = {getattr(errno, name) for name in names if hasattr(errno, name)}
    return isinstance(error, PermissionError) or error.errno in numbers


@contextmanager
def writing_to_cache(what: str, folder: Path) -> Iterator[None]:
    """Has an error of writing into a folder of the cache say what to do about it.

    Raises:
        PermissionError: If the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if not is_unwritable(error):
            raise
        raise PermissionError(
            f"Cannot write {what} into `{folder}` ({error}); give another `cache_dir` or set the environment variable"
            " ICLEVR_CACHE."
        ) from error


def cache_folder(cache_dir: str | Path | None) -> Path:
    """Returns where what can be made again lies: `cache_dir`, else ICLEVR_CACHE, else a folder in the user's cache."""
    cache_dir = cache_dir or os.environ.get("ICLEVR_CACHE")
    if cache_dir:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "iclevr_diffusion"

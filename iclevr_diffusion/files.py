import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file that is whole or as it was before: beside its place, and then moved there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    os.replace(unfinished, path)

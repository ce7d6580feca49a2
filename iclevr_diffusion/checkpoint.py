import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"


class Stateful(Protocol):
    """Anything that hands out and takes back its state: modules, optimizers, schedulers, averages."""

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:  # noqa: ANN401, D102
        ...


def save_checkpoint(
    root: str | Path, step: int, objects: Mapping[str, Stateful], facts: Mapping[str, Any], *, num_kept: int = 2
) -> Path:
    """Writes `root/step-00000000` whole or not at all, and only then removes older checkpoints.

    Every object becomes `<name>.safetensors` (its tensors) and `<name>.json` (all else), so that nothing in a
    checkpoint can run code when it is read. The files are written into a staging folder and synced to the disk; the
    manifest with their hashes comes last, and one rename puts the folder in its place.

    Args:
        root: Folder of the run's checkpoints.
        step: Number of optimisation steps done.
        objects: What to save, by name.
        facts: What must be known beside the states; plain JSON.
        num_kept: Checkpoints to keep, this one included.

    Returns:
        The checkpoint's folder.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".*-step-*"):  # of a run that was killed while it saved
        shutil.rmtree(leftover)
    folder = root / f"step-{step:08d}"
    staging = root / f".staging-{folder.name}"
    staging.mkdir()
    for name, value in objects.items():
        tensors: dict[str, Tensor] = {}
        tree = _pack(value.state_dict(), tensors, path=())
        if tensors:
            save_file(tensors, staging / f"{name}.safetensors")
        (staging / f"{name}.json").write_text(json.dumps(tree) + "\n")
    files = {path.name: _digest(path) for path in sorted(staging.iterdir())}
    manifest = {"step": step, "facts": dict(facts), "objects": list(objects), "files": files}
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in [*staging.iterdir(), staging]:
        _sync(path)

    replaced = root / f".replaced-{folder.name}"
    if folder.exists():  # a broken one that the run has gone back behind
        os.replace(folder, replaced)
    os.replace(staging, folder)
    _sync(root)
    shutil.rmtree(replaced, ignore_errors=True)
    older = [path for path in _folders(root) if _step_of(path) <= step]
    for path in older[num_kept:]:
        shutil.rmtree(path)
    return folder


def newest_checkpoint(root: str | Path) -> Path | None:
    """Returns the newest checkpoint whose files all have the hashes of its manifest, or `None`.

    Broken ones are passed over with a warning that names them and what is wrong.
    """
    for folder in _folders(Path(root)):
        fault = _fault(folder)
        if fault is None:
            return folder
        warnings.warn(f"The checkpoint {folder} is broken ({fault}); looking for an older one.", stacklevel=2)
    return None


def load_checkpoint(
    folder: str | Path, objects: Mapping[str, Stateful], optional: Collection[str] = ()
) -> dict[str, Any]:
    """Puts the states of a checkpoint that `newest_checkpoint` found into `objects`.

    Args:
        folder: The checkpoint.
        objects: What takes the states, by name.
        optional: Names that either side may lack.

    Returns:
        The `facts` that were saved with it.

    Raises:
        ValueError: If the checkpoint holds other objects than these.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if (set(manifest["objects"]) ^ set(objects)) - set(optional):
        raise ValueError(
            f"`objects` must be those of the checkpoint {folder}: {sorted(manifest['objects'])}, got {sorted(objects)};"
            " resume with the script that wrote it, or train into another folder."
        )
    for name, value in objects.items():
        if name not in manifest["objects"]:
            continue
        path = folder / f"{name}.safetensors"
        # What `load_file` gives are parts of a mapped file, which an optimizer keeps, and which Windows and network file
        # systems do not let go while they are mapped.
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()} if path.exists() else {}
        value.load_state_dict(_unpack(json.loads((folder / f"{name}.json").read_text()), tensors))
    return manifest["facts"]


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Returns a checkpoint's `step`, `facts`, names of `objects` and hashes of `files`."""
    return json.loads((Path(folder) / MANIFEST).read_text())


def _folders(root: Path) -> list[Path]:
    folders = [path for path in root.glob("step-*") if path.is_dir() and path.name.removeprefix("step-").isdecimal()]
    return sorted(folders, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _fault(folder: Path) -> str | None:
    try:
        manifest = read_manifest(folder)
        if manifest["step"] != _step_of(folder):
            return f"{MANIFEST} is of step {manifest['step']}"
        for name, digest in manifest["files"].items():
            if _digest(folder / name) != digest:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is unreadable"
    return None


def _pack(value: Any, tensors: dict[str, Tensor], path: tuple[str, ...]) -> Any:  # noqa: ANN401
    """Returns `value` as JSON that `_unpack` turns back, and puts its tensors into `tensors`."""
    if isinstance(value, Tensor):
        key = "/".join(path)
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()  # a copy, as tied weights share memory
        return {"tensor": key}
    if isinstance(value, Mapping):  # as pairs: optimizers number their parameters, and JSON keys are strings
        return {"pairs": [[key, _pack(item, tensors, (*path, str(key)))] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(item, tensors, (*path, str(i))) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"A checkpoint holds tensors, numbers, strings, None and dicts, lists and tuples of them; {'/'.join(path)} is"
        f" a {type(value).__name__}."
    )


def _unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "pairs":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders, and its renames need no sync
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs what it may write
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

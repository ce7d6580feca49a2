import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from iclevr_diffusion.environment import num_processors
from iclevr_diffusion.labels import ASSETS
from iclevr_diffusion.rendering.sampling import MAX_OBJECTS, sample_scene
from iclevr_diffusion.rendering.tracer import render_sequence, visible_pixels

# Part of a folder's configuration: raise it with every change that alters a pixel, so that no folder mixes two looks.
LOOK = 1

# Scenes that a process takes at a time, and those for which it pays to start another one, which takes some seconds.
SCENES_A_TASK = 16
MIN_SCENES_A_PROCESS = 800


def render_dataset(
    root: str | Path,
    num_scenes: int,
    *,
    size: int = 64,
    seed: int = 0,
    num_workers: int | None = None,
    min_objects: int = 1,
    max_objects: int = 3,
    all_triples: bool = False,
    progress: bool = True,
) -> Path:
    """Draws scenes from nothing into a folder in i-CLEVR's layout.

    A scene gives one image for each number of objects from `min_objects` to `max_objects`, under one camera and the
    same lights, each with one object more. The folder gets `iclevr/CLEVR_train_<scene>_<image>.png`, `train.json`
    (file name to labels), `objects.json`, `test.json`, `new_test.json`, `scenes.jsonl` (a line a scene: camera, lights,
    objects with place and rotation, and for each image how many of its pixels each object covers) and `rendering.json`
    (the arguments). A scene depends on `seed` and its own number alone.

    Called again after an interruption it draws the images that are missing. The lists are written when all images are
    there, `train.json` last: a folder that holds it is whole.

    Args:
        root: The folder, made if it is not there.
        num_scenes: Number of scenes.
        size: Height and width of the images in pixels.
        seed: Seed of the whole data set.
        num_workers: Processes that draw; by default as many as there are processors, and one for each 800 scenes at
            most. They are spawned: a script must call this under `if __name__ == "__main__":`, unless `num_workers` is 1.
        min_objects: Number of objects in a scene's first image.
        max_objects: Number of objects in its last image, at most 5.
        all_triples: Whether the first three labels of a scene may form a set that i-CLEVR's training images lack.
        progress: Whether to show a progress bar.

    Returns:
        `root` as a path.

    Raises:
        ValueError: If an argument is out of range, or the folder was begun with other arguments.
        RuntimeError: If a process that draws ends before its time.
    """
    for name, value, least in (("num_scenes", num_scenes, 1), ("size", size, 4), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"`num_workers` must be at least 1, or None for all processors, got {num_workers}.")
    if not 0 <= min_objects <= max_objects <= MAX_OBJECTS:
        raise ValueError(
            f"`min_objects` and `max_objects` must rise from 0 to at most {MAX_OBJECTS},"
            f" got {min_objects} and {max_objects}."
        )
    root = Path(root)
    image_folder = root / "iclevr"
    config = {
        "look": LOOK,
        "num_scenes": num_scenes,
        "size": size,
        "seed": seed,
        "min_objects": min_objects,
        "max_objects": max_objects,
        "all_triples": all_triples,
    }
    _claim(root, config)
    image_folder.mkdir(exist_ok=True)
    present = {path.name for path in image_folder.glob("*.png")}
    missing = [scene for scene in range(num_scenes) if not present.issuperset(_file_names(scene, config))]
    if not missing and (root / "train.json").exists():
        return root

    if num_workers is None:
        num_workers = min(num_processors(), 1 + len(missing) // MIN_SCENES_A_PROCESS)
    records = []
    with _workers(num_workers) as parallel_map, tqdm(total=num_scenes, disable=not progress, unit="scene") as bar:
        for record in parallel_map(partial(_render_one, image_folder, config), range(num_scenes)):
            records.append(record)
            bar.update()

    with _replacing(root / "scenes.jsonl") as path:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    for name in ("objects.json", "test.json", "new_test.json"):
        with _replacing(root / name) as path:
            path.write_bytes((ASSETS / name).read_bytes())
    labels = {
        image["file_name"]: [f"{entry['color']} {entry['shape']}" for entry in record["objects"][:count]]
        for record in records
        for count, image in enumerate(record["images"], start=min_objects)
    }
    with _replacing(root / "train.json") as path:
        path.write_text(json.dumps(labels), encoding="utf-8")
    return root


def _claim(root: Path, config: dict[str, int | bool]) -> None:
    """Writes the configuration into a new folder; refuses a folder that holds anything else."""
    path = root / "rendering.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        differences = [
            f"{key} {found.get(key)!r} there, {config.get(key)!r} here"
            for key in sorted(found.keys() | config.keys())
            if found.get(key) != config.get(key)
        ]
        if differences:
            raise ValueError(
                f"{root} was begun with other arguments ({'; '.join(differences)}); use the same ones to go on, or"
                " another folder."
            )
    elif root.exists() and any(path.name != ".DS_Store" for path in root.iterdir()):
        raise ValueError(f"{root} holds files that were not rendered here; give an empty or a new folder.")
    else:
        root.mkdir(parents=True, exist_ok=True)
        with _replacing(path) as unfinished:
            unfinished.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _file_names(scene: int, config: dict[str, int | bool]) -> list[str]:
    return [
        f"CLEVR_train_{scene:06d}_{index}.png" for index in range(config["max_objects"] - config["min_objects"] + 1)
    ]


def _render_one(image_folder: Path, config: dict[str, int | bool], number: int) -> dict:
    """Draws the images of one scene unless they are all there, and returns its line of `scenes.jsonl`."""
    scene = sample_scene((config["seed"], number), config["max_objects"], all_triples=config["all_triples"])
    counts = range(config["min_objects"], config["max_objects"] + 1)
    paths = [image_folder / name for name in _file_names(number, config)]
    if not all(path.exists() for path in paths):
        for path, pixels in zip(paths, render_sequence(scene, counts, config["size"]), strict=True):
            with _replacing(path) as unfinished:
                Image.fromarray(pixels).save(unfinished, format="PNG")
    return {
        "scene": number,
        "camera": scene.camera,
        "lights": scene.lights,
        "objects": [asdict(object_) for object_ in scene.objects],
        "images": [
            {"file_name": path.name, "visible_pixels": visible_pixels(scene, count, config["size"])}
            for path, count in zip(paths, counts, strict=True)
        ],
    }


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to and moves what was written to `path`, which thus is whole or not there at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    yield unfinished
    os.replace(unfinished, path)


@contextmanager
def _workers(num_workers: int) -> Iterator[Callable[..., Iterator[dict]]]:
    """Gives a `map` that keeps the order and runs on several processes, or on this one if there is to be only one."""
    if num_workers == 1:
        yield map
        return
    # Several threads in each of several processes would wait for each other. A child takes its environment from here.
    limits = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in limits}
    os.environ.update(limits)
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker)
    try:
        yield partial(pool.map, chunksize=SCENES_A_TASK)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "A process that draws has ended before its time. A script must call `render_dataset` under `if __name__ =="
            " '__main__':`, since each process reads the script again, or with `num_workers=1`. Otherwise memory may"
            " have run out; fewer `num_workers` take less."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent, and ends with it: nothing else would tell a worker that the parent was killed."""

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()

import hashlib
import re
from collections.abc import Collection
from itertools import chain, count
from pathlib import PurePosixPath
from typing import Literal

Split = Literal["train", "validation", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "validation", "held-out")

# What others call the parts of a set, as `datasets` knows them by, and ours.
_NAMES_OF_SPLITS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "held-out", "held_out"), "held-out"),
}
_SCENE_PATTERN = re.compile(r"CLEVR_train_(\d{1,18})_\d+")


def scene_of_file(file_name: str) -> int:
    """Returns the number of the scene that an image shows.

    `CLEVR_train_<scene>_<k>.png` is image k of a scene that grows by one object an image, so such images share most of
    their pixels. A file of any other name is a scene of its own: its number is negative and a hash of the name without
    the suffix, so that the same file always falls into the same split.
    """
    match = _SCENE_PATTERN.fullmatch(PurePosixPath(file_name).stem)
    if match:
        return int(match.group(1))
    return scene_of_text(str(PurePosixPath(file_name).with_suffix("")))


def scene_of_text(text: str) -> int:
    """Returns the number of a scene that has a name instead: negative, and the same for the same text."""
    digest = hashlib.sha256(text.encode()).digest()
    return -1 - (int.from_bytes(digest[:8], "big") >> 2)  # 62 bits: fits an int64


def split_of_scene(scene: int) -> Split:
    """Returns the split of a scene: 90 % train, 5 % validation and 5 % held-out.

    The split depends on nothing but the scene's number, so it is the same for every data set, resolution, process and
    run, and all images of a scene are in one split.
    """
    digest = hashlib.sha256(f"scene {scene}".encode()).digest()
    percent = int.from_bytes(digest[:8], "big") * 100 >> 64
    if percent < 90:
        return "train"
    return "validation" if percent < 95 else "held-out"


def split_named(name: str) -> Split | None:
    """Returns the split that a split, a folder or a file such as `train-00000-of-00002` is called after, if any.

    Ours are `train`, `validation` and `held-out`; others call the last one `test`.
    """
    words = re.match(r"held[-_]out|[a-z]*", name.strip().lower())
    return _NAMES_OF_SPLITS.get(words.group())


def scene_in_splits(scene: int, splits: Collection[Split]) -> int:
    """Returns a scene's number where it falls into one of `splits`, else one made of it that does.

    So images whose owner says which split they belong to need nothing but their scene's number to be found in it.
    """
    candidates = chain([scene], (scene_of_text(f"{scene} {i}") for i in count()))
    return next(candidate for candidate in candidates if split_of_scene(candidate) in splits)

import hashlib
import re
from pathlib import PurePosixPath
from typing import Literal

Split = Literal["train", "validation", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "validation", "held-out")

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
    digest = hashlib.sha256(str(PurePosixPath(file_name).with_suffix("")).encode()).digest()
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

"""`python -m iclevr_diffusion.digit_pairs`: writes pairs of handwritten digits as an image folder of the usual layout.

It stands for a set of one's own: image files, and beside them a `metadata.jsonl` with the labels of each.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from iclevr_diffusion.data import SPLITS, load_digits, split_of_scene
from iclevr_diffusion.files import write_text

SIDE = 32  # of the images, in pixels
DIGIT_SIDE = 16


def write_digit_pairs(folder: str | Path, num_images: int = 3000, *, seed: int = 0) -> Path:
    """Writes grey images of two digits side by side, labelled by both: `["tens 3", "units 7"]`.

    The digits are the 1,797 that come with scikit-learn. Each belongs to one split, and a pair is made of two of the
    same, so that what is held out is written by other strokes than what is trained on.

    Args:
        folder: Where to write; files of the same names in it are overwritten.
        num_images: Number of images; nine tenths are of the train split.
        seed: Decides which digits meet.

    Returns:
        The folder.

    Raises:
        ValueError: If `num_images` is below 1.
    """
    if num_images < 1:
        raise ValueError(f"`num_images` must be at least 1, got {num_images}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    values = digits.class_labels.argmax(axis=1)
    split_of = np.array([split_of_scene(scene) for scene in digits.scenes.tolist()])
    generator = np.random.default_rng(seed)
    lines = []
    for number in range(num_images):
        # Each twentieth image is a validation image, and the next one is held out.
        split = SPLITS[max(0, number % 20 - 17)]
        pair = generator.choice(np.flatnonzero(split_of == split), 2)
        image = Image.new("L", (SIDE, SIDE))
        for place, position in enumerate(pair):
            digit = Image.fromarray(digits.pixel_values[position]).resize((DIGIT_SIDE, DIGIT_SIDE))
            image.paste(digit, (place * DIGIT_SIDE, (SIDE - DIGIT_SIDE) // 2))
        file_name = f"{number:05d}.png"
        image.save(folder / file_name)
        tens, units = values[pair]
        lines.append({"file_name": file_name, "labels": [f"tens {tens}", f"units {units}"], "split": split})
    write_text(folder / "metadata.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; what a user gave wrongly ends it with one line."""
    parser = argparse.ArgumentParser(
        prog="python -m iclevr_diffusion.digit_pairs",
        description="Writes pairs of handwritten digits with two labels each as an image folder with metadata.jsonl.",
    )
    parser.add_argument("--out", default="outputs/pairs", help="folder; files of the same names in it are overwritten")
    parser.add_argument("--num_images", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0, help="decides which digits meet")
    args = parser.parse_args(argv)
    try:
        folder = write_digit_pairs(args.out, args.num_images, seed=args.seed)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"digit_pairs: {error}")
    print(f"{args.num_images:,} images and metadata.jsonl are in {folder.resolve()}.")


if __name__ == "__main__":
    main()

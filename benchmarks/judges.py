r"""Measures judges side by side on the held-out images of several folders, and shows where they err and disagree.

    python benchmarks/judges.py --judges judge-small judge-resnet18-half \
        --data real=ICLEVR_ROOT rendered=outputs/scenes crowded=outputs/crowded --out outputs/judges

Each judge reads with its own threshold. `judges.json` holds all its scores by number of objects, how often the judges
see the same set of objects in an image, and who is right where they do not. Of each folder a sheet, such as
`real_disagreements.png`, shows images that a judge reads wrongly: what is there, and what each judge sees too much (+)
or does not see (-). Sheets show the images themselves, so those of images that must not be passed on stay where they are.

Scenes of 0 to 5 objects are made by `iclevr-render --min_objects 0 --max_objects 5`. The renderer guarantees that at
least 20 of 64x64 pixels of every object are visible once the whole scene stands (`MIN_VISIBLE_PIXELS` in
rendering/sampling.py), so that scores on them count only objects that can be seen; of other images this is not known.
"""

import argparse
import datetime
import json
import shlex
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from iclevr_diffusion import LabelVocabulary
from iclevr_diffusion.data import ImageStore, open_store
from iclevr_diffusion.environment import describe_environment
from iclevr_diffusion.images import save_png
from iclevr_diffusion.judging import calibration_error, draw_readings, load_judge, read_images, weights_sha256
from iclevr_diffusion.scores import exact_match, score_images

NUM_TIMED, NUM_TURNS = 512, 5  # images a turn


def open_judges(sources: list[str]) -> dict[str, nn.Module]:
    """Opens judges of the same labels and image size, named by their folders; a run's `judge` by the run."""
    judges: dict[str, nn.Module] = {}
    for source in sources:
        path = Path(source).resolve()
        name = path.parent.name if path.name == "judge" else path.name
        if name in judges:
            raise ValueError(f"`judges` must have distinct names, got {name} twice; rename a folder.")
        first = next(iter(judges.values()), None)
        judges[name] = judge = load_judge(source, None if first is None else first.config.label_names)
        if first is not None and judge.config.image_size != first.config.image_size:
            raise ValueError(
                f"`judges` must read images of one size, got {first.config.image_size} and {judge.config.image_size}"
                f" pixels ({name})."
            )
    return judges


def open_stores(entries: list[str], judge: nn.Module) -> dict[str, ImageStore]:
    """Opens the folders given as NAME=FOLDER, at the size and with the labels of a judge."""
    stores: dict[str, ImageStore] = {}
    for entry in entries:
        name, separator, folder = entry.partition("=")
        if not (name and separator and folder) or name in stores:
            raise ValueError(f"`data` must be NAME=FOLDER, each name once, got {entry!r}.")
        stores[name] = open_store(
            None if folder == "ICLEVR_ROOT" else folder,
            resolution=judge.config.image_size,
            vocabulary=LabelVocabulary(judge.config.label_names),
        )
        if len(stores[name].indices("held-out")) == 0:
            raise ValueError(f"`data` {entry} must have held-out images, got none; render more scenes.")
    return stores


def compare(judges: Mapping[str, nn.Module], store: ImageStore) -> tuple[dict[str, Any], Image.Image | None]:
    """Returns scores and agreement on a folder's held-out images, and the sheet, or None if no judge errs."""
    indices = store.indices("held-out")
    pixel_values, class_labels = store.pixel_values[indices], torch.from_numpy(store.class_labels[indices])
    scores: dict[str, Any] = {}
    seen: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    for name, judge in judges.items():
        logits, threshold = read_images(judge, pixel_values).logits, judge.config.threshold
        scores[name] = score_images(logits, class_labels, threshold=threshold)
        scores[name]["calibration_error"] = calibration_error(logits, class_labels)
        seen[name], right[name] = logits > threshold, exact_match(logits, class_labels, threshold)
    first = next(iter(seen.values()))
    agree = torch.stack([(judge_seen == first).all(dim=1) for judge_seen in seen.values()]).all(dim=0)
    result = {
        "data_sha256": store.sha256,
        "num_images": len(indices),
        "judges": scores,
        "agreement": {
            "share_of_images": agree.float().mean().item(),
            "exact_match_where_they_agree": _share(right[next(iter(right))][agree]),
            "exact_match_where_they_disagree": {
                name: _share(judge_right[~agree]) for name, judge_right in right.items()
            },
        },
    }
    wrong = ~torch.stack([*right.values()]).all(dim=0)  # where judges disagree, at least one is wrong
    if not wrong.any():
        return result, None
    judges_seen = {name: judge_seen[wrong] for name, judge_seen in seen.items()}
    return result, draw_readings(pixel_values[wrong], class_labels[wrong], judges_seen, store.vocabulary.names)


def _share(marks: Tensor) -> float | None:
    return marks.float().mean().item() if len(marks) else None


def images_per_second(judges: Mapping[str, nn.Module], pixel_values: np.ndarray) -> dict[str, float]:
    """Returns how fast each judge reads batches of 64, medians over turns that the judges take one after the other."""
    pixel_values = np.resize(pixel_values, (NUM_TIMED, *pixel_values.shape[1:]))  # repeats them
    seconds: dict[str, list[float]] = {name: [] for name in judges}
    for _ in range(NUM_TURNS):
        for name, judge in judges.items():
            start = time.perf_counter()
            read_images(judge, pixel_values)
            seconds[name].append(time.perf_counter() - start)
    return {name: NUM_TIMED / statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--judges", nargs="+", required=True, help="folders, hub ids or names of judges that come along"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        help="NAME=FOLDER, folders in the course's layout; ICLEVR_ROOT: that variable's",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of judges.json and the sheets")
    arguments = parser.parse_args()
    try:
        judges = open_judges(arguments.judges)
        stores = open_stores(arguments.data, next(iter(judges.values())))
    except (ValueError, OSError) as error:
        parser.error(str(error))

    data = {}
    for name, store in stores.items():
        data[name], sheet = compare(judges, store)
        path = arguments.out / f"{name}_disagreements.png"
        path.unlink(missing_ok=True)  # of an earlier measurement
        if sheet is not None:
            save_png(sheet, path, {"judges": list(judges)})
    first_store = next(iter(stores.values()))
    speed = images_per_second(judges, first_store.pixel_values[first_store.indices("held-out")[:NUM_TIMED]])
    result = {
        "what": "Judges on held-out images, each with its own threshold, in all and by number of objects.",
        "command": shlex.join(["python", *sys.argv]),
        "judges": {
            name: {
                "class": type(judge).__name__,
                "weights_sha256": weights_sha256(judge),
                "num_parameters": judge.num_parameters(),
                "threshold": judge.config.threshold,
                "images_per_second": speed[name],
            }
            for name, judge in judges.items()
        },
        "data": data,
        "environment": describe_environment(torch.device("cpu")),
        "date": datetime.date.today().isoformat(),
    }
    text = json.dumps(result, indent=2)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "judges.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""Measures how much faster the image store makes batches than a PyTorch DataLoader over PNG files.

    ICLEVR_ROOT=path/to/iclevr python benchmarks/loading.py

Both make shuffled batches of 64 of the same 1,024 images on the CPU, once as normalised floats and once as uint8. The
DataLoader runs without and with two workers, which stay alive between passes so that starting them does not count; its
faster number of workers is what the store is compared with. All ways take turns within one run, since the speed of a
machine changes with what else it does; the result holds medians over the turns and the ratios of these medians.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iclevr_diffusion.data import BatchLoader, IclevrFolder, normalize, open_store

RESOLUTION, BATCH_SIZE = 64, 64
STORE_PASSES = 20  # passes a turn: one pass takes too short to be timed alone


class PngDataset(Dataset):
    """The ordinary way: each item opens its PNG file."""

    def __init__(self, folder: IclevrFolder, num_images: int, floats: bool) -> None:
        self.paths = [folder.image_folder / file_name for file_name in folder.file_names[:num_images]]
        self.class_labels = torch.from_numpy(folder.class_labels[:num_images]).float()
        self.floats = floats

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with Image.open(self.paths[index]) as image:
            pixel_values = image.convert("RGB")
        if pixel_values.size != (RESOLUTION, RESOLUTION):
            pixel_values = pixel_values.resize((RESOLUTION, RESOLUTION), Image.Resampling.BILINEAR)
        pixel_values = torch.from_numpy(np.array(pixel_values)).permute(2, 0, 1).contiguous()
        return (normalize(pixel_values) if self.floats else pixel_values), self.class_labels[index]


def png_pass(folder: IclevrFolder, num_images: int, floats: bool, num_workers: int) -> Callable[[], None]:
    """Returns a function that goes once through the images by a DataLoader over the PNG files."""
    loader = DataLoader(
        PngDataset(folder, num_images, floats),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )

    def go_through() -> None:
        assert sum(len(pixel_values) for pixel_values, _ in loader) == num_images

    return go_through


def store_passes(loader: BatchLoader, num_images: int, floats: bool) -> Callable[[], None]:
    """Returns a function that goes through the images `STORE_PASSES` times, each time in new steps."""
    num_steps, first_step = num_images // BATCH_SIZE, 0

    def go_through() -> None:
        nonlocal first_step
        for step in range(first_step, first_step + STORE_PASSES * num_steps):
            pixel_values = loader.batch(step)["pixel_values"]
            if floats:
                pixel_values = normalize(pixel_values)
            assert len(pixel_values) == BATCH_SIZE
        first_step += STORE_PASSES * num_steps

    return go_through


def measure(root: Path | None, num_images: int, num_repeats: int) -> dict[str, dict[str, float]]:
    """Returns the seconds a pass of each way, as medians over the repeats."""
    folder = IclevrFolder(root)
    store = open_store(root, resolution=RESOLUTION)
    if len(store) < num_images:
        raise ValueError(f"`root` must hold at least {num_images} images, got {len(store)}; render more scenes.")
    ways: dict[tuple[str, str], Callable[[], None]] = {}
    for output, floats in (("floats", True), ("uint8", False)):
        for num_workers in (0, 2):
            ways[output, f"png_{num_workers}_workers"] = png_pass(folder, num_images, floats, num_workers)
        for name, resident in (("store_in_memory", True), ("store_from_file", False)):
            loader = BatchLoader(store, np.arange(num_images), BATCH_SIZE, seed=0, resident=resident)
            ways[output, name] = store_passes(loader, num_images, floats)
    seconds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for repeat in range(num_repeats + 1):
        for way, go_through in ways.items():
            start = time.perf_counter()
            go_through()
            if repeat > 0:  # the first turn starts the workers and fills the disk cache
                seconds[way].append(time.perf_counter() - start)
    medians: dict[str, dict[str, float]] = {"floats": {}, "uint8": {}}
    for (output, name), values in seconds.items():
        passes = STORE_PASSES if name.startswith("store") else 1
        medians[output][name] = statistics.median(values) / passes
    return medians


def cpu_model() -> str:
    """Returns the name that the processor gives itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def commit() -> str:
    """Returns the commit that was measured; "uncommitted" where there is none or files have changed since."""
    repository = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(repository)]
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if changed.returncode or changed.stdout or head.returncode:
        return "uncommitted"
    return head.stdout.strip()


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder of images in the course's layout; default: ICLEVR_ROOT")
    parser.add_argument("--num_images", type=int, default=1024, help="a multiple of 64")
    parser.add_argument("--num_repeats", type=int, default=15, help="turns of all ways, after one that does not count")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loading.json")
    arguments = parser.parse_args()
    if arguments.root is None and not os.environ.get("ICLEVR_ROOT"):
        parser.error("give --root, for example a folder that iclevr-render wrote, or set ICLEVR_ROOT")
    if arguments.num_images < BATCH_SIZE or arguments.num_images % BATCH_SIZE:
        parser.error(f"--num_images must be a multiple of {BATCH_SIZE}, got {arguments.num_images}")

    medians = measure(arguments.root, arguments.num_images, arguments.num_repeats)
    ratios = {}
    for output, seconds in medians.items():
        png = min(value for name, value in seconds.items() if name.startswith("png"))
        ratios[output] = {name: png / value for name, value in seconds.items() if name.startswith("store")}
    result = {
        "what": f"{arguments.num_images} images of {RESOLUTION}x{RESOLUTION} in shuffled batches of {BATCH_SIZE}",
        "command": shlex.join(["python", *sys.argv]),
        "source": "rendered or own images" if arguments.root else "i-CLEVR (ICLEVR_ROOT)",
        "num_repeats": arguments.num_repeats,
        "median_seconds_a_pass": medians,
        "times_faster_than_the_faster_png_loader": ratios,
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }
    text = json.dumps(result, indent=2)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

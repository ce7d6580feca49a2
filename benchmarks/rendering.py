"""Measures how many images a second `iclevr-render` draws, on one process and on two.

    python benchmarks/rendering.py

Scenes of one to three objects are drawn at 64x64 into a temporary folder; the figures hold everything that a scene
needs, from the drawing of lots to the PNG files. They are timed by the clock and by the processor time used, which the
waiting for other jobs of a busy machine does not lengthen. Two processes are timed with and without what they need to
start. All ways take turns; the result holds the medians.
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
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL

from iclevr_diffusion.rendering import render_dataset
from iclevr_diffusion.rendering.dataset import SCENES_A_TASK

IMAGES_A_SCENE = 3
START_SCENES = 2 * SCENES_A_TASK  # no fewer set two processes to work


def timed(num_scenes: int, num_workers: int) -> tuple[float, float]:
    """Renders into a fresh folder; returns seconds by the clock and seconds of processor time of all processes."""
    with tempfile.TemporaryDirectory() as folder:
        clock, before = time.perf_counter(), os.times()
        render_dataset(folder, num_scenes, num_workers=num_workers, progress=False)
        after = os.times()
        return time.perf_counter() - clock, sum(after[:4]) - sum(before[:4])


def processor_name() -> str:
    """The processor's name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description="Measures how many images a second the renderer draws.")
    parser.add_argument("--num_scenes", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rendering.json")
    args = parser.parse_args()

    timed(10, 1)
    ways = {
        "one process": (args.num_scenes, 1),
        "two processes": (args.num_scenes, 2),
        "start of two": (START_SCENES, 2),
    }
    clock, processor, loads = {way: [] for way in ways}, {way: [] for way in ways}, []
    for _ in range(args.turns):
        loads.append(os.getloadavg()[0])
        for way, arguments in ways.items():
            seconds = timed(*arguments)
            clock[way].append(seconds[0])
            processor[way].append(seconds[1])
    clock_median = {way: statistics.median(values) for way, values in clock.items()}
    processor_median = {way: statistics.median(values) for way, values in processor.items()}
    num_images = IMAGES_A_SCENE * args.num_scenes
    num_after_start = IMAGES_A_SCENE * (args.num_scenes - START_SCENES)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    result = {
        "images_a_second": {
            "one process": num_images / clock_median["one process"],
            "two processes": num_images / clock_median["two processes"],
            "two processes, once started": num_images / (clock_median["two processes"] - clock_median["start of two"]),
        },
        "images_a_second_of_processor_time": {
            "one process": num_images / processor_median["one process"],
            "two processes, once started": num_after_start
            / (processor_median["two processes"] - processor_median["start of two"]),
        },
        "seconds": clock,
        "seconds_of_processor_time": processor,
        "num_images": num_images,
        "size": 64,
        "load_average_before_each_turn": loads,
        "processor": processor_name(),
        "num_processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "commit": commit or None,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key.startswith("images_a_second")}, indent=2))


if __name__ == "__main__":
    main()

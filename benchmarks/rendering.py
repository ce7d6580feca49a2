"""Measures how many images a second `iclevr-render` draws, on one process and on two.

    python benchmarks/rendering.py

Scenes of one to three objects are drawn at 64x64 into a temporary folder. One process is timed by the clock and by the
processor time it used, which other jobs of a busy machine do not lengthen; its figures hold everything that a scene
needs, from the drawing of lots to the PNG files. Two processes are timed by the clock, with and without the seconds
that they need to start. All ways take turns; the result holds the medians.
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

IMAGES_A_SCENE = 3


def timed(num_scenes: int, num_workers: int) -> tuple[float, float]:
    """Renders into a fresh folder; returns seconds by the clock and seconds of this process's processor time."""
    with tempfile.TemporaryDirectory() as folder:
        clock, processor = time.perf_counter(), time.process_time()
        render_dataset(folder, num_scenes, num_workers=num_workers, progress=False)
        return time.perf_counter() - clock, time.process_time() - processor


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
    seconds = {"one_process": [], "one_process_processor_time": [], "two_processes": [], "two_processes_start": []}
    loads = []
    for _ in range(args.turns):
        loads.append(os.getloadavg()[0])
        clock, processor = timed(args.num_scenes, 1)
        seconds["one_process"].append(clock)
        seconds["one_process_processor_time"].append(processor)
        seconds["two_processes"].append(timed(args.num_scenes, 2)[0])
        seconds["two_processes_start"].append(timed(2, 2)[0])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    num_images = IMAGES_A_SCENE * args.num_scenes
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    result = {
        "images_a_second": {
            "one process": num_images / median["one_process"],
            "one process, by processor time": num_images / median["one_process_processor_time"],
            "two processes": num_images / median["two_processes"],
            "two processes, once started": num_images / (median["two_processes"] - median["two_processes_start"]),
        },
        "seconds": seconds,
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
    print(json.dumps(result["images_a_second"], indent=2))


if __name__ == "__main__":
    main()

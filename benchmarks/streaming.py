"""Measures memory and waiting when a set of images is larger than one would hold in memory.

    python benchmarks/streaming.py

Makes a Parquet set of 200,000 labelled images of 64x64 pixels in a temporary folder (renderings that repeat, 1 GB), and
a tenth and a hundredth of it; 4 GB of disk are needed, and given back. Each set is opened as `--data` is, in a process of
its own, in three ways: `resident` (in memory), `mapped` (`--resident false`: a file of pixels, 2.5 GB) and `streamed`
(`--streaming true`: decoded from the Parquet files when a batch needs them). Batches of 64 are then taken, first as fast
as they come, and then by a step that leaves the processor alone for 20 ms, as an accelerator does. Files are dropped from
the system's cache before.

Memory is what a process, its workers and what they share would give back if they ended (`Pss_Anon` and `Pss_Shmem`), so
that the system's cache of files does not count; Linux alone tells it. It is the peak of samples from before the set is
opened. `2 processes` are workers of a PyTorch DataLoader which make the same batches, for a comparison with threads.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from pyarrow import parquet
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iclevr_diffusion.data import BatchLoader, IclevrFolder
from iclevr_diffusion.environment import describe_environment
from iclevr_diffusion.rendering import render_dataset
from iclevr_diffusion.training_data import open_images

RESOLUTION, BATCH_SIZE, STEP_SECONDS = 64, 64, 0.02
ROWS_A_FILE, ROWS_A_GROUP = 20_000, 500
SAMPLE_EVERY = 0.1  # seconds
# Way, number of workers, and which parts of the whole set.
THREADS = [("resident", "0 threads", (1, 10, 100)), ("mapped", "2 threads", (1, 10, 100))]
THREADS += [("streamed", "2 threads", (1, 10, 100))]
WORKERS = [(way, workers, (1,)) for way in ("mapped", "streamed") for workers in ("0 threads", "2 processes")]


class Memory:
    """The peak of the memory of this process and its children, sampled until the `with` block ends."""

    def __enter__(self) -> "Memory":
        self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        """Returns bytes."""
        pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
        return 1024 * sum(
            int(line.split()[1])
            for pid in pids
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            if line.startswith(("Pss_Anon:", "Pss_Shmem:"))
        )


class Steps(Dataset):
    """The batches of a loader by number, for the workers of a DataLoader."""

    def __init__(self, loader: BatchLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return self.loader.batch(step)


def write_parquet(
    folder: Path, num_images: int, images: list[bytes], class_labels: np.ndarray, names: list[str]
) -> None:
    """Writes a Parquet set as `datasets` does; its images repeat, in an order by chance."""
    folder.mkdir()
    random = np.random.default_rng(0)
    lists = [[names[i] for i in np.flatnonzero(row)] for row in class_labels]
    for start in range(0, num_images, ROWS_A_FILE):
        rows = random.integers(len(images), size=min(ROWS_A_FILE, num_images - start)).tolist()
        table = pyarrow.table(
            {"image": [{"bytes": images[i], "path": None} for i in rows], "labels": [lists[i] for i in rows]},
            schema=pyarrow.schema(
                {
                    "image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
                    "labels": pyarrow.list_(pyarrow.string()),
                }
            ),
        )
        path = folder / f"part-{start // ROWS_A_FILE:05d}.parquet"
        # A dictionary would store each of the repeated images once a file, unlike images that differ.
        parquet.write_table(table, path, row_group_size=ROWS_A_GROUP, use_dictionary=False, compression="none")


def write_settings(folder: Path, images: Path) -> Path:
    """Writes the file that says what is known of a set, so that its headers are not looked through."""
    path = folder / f"{images.name}.yaml"
    path.write_text(f"images: {images.name}\nchannels: 3\n")
    return path


def drop_from_cache(folder: Path) -> None:
    """Asks the system to forget what it keeps of the files in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def batches(loader: BatchLoader, workers: str) -> Iterator[dict[str, Tensor]]:
    """Yields the batches from the first on."""
    if workers.endswith("processes"):
        yield from DataLoader(
            Steps(loader),
            batch_size=None,
            num_workers=int(workers.split()[0]),
            prefetch_factor=4,
            multiprocessing_context="fork",
        )
    step = 0
    while True:
        yield loader.batch(step)
        step += 1


def measure(settings: Path, way: str, workers: str, seconds: float) -> dict[str, Any]:
    """Opens a set and takes batches for some seconds, in the process that calls it."""
    drop_from_cache(settings.parent)
    torch.set_num_threads(1)
    with Memory() as memory:
        before, start = memory.peak, time.perf_counter()
        _, store = open_images("data", settings, RESOLUTION, progress=False, streaming=way == "streamed")
        indices = store.indices("train")
        opened = time.perf_counter()
        loader = BatchLoader(
            *(store, indices, BATCH_SIZE),
            seed=0,
            resident=way == "resident",
            num_workers=int(workers.split()[0]) if workers.endswith("threads") else 0,
        )
        stream = batches(loader, workers)
        next(stream)
        ready = time.perf_counter()
        num_batches = 0
        while time.perf_counter() < ready + seconds:
            next(stream)
            num_batches += 1
        rate = num_batches * BATCH_SIZE / (time.perf_counter() - ready)
        waited, began = 0.0, time.perf_counter()
        while time.perf_counter() < began + seconds:
            time.sleep(STEP_SECONDS)
            asked = time.perf_counter()
            next(stream)
            waited += time.perf_counter() - asked
        share = waited / (time.perf_counter() - began)
    return {
        "num_images": len(store),
        "way": way,
        "workers": workers,
        "memory_bytes": memory.peak - before,
        "seconds_to_open": opened - start,
        "seconds_to_first_batch": ready - opened,
        "images_a_second": rate,
        "share_of_time_waiting": share,
    }


def main() -> None:
    """Makes the sets, measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=200_000, help="images of the whole set")
    parser.add_argument("--seconds", type=float, default=2, help="how long each way takes batches, twice")
    parser.add_argument(
        "--folder", type=Path, help="where the sets lie meanwhile; default: the system's temporary folder"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "streaming.json")
    arguments = parser.parse_args()
    if arguments.num_images < 1000:
        parser.error(f"--num_images must be at least 1000, got {arguments.num_images}")
    started = time.perf_counter()
    environment, results = describe_environment(torch.device("cpu")), []
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="streaming-") as temporary:
        folder = Path(temporary)
        os.environ["ICLEVR_CACHE"] = str(folder / "cache")
        source = IclevrFolder(render_dataset(folder / "scenes", 60, size=RESOLUTION, seed=0))
        images = [(source.image_folder / name).read_bytes() for name in source.file_names]
        sets, seconds_to_store = {}, {}
        for part in (1, 10, 100):
            num_images = arguments.num_images // part
            write_parquet(
                folder / f"images-{num_images}", num_images, images, source.class_labels, source.vocabulary.names
            )
            sets[part] = write_settings(folder, folder / f"images-{num_images}")
            begun = time.perf_counter()
            open_images("data", sets[part], RESOLUTION, progress=sys.stderr.isatty())
            seconds_to_store[num_images] = time.perf_counter() - begun
        time.sleep(2.5)  # so that the stores count as settled, see `ImageStore`
        for part in sets:
            open_images("data", sets[part], RESOLUTION)
        for way, workers, parts in THREADS + WORKERS:
            for part in parts:
                # A process of its own each, which starts with nothing of the others in memory.
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    results.append(pool.submit(measure, sets[part], way, workers, arguments.seconds).result())
                line = results[-1]
                print(
                    f"{line['num_images']:>9,} images, {way:>8}, {workers:>11}: {line['memory_bytes'] / 2**20:6.0f} MiB,"
                    f" opened in {line['seconds_to_open']:5.2f} s, {line['images_a_second']:9,.0f} images/s,"
                    f" {line['share_of_time_waiting']:6.1%} of the time waiting",
                    flush=True,
                )
    result = {
        "what": f"{RESOLUTION}x{RESOLUTION} images in batches of {BATCH_SIZE}; steps of {STEP_SECONDS} s of sleep",
        "results": results,
        "bytes_a_image_of_pixels": 3 * RESOLUTION**2,
        "seconds_to_write_the_store": seconds_to_store,
        "seconds_in_all": time.perf_counter() - started,
        "load_average": os.getloadavg()[0],
        "environment": environment,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

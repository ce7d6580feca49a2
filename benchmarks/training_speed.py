"""Measures what each step from a plain training loop to a fast one gains, at the same losses.

    ICLEVR_ROOT=path/to/iclevr python benchmarks/training_speed.py [--presets reported base] [--device cuda]

The plain loop is that of the reports: PyTorch's defaults, float32, a DataLoader over PNG files of four workers (or one
a core, where there are fewer cores), and the loss read at each step. Each rung of the ladder adds one thing to those
before. All train the same freshly initialized network with the same batch size, clipping and AdamW; none keeps an
average of the weights. They take turns within one run, there and back, since the speed of a machine changes with what
else it does; gains are medians of the ratios of turns of one round.

The first and the last rung then train on the same batches with the same noise, beside the first with another noise:
what two curves may differ by. Last, on a CPU, one process of one thread beside two of one thread each, which train
together.

What is measured is not measured again, so that the same command goes on where it was stopped.
"""

import argparse
import contextlib
import datetime
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from limits import count_operations, make_inputs, make_network, product_rate, start_record
from loading import PngDataset
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from iclevr_diffusion.data import BatchLoader, IclevrFolder, ImageStore, normalize, open_store
from iclevr_diffusion.denoiser import choose_attention
from iclevr_diffusion.diffusion import add_noise, noise_levels, sample_times, training_target
from iclevr_diffusion.environment import default_device, describe_environment, has_bfloat16
from iclevr_diffusion.files import write_text
from iclevr_diffusion.models.unet_multilabel import PRESETS
from iclevr_diffusion.rendering import render_dataset
from iclevr_diffusion.training import hold_process_group

PLAIN = "plain loop"
RUNGS = {
    PLAIN: "a DataLoader over PNG files; the loss is read at each step",
    "images on the device": "decoded once, kept as bytes where the network is",
    "bfloat16": "the network runs under autocast",
    "attention by products": "not PyTorch's fused attention, whose backward in bfloat16 is slow on a CPU",
    "channels last": "weights and activations with the channels of a pixel side by side",
    "fused optimizer": "AdamW as one operation",
    "compiled": "the network is compiled by torch.compile",
    "no synchronization": "losses are added up on the device",
}
NUM_SCENES = 500  # rendered where no images are given
LEARNING_RATE, MAX_GRAD_NORM = 5e-4, 1.0
MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
SETTLING = 0.5  # seconds that a DataLoader's workers get to fill their queues again
SCALING_REPEATS = 3


class Loop:
    """A training loop of a rung.

    Args:
        rungs: What the loop has of `RUNGS`.
        preset: Size of the network.
        loader: The decoded images.
        folder: Their PNG files, for a loop without "images on the device".
        num_workers: Processes that read PNG files.

    Attributes:
        losses: The losses of the last turn.
    """

    def __init__(
        self, rungs: Sequence[str], preset: str, loader: BatchLoader, folder: IclevrFolder | None, num_workers: int
    ) -> None:
        self.rungs = tuple(rungs)
        self.loader = loader
        self.device = loader.device
        self.num_steps = 0
        self.losses: list[float] = []
        torch.manual_seed(0)
        network = make_network(preset, self.device).train()
        if "attention by products" in rungs:
            choose_attention(network, self.device, "bf16")
        if "channels last" in rungs:
            network.to(memory_format=torch.channels_last)
        if "compiled" in rungs:
            network.compile()
        self.model: nn.Module = network
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=LEARNING_RATE, fused="fused optimizer" in rungs or None
        )
        self._files: Iterator[list[Tensor]] | None = None
        self._num_prefetched = 0
        if folder is not None and "images on the device" not in rungs:
            files = DataLoader(
                PngDataset(folder, len(folder.file_names), floats=True),
                batch_size=loader.batch_size,
                shuffle=True,
                drop_last=True,
                num_workers=num_workers,
                persistent_workers=num_workers > 0,
                pin_memory=self.device.type == "cuda",
            )
            self._files = (batch for _ in iter(int, 1) for batch in files)  # one pass after the other
            self._num_prefetched = num_workers * (files.prefetch_factor or 0)

    def step(self, batch: dict[str, Tensor], noise_seed: int | None = None) -> Tensor:
        """Trains on images (B, 3, H, W) in [-1, 1] and their labels, and returns the loss."""
        if noise_seed is not None:
            torch.manual_seed(noise_seed)
        x_0, class_labels = batch["pixel_values"], batch["class_labels"]
        noise = torch.randn_like(x_0)
        timesteps, alpha, sigma = noise_levels(sample_times(len(x_0), "logit-normal", device=x_0.device))
        mixed = "bfloat16" in self.rungs
        with torch.autocast(self.device.type, torch.bfloat16) if mixed else contextlib.nullcontext():
            prediction = self.model(add_noise(x_0, noise, alpha, sigma), timesteps, class_labels).sample
        loss = F.mse_loss(prediction.float(), training_target("flow", x_0, noise, alpha, sigma))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        return loss.detach()

    def turn(self, num_steps: int) -> float:
        """Trains for some steps and returns their seconds."""
        for _ in range(self._num_prefetched):  # they were read while others had their turn
            next(self._files)
        self._wait()
        losses: list[Tensor | float] = []
        begin = time.perf_counter()
        for _ in range(num_steps):
            loss = self.step(self._batch())
            losses.append(loss if "no synchronization" in self.rungs else loss.item())
        self.losses = [float(loss) for loss in losses]
        self._wait()
        seconds = time.perf_counter() - begin
        if self._num_prefetched:
            time.sleep(SETTLING)
        return seconds

    def _batch(self) -> dict[str, Tensor]:
        if self._files is None:
            self.num_steps += 1
            return batch_of(self.loader, self.num_steps - 1)
        pixel_values, class_labels = next(self._files)
        return {"pixel_values": pixel_values.to(self.device), "class_labels": class_labels.to(self.device)}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def choose_rungs(device: torch.device, left_out: Sequence[str] = ()) -> list[str]:
    """Returns the rungs that make sense on a device, in order, but for those that are to be left out."""
    skipped = {*left_out}
    if device.type == "cuda":  # where the fused attention is the fast one
        skipped.add("attention by products")
    if not has_bfloat16(device):  # what would be measured is its emulation
        skipped |= {"bfloat16", "attention by products"}
    return [name for name in RUNGS if name not in skipped]


def batch_of(loader: BatchLoader, step: int) -> dict[str, Tensor]:
    """Returns a batch of a store with its images in [-1, 1]."""
    batch = loader.batch(step)
    return batch | {"pixel_values": normalize(batch["pixel_values"])}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def climb(
    names: Sequence[str],
    make_loop: Callable[[Sequence[str]], Any],
    batch_size: int,
    *,
    num_steps: int,
    num_repeats: int,
) -> list[dict[str, Any]]:
    """Lets the loops of a ladder take turns.

    Args:
        names: The rungs; the loop of each has those before it too.
        make_loop: Makes the loop of some rungs.
        batch_size: Images a step.
        num_steps: Steps a turn.
        num_repeats: Turns of each.

    Returns:
        A row a rung: images a second, and its gains over the rung before and over the first.
    """
    loops = {name: make_loop(names[: i + 1]) for i, name in enumerate(names)}
    first = {name: loop.turn(1) for name, loop in loops.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(num_repeats):
        for name in names if repeat % 2 == 0 else reversed(names):
            seconds[name].append(loops[name].turn(num_steps))
    rows = []
    for i, name in enumerate(names):
        before, start = seconds[names[max(0, i - 1)]], seconds[names[0]]
        rows.append(
            {
                "rung": name,
                "says": RUNGS[name],
                "images_per_second": batch_size * num_steps / statistics.median(seconds[name]),
                "gain_over_the_rung_before": spread([a / b for a, b in zip(before, seconds[name], strict=True)]),
                "gain_over_the_first": spread([a / b for a, b in zip(start, seconds[name], strict=True)]),
                "seconds_of_the_first_step": first[name],
                "seconds_of_turns": seconds[name],
            }
        )
    return rows


def compare_curves(names: Sequence[str], make_loop: Callable[[Sequence[str]], Loop], num_steps: int) -> dict[str, Any]:
    """Trains the first and the last rung on the same batches and noise, and the first again with another noise.

    Returns:
        The curves; how far the last rung's lies from the first's over the last half, in the root mean square of steps
        and in their mean; and the same of the two noises, what is no difference of the loops.
    """
    runs = {"first": (names[:1], 0), "last": (names, 0), "first, another noise": (names[:1], 1)}
    curves: dict[str, list[float]] = {}
    for name, (rungs, noise) in runs.items():
        loop = make_loop(rungs)
        losses = [loop.step(batch_of(loop.loader, i), 2 * i + noise) for i in range(num_steps)]
        curves[name] = [float(loss) for loss in losses]
    half = num_steps // 2
    differences = {}
    for name in ("last", "first, another noise"):
        gaps = [a - b for a, b in zip(curves[name][half:], curves["first"][half:], strict=True)]
        differences[name] = {
            "root_mean_square": statistics.fmean(gap**2 for gap in gaps) ** 0.5,
            "mean": statistics.fmean(gaps),
        }
    return {"num_steps": num_steps, "losses": curves, "difference_from_the_first_in_the_last_half": differences}


def train_together(
    process: int,
    num_processes: int,
    folder: str,
    images: str,
    rungs: Sequence[str],
    preset: str,
    sizes: tuple[int, int],
) -> None:
    """Is one of some processes on a CPU, of one thread each, that train together; the first writes their seconds."""
    batch_size, num_steps = sizes
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=Path(folder, "group").as_uri(), rank=process, world_size=num_processes
    )
    hold_process_group()
    store = ImageStore(images)
    place = {"num_processes": num_processes, "process_index": process}
    loader = BatchLoader(store, store.indices("train"), batch_size, seed=0, **place)
    loop = Loop(rungs, preset, loader, None, 0)
    if num_processes > 1:
        loop.model = DistributedDataParallel(loop.model)
    loop.turn(1)
    torch.distributed.barrier()
    seconds = loop.turn(num_steps)
    torch.distributed.barrier()
    if process == 0:
        write_text(Path(folder, "seconds"), str(seconds))
    torch.distributed.destroy_process_group()


def measure_scaling(
    images: Path, rungs: Sequence[str], preset: str, batch_size: int, num_steps: int
) -> dict[str, Any]:
    """Measures one process of one thread, and two of one each; the batch is that of each process."""
    images_per_second: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(SCALING_REPEATS):
        for num_processes in images_per_second:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(
                    train_together,
                    (num_processes, folder, str(images), tuple(rungs), preset, (batch_size, num_steps)),
                    nprocs=num_processes,
                )
                seconds = float(Path(folder, "seconds").read_text())
            images_per_second[num_processes].append(num_processes * batch_size * num_steps / seconds)
    one, two = images_per_second.values()
    return {
        "rungs": list(rungs),
        "images_per_second": {str(number): statistics.median(values) for number, values in images_per_second.items()},
        "gain_of_the_second_process": spread([b / a for a, b in zip(one, two, strict=True)]),
    }


def format_ladder(preset: str, ladder: Sequence[dict[str, Any]]) -> str:
    """Returns the ladder as a table."""
    lines = [f"{preset:24} images/s   gain   in all"]
    for row in ladder:
        gain, total = row["gain_over_the_rung_before"]["median"], row["gain_over_the_first"]["median"]
        lines.append(f"{row['rung']:24} {row['images_per_second']:8.1f}  {gain:5.2f}  {total:7.2f}")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and writes the result; what a user gave wrongly ends it with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder of images in the course's layout; default: ICLEVR_ROOT")
    parser.add_argument("--presets", nargs="+", choices=tuple(PRESETS), default=["tiny"], help="sizes of the network")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device().type, help="cpu or cuda")
    parser.add_argument("--batch_size", type=int, default=64, help="images a step")
    parser.add_argument("--num_workers", type=int, help="processes that read PNG files; default: 4, or one a core")
    parser.add_argument("--num_steps", type=int, help="steps a turn; default: 3, on a GPU 30")
    parser.add_argument("--num_repeats", type=int, default=5, help="turns of each rung")
    parser.add_argument("--curve_steps", type=int, help="steps of the loss curves; default: 40, on a GPU 500")
    parser.add_argument("--skip", nargs="+", choices=tuple(RUNGS)[1:], default=[], help="rungs to leave out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_speed.json")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    num_workers = min(4, os.cpu_count() or 1) if arguments.num_workers is None else arguments.num_workers
    num_steps = (30 if on_gpu else 3) if arguments.num_steps is None else arguments.num_steps
    curve_steps = (500 if on_gpu else 40) if arguments.curve_steps is None else arguments.curve_steps
    numbers = {"batch_size": arguments.batch_size, "num_steps": num_steps, "num_repeats": arguments.num_repeats}
    checked = [(name, value, 1) for name, value in numbers.items()]
    for name, value, least in (*checked, ("num_workers", num_workers, 0), ("curve_steps", curve_steps, 2)):
        if value < least:
            parser.error(f"`{name}` must be at least {least}, got {value}.")
    device = torch.device(arguments.device)
    names = choose_rungs(device, arguments.skip)

    environment = describe_environment(device)
    settings = {
        "machine": environment["machine"],
        "device": device.type,
        "num_threads": torch.get_num_threads(),
        "versions": environment["versions"],
        "images": "rendered" if arguments.root is None and not os.environ.get("ICLEVR_ROOT") else "given",
        "rungs": names,
        **numbers,
        "num_workers": num_workers,
        "curve_steps": curve_steps,
    }
    with tempfile.TemporaryDirectory() as temporary:
        try:
            torch.zeros(1, device=device)
            record = start_record(arguments.out, settings)
            root = arguments.root or os.environ.get("ICLEVR_ROOT")
            root = Path(root or render_dataset(Path(temporary, "scenes"), NUM_SCENES))
            folder = IclevrFolder(root)
            store = open_store(root, cache_dir=None if settings["images"] == "given" else temporary)
            loader = BatchLoader(store, store.indices("train"), arguments.batch_size, seed=0, device=device)
        except (ValueError, OSError, RuntimeError, AssertionError) as error:
            parser.error(str(error).partition("\n")[0])

        def save() -> None:
            record["what"] = "Images a second in training, from a plain loop to a fast one, in one run on one machine."
            record["command"], record["environment"] = shlex.join(["python", *sys.argv]), environment
            record["date"] = datetime.date.today().isoformat()
            write_text(arguments.out, json.dumps(record, indent=2) + "\n")

        for preset in arguments.presets:
            row = record.setdefault("presets", {}).setdefault(preset, {})

            def make_loop(rungs: Sequence[str], preset: str = preset) -> Loop:
                return Loop(rungs, preset, loader, folder, num_workers)

            if "ladder" not in row:
                size, dtype = MATRIX_SIZE[device.type], torch.bfloat16 if "bfloat16" in names else torch.float32
                rate = product_rate(size, size, size, dtype, device, 2.0)
                row["ladder"] = climb(
                    names,
                    make_loop,
                    arguments.batch_size,
                    num_steps=num_steps,
                    num_repeats=arguments.num_repeats,
                )
                operations = count_operations(make_network(preset, "meta"), make_inputs(1, "meta"), backward=True)
                reached = 1e-9 * operations * row["ladder"][-1]["images_per_second"]
                row["last_rung"] = {"gigaflop_a_second": reached, "matrix_gigaflop_a_second": rate}
                row["last_rung"]["share_of_matrix_rate"] = reached / rate
                save()
            print(format_ladder(preset, row["ladder"]))
            print(
                f"The last rung reaches {row['last_rung']['share_of_matrix_rate']:.1%} of the matrix rate.", flush=True
            )
            if "curves" not in row:
                row["curves"] = compare_curves(names, make_loop, curve_steps)
                save()
            print("Loss curves:", json.dumps(row["curves"]["difference_from_the_first_in_the_last_half"]), flush=True)
            if not on_gpu and "scaling" not in row:
                rungs = [name for name in names if name != "compiled"]
                row["scaling"] = measure_scaling(store.path, rungs, preset, arguments.batch_size, num_steps)
                save()
            if not on_gpu:
                print("One process and two:", json.dumps(row["scaling"]["images_per_second"]), flush=True)
    print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()

"""Measures what a machine can calculate, and how much of it the networks reach in training and in sampling.

    python benchmarks/limits.py [--presets tiny base] [--device cuda]

Of every preset: parameters, operations of a call and of a training step, and the bytes that pass between memory and
processor if every operation reads and writes its tensors once. Of the machine: the rate of matrix products of several
sizes, in float32 and bfloat16, that of a large convolution, and the rate at which memory is copied. A convolution can
lie above: some libraries need fewer multiplications for it than are counted, and GPUs round its float32 factors to
TF32. Then the rates of the costliest convolutions, beside a matrix product of as many operations; of a call (no
gradients); and of a training step (forward, backward, clipping, AdamW, averaged weights; bfloat16 under autocast), each
as a share of the machine's best rate in that precision. A profile says on what kinds of operations a step and a call
spend their time. All of it is as PyTorch has it by default, before any cure; `training_speed.py` measures the cures.

Operations are counted as two a multiplication with its addition, of convolutions and matrix products alone. A preset
that is measured is not measured again, so that the same command goes on where it was stopped.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from iclevr_diffusion import MultiLabelUNet2DModel
from iclevr_diffusion.ema import ExponentialMovingAverage
from iclevr_diffusion.environment import default_device, describe_environment, has_bfloat16
from iclevr_diffusion.files import write_text
from iclevr_diffusion.models.unet_multilabel import PRESETS

SCHEMA_VERSION = 1
RESOLUTION, NUM_CLASSES = 64, 24
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH_SIZES = {
    "cpu": {"tiny": 16, "tokens": 32, "base": 8, "reported": 2},
    "cuda": {"tiny": 512, "tokens": 1024, "base": 256, "reported": 64},
}
MATRIX_SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192)}
CONVOLUTION = {
    "kernel_size": 3,
    "stride": 1,
    "in_channels": 256,
    "out_channels": 256,
    "input_size": 32,
    "output_size": 32,
}
CONVOLUTION_BATCH_SIZES = {"cpu": 8, "cuda": 256}
COPIED_BYTES = 2**28
NUM_CONVOLUTIONS = 5  # of each preset, the ones of most operations
LONG = 5.0  # seconds; what takes longer is measured and profiled once
LEAST_SAMPLE = 0.02  # seconds; what takes less is repeated before the clock is read

# Kinds of operations by PyTorch's names of them; the first pattern that is found counts.
KINDS = {
    "convolutions, backward": r"convolution_backward",
    "convolutions": r"conv",
    "attention": r"attention|bmm|softmax",
    "linear layers": r"::(add)?mm$|linear",
    "normalization": r"group_norm|batch_norm",
    "copies and casts": r"copy|::clone|::cat|empty|fill|zero|contiguous|upsample|pixel_",
    "element by element": r"::(\w*silu\w*|add|sub|mul|div|sum|mean|pow|where)_?\w*$",
}


class ByteCounter(TorchDispatchMode):
    """Adds up the bytes of the tensors that every operation reads and writes; views move none.

    Attributes:
        num_bytes: The sum so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(  # noqa: D105
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.num_bytes += sum(item.nbytes for item in tensors if isinstance(item, Tensor))
        return result


def make_inputs(batch_size: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Makes noisy images, times and labels, as a network is called with them."""
    sample = torch.randn(batch_size, 3, RESOLUTION, RESOLUTION, device=device, dtype=dtype)
    class_labels = torch.zeros(batch_size, NUM_CLASSES, device=device)
    return sample, torch.full((batch_size,), 500.0, device=device), class_labels


def make_network(preset: str, device: torch.device | str) -> MultiLabelUNet2DModel:
    """Makes a freshly initialized network of a preset, as train_ddpm.py does by default."""
    with torch.device(device):
        return MultiLabelUNet2DModel.from_preset(
            preset, num_classes=NUM_CLASSES, sample_size=RESOLUTION, prediction_type="flow", null_condition=True
        )


def count_operations(network: nn.Module, inputs: tuple[Tensor, ...], *, backward: bool = False) -> int:
    """Counts the floating point operations of a call, and of its backward if asked.

    Attention is taken apart into its matrix products for that, as its fused forms are not counted on every device.
    """
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward):
        prediction = network(*inputs).sample
        if backward:
            prediction.sum().backward()
    return counter.get_total_flops()


def count_preset(preset: str) -> dict[str, float]:
    """Counts parameters, operations and bytes of a preset's float32 call on one image, without calculating it."""
    network, inputs = make_network(preset, "meta"), make_inputs(1, "meta")
    counter = ByteCounter()
    with counter, torch.no_grad():
        network(*inputs)
    return {
        "num_parameters": sum(weight.numel() for weight in network.parameters()),
        "gigaflop_a_call": count_operations(network, inputs) / 1e9,
        "gigaflop_to_train_on_an_image": count_operations(network, inputs, backward=True) / 1e9,
        "megabytes_of_weights": sum(weight.nbytes for weight in network.parameters()) / 1e6,
        "megabytes_moved_by_a_call": counter.num_bytes / 1e6,
    }


def median_seconds(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Returns the median time of a run, of at least three and of as many as `seconds` allow, after one to warm up.

    A run that takes long is not repeated.
    """

    def sample(num_runs: int) -> float:
        begin = time.perf_counter()
        for _ in range(num_runs):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    sample(1)
    first = sample(1)
    if first > LONG:
        return first
    num_runs = max(1, round(LEAST_SAMPLE / max(first, 1e-6)))
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < 3 or time.perf_counter() - begin < seconds:
        samples.append(sample(num_runs) / num_runs)
    return statistics.median(samples)


def product_rate(
    rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> float:
    """Measures the rate of (rows, inner) @ (inner, columns) in GFLOP a second."""
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(inner, columns, device=device, dtype=dtype)
    return 2e-9 * rows * inner * columns / median_seconds(lambda: left @ right, device, seconds)


def dtypes_of(device: torch.device) -> dict[str, torch.dtype]:
    """Returns the precisions that the device has instructions for."""
    return {name: dtype for name, dtype in DTYPES.items() if name != "bfloat16" or has_bfloat16(device)}


def measure_machine(device: torch.device, seconds: float) -> dict[str, Any]:
    """Measures the rates of square matrix products, by their size, of a large convolution, and of copies."""
    rates = {
        name: {str(size): product_rate(size, size, size, dtype, device, seconds) for size in MATRIX_SIZES[device.type]}
        for name, dtype in dtypes_of(device).items()
    }
    batch_size = CONVOLUTION_BATCH_SIZES[device.type]
    convolutions = {
        name: max(measure_convolution(CONVOLUTION, batch_size, dtype, device, seconds).values())
        for name, dtype in dtypes_of(device).items()
    }
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = median_seconds(lambda: target.copy_(source), device, seconds)
    return {
        "gigaflop_a_second_by_size": rates,
        "gigaflop_a_second_of_a_convolution": convolutions,
        "best_gigaflop_a_second": {
            name: max(*by_size.values(), convolutions[name]) for name, by_size in rates.items()
        },
        "gigabytes_a_second": 2 * COPIED_BYTES / 1e9 / copying,  # each byte is read and written
    }


def costliest_convolutions(preset: str) -> list[dict[str, Any]]:
    """Lists the shapes of convolutions that take most of the operations of a call, largest first."""
    network, inputs = make_network(preset, "meta"), make_inputs(1, "meta")
    total = count_operations(network, inputs)
    operations: Counter[tuple[int, ...]] = Counter()

    def note(module: nn.Conv2d, args: tuple[Tensor], output: Tensor) -> None:
        kernel, (_, channels, height, width) = module.kernel_size[0], output.shape
        shape = (kernel, module.stride[0], module.in_channels, channels, args[0].shape[-1], width)
        operations[shape] += 2 * kernel**2 * module.in_channels * channels * height * width

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        network(*inputs)
    names = ("kernel_size", "stride", "in_channels", "out_channels", "input_size", "output_size")
    return [
        {**dict(zip(names, shape, strict=True)), "share_of_operations": number / total}
        for shape, number in operations.most_common(NUM_CONVOLUTIONS)
    ]


def measure_convolution(
    shape: dict[str, Any], batch_size: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> dict[str, float]:
    """Measures the rates, in GFLOP a second, of a convolution and of a matrix product of as many operations."""
    kernel, channels = shape["kernel_size"], shape["out_channels"]
    size = (batch_size, shape["in_channels"], shape["input_size"], shape["input_size"])
    sample = torch.randn(size, device=device, dtype=dtype)
    weight = torch.randn(channels, size[1], kernel, kernel, device=device, dtype=dtype)
    rows, inner = batch_size * shape["output_size"] ** 2, size[1] * kernel**2
    operations = 2 * rows * inner * channels
    rates = {"matrix_product": product_rate(rows, inner, channels, dtype, device, seconds)}
    for name, memory_format in (("convolution", torch.contiguous_format), ("channels_last", torch.channels_last)):
        x, w = (item.contiguous(memory_format=memory_format) for item in (sample, weight))
        convolve = lambda x=x, w=w: F.conv2d(x, w, stride=shape["stride"], padding=kernel // 2)  # noqa: E731
        rates[name] = 1e-9 * operations / median_seconds(convolve, device, seconds)
    return rates


class TrainingStep:
    """The two halves of a step like those of train_ddpm.py, on one batch of images and noise that never changes.

    Args:
        network: The network, in float32.
        batch_size: Images a step.
        device: Where the network is.
        mixed: Whether the forward pass runs in bfloat16 under autocast.
    """

    def __init__(self, network: MultiLabelUNet2DModel, batch_size: int, device: torch.device, mixed: bool) -> None:
        self.network = network.train()
        self.ema = ExponentialMovingAverage(network)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        self.inputs = make_inputs(batch_size, device)
        self.target = torch.randn_like(self.inputs[0])
        self.autocast = torch.autocast(device.type, torch.bfloat16) if mixed else contextlib.nullcontext()

    def run_backward(self) -> None:
        """Calculates the loss and its gradients, which replace the last ones."""
        self.optimizer.zero_grad()
        with self.autocast:
            prediction = self.network(*self.inputs).sample
        F.mse_loss(prediction.float(), self.target).backward()

    def update(self) -> None:
        """Clips the gradients and moves the weights and their average."""
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.network)


def condense(events: Sequence[Any], device: torch.device) -> dict[str, float]:
    """Adds up a profile by kinds of operations.

    Args:
        events: The averages of a profiler, a row a name, with times in microseconds.
        device: Whose time is looked at.

    Returns:
        The seconds of every kind that occurs, longest first.
    """
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    seconds: Counter[str] = Counter()
    for event in events:
        # A kernel is counted at the operation that started it, not again as an event of the device.
        if str(event.device_type).endswith("CPU"):
            name = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "other")
            seconds[name] += 1e-6 * getattr(event, attribute)
    return {name: value for name, value in seconds.most_common() if value > 0}


def profile_run(run: Callable[[], Any], device: torch.device, seconds: float) -> dict[str, float]:
    """Profiles some runs, each of which takes so many seconds, and returns the shares of kinds of operations."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        for _ in range(1 if seconds > LONG else 3):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    found = condense(profiler.key_averages(), device)
    return {name: value / sum(found.values()) for name, value in found.items()}


def measure_preset(
    preset: str, machine: dict[str, Any], batch_size: int, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Counts a preset, and measures its convolutions, calls and training steps."""
    counts = count_preset(preset)
    best = machine["best_gigaflop_a_second"]
    convolutions = costliest_convolutions(preset)
    sampling: dict[str, Any] = {}
    training: dict[str, Any] = {}
    for name, dtype in dtypes_of(device).items():
        for shape in convolutions:
            shape[name] = measure_convolution(shape, batch_size, dtype, device, seconds / 4)
        network = nn.Module.to(make_network(preset, device), dtype).eval().requires_grad_(False)
        sampling[name] = {}
        for size in sorted({1, batch_size}):
            inputs = make_inputs(size, device, dtype)
            call = lambda network=network, inputs=inputs: network(*inputs)  # noqa: E731
            duration = median_seconds(call, device, seconds)
            rate = size * counts["gigaflop_a_call"] / duration
            sampling[name][str(size)] = {
                "seconds_a_call": duration,
                "gigaflop_a_second": rate,
                "share_of_best_rate": rate / best[name],
                "profile": profile_run(call, device, duration),
            }
        step = TrainingStep(make_network(preset, device), batch_size, device, mixed=name == "bfloat16")
        backward = median_seconds(step.run_backward, device, seconds)
        update = median_seconds(step.update, device, seconds)
        rate = batch_size * counts["gigaflop_to_train_on_an_image"] / (backward + update)
        training[name] = {
            "batch_size": batch_size,
            "images_per_second": batch_size / (backward + update),
            "seconds_of_forward_and_backward": backward,
            "seconds_of_clipping_optimizer_and_average": update,
            "gigaflop_a_second": rate,
            "share_of_best_rate": rate / best[name],
            "profile_of_forward_and_backward": profile_run(step.run_backward, device, backward),
        }
    return {**counts, "costliest_convolutions": convolutions, "sampling": sampling, "training": training}


def format_preset(name: str, row: dict[str, Any]) -> str:
    """Returns what was found as a few lines."""
    lines = [
        f"{name}: {row['num_parameters'] / 1e6:.1f} M parameters, {row['gigaflop_a_call']:.3f} GFLOP and"
        f" {row['megabytes_moved_by_a_call']:.0f} MB a call, {row['gigaflop_to_train_on_an_image']:.3f} GFLOP to train"
        " on an image"
    ]
    for dtype in row["sampling"]:
        for size, call in row["sampling"][dtype].items():
            share = f"{100 * call['share_of_best_rate']:.1f} % of the best rate"
            lines.append(f"  {dtype}, a call on {size}: {call['seconds_a_call']:.4f} s, {share}")
        step = row["training"][dtype]
        kinds = [f"{kind} {100 * share:.0f} %" for kind, share in step["profile_of_forward_and_backward"].items()]
        update = step["seconds_of_clipping_optimizer_and_average"]
        update_share = update / (update + step["seconds_of_forward_and_backward"])
        lines.append(
            f"  {dtype}, training in batches of {step['batch_size']}: {step['images_per_second']:.1f} images/s,"
            f" {100 * step['share_of_best_rate']:.1f} % of the best rate, {100 * update_share:.0f} % of the time for"
            f" the update; the rest: {', '.join(kinds)}"
        )
    return "\n".join(lines)


def start_record(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the record to go on with, or a new one.

    Raises:
        ValueError: If the record at `path` was made under other settings.
    """
    if not path.exists():
        return {"schema_version": SCHEMA_VERSION, "settings": settings}
    record = json.loads(path.read_text(encoding="utf-8"))
    theirs = record.get("settings", {})
    differing = [name for name in settings if theirs.get(name) != settings[name]]
    if differing:
        changes = "; ".join(f"{name}: {theirs.get(name)} there, {settings[name]} here" for name in differing)
        raise ValueError(f"`out` {path} holds measurements of other settings ({changes}); remove it, or name another.")
    return record


def main() -> None:
    """Measures, prints and writes the result; what a user gave wrongly ends it with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=tuple(PRESETS), default=list(PRESETS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device().type, help="cpu or cuda")
    parser.add_argument("--batch_size", type=int, help="images together; by default what suits device and preset")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on each measurement, at least")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "limits.json")
    arguments = parser.parse_args()
    if arguments.batch_size is not None and arguments.batch_size < 1:
        parser.error(f"`batch_size` must be at least 1, got {arguments.batch_size}.")
    if not 0 < arguments.seconds < float("inf"):
        parser.error(f"`seconds` must be positive and finite, got {arguments.seconds}.")

    device = torch.device(arguments.device)
    environment = describe_environment(device)
    settings = {
        "machine": environment["machine"],
        "device": device.type,
        "num_threads": torch.get_num_threads(),
        "versions": environment["versions"],
        "batch_size": arguments.batch_size,
        "seconds": arguments.seconds,
    }
    try:
        torch.zeros(1, device=device)
        record = start_record(arguments.out, settings)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        parser.error(str(error).partition("\n")[0])

    record["what"] = "What a machine can calculate, and how much of it training and sampling reach."
    if "rates" not in record:
        record["rates"] = measure_machine(device, arguments.seconds)
    presets = record.setdefault("presets", {})
    for name in arguments.presets:
        if name not in presets:
            batch_size = arguments.batch_size or BATCH_SIZES[device.type][name]
            row = measure_preset(name, record["rates"], batch_size, device, arguments.seconds)
            presets[name] = row | {
                "git_commit": environment["git_commit"],
                "load_average": os.getloadavg()[0],
            }
            record |= {"command": shlex.join(["python", *sys.argv]), "environment": environment}
            record["date"] = datetime.date.today().isoformat()
            write_text(arguments.out, json.dumps(record, indent=2) + "\n")
        print(format_preset(name, presets[name]), flush=True)
    best = ", ".join(f"{name} {rate:.0f}" for name, rate in record["rates"]["best_gigaflop_a_second"].items())
    print(f"Best rates in GFLOP a second: {best}; written to {arguments.out}")


if __name__ == "__main__":
    main()

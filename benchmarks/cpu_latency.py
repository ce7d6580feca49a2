"""Measures how long one image and a batch of images take under torch, ONNX Runtime and OpenVINO, on the CPU.

    python benchmarks/cpu_latency.py [PIPELINE ...] --num_steps 20 4

All ways to run a pipeline are timed in turn, round by round, so that what else the machine does meets all of them.
`compiled` and `onnx` are the package's own backends; `openvino` runs the file of `onnx`, if the package is there, and is
no part of this package. Each is held against plain torch: the largest difference of a pixel, in [0, 1], says whether it
is as good. One call of the reported network (113.7 M parameters) is timed in the same rounds; 1000 times it is what an
image took as reported, drawn alone, and `benchmarks/results/sampling.json` has one that was drawn in full.

A number of steps of a pipeline is written down once it is measured. The same command goes on after the last.
"""

import argparse
import copy
import datetime
import importlib.util
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from iclevr_diffusion import ConditionalDDPMPipeline, MultiLabelUNet2DModel, load_pipeline
from iclevr_diffusion.environment import describe_environment
from iclevr_diffusion.evaluate import pipeline_name
from iclevr_diffusion.files import write_text
from iclevr_diffusion.judging import weights_sha256
from iclevr_diffusion.loading import DEFAULT_PIPELINE, compile_networks
from iclevr_diffusion.onnx_backend import OnnxDDPMPipeline

SCHEMA_VERSION = 1
TOLERANCE = 1e-3  # of a pixel in [0, 1]
REPORTED_CALLS = 1000
SYSTEMS = ("torch", "channels_last", "bfloat16", "compiled", "onnx", "openvino")
ON_CPU_ALONE = ("onnx", "openvino")


class OpenVINOPipeline(OnnxDDPMPipeline):
    """Runs the graph of its parent under OpenVINO, in float32."""

    def _open_session(self, path: Path) -> "_OpenVINOSession":
        return _OpenVINOSession(path)


class _OpenVINOSession:
    """The part of an ONNX Runtime session that a pipeline calls."""

    def __init__(self, path: Path) -> None:
        import openvino

        options = {
            "INFERENCE_PRECISION_HINT": "f32",  # it would take bfloat16 where the processor has it
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self.model = openvino.Core().compile_model(path, "CPU", options)

    def run(self, _: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [self.model(inputs)[0]]


def make_system(name: str, pipeline: ConditionalDDPMPipeline, device: torch.device) -> ConditionalDDPMPipeline:
    """Makes another pipeline with the weights of `pipeline`, float32 on the CPU, that runs as `name` says.

    Raises:
        ImportError: If a package for it is missing.
    """
    if name == "openvino" and importlib.util.find_spec("openvino") is None:
        raise ImportError("openvino is not installed")
    if name in ON_CPU_ALONE:
        if device.type != "cpu":
            raise ImportError(f"it is measured on the CPU alone, not on {device.type}")
        made = (OnnxDDPMPipeline if name == "onnx" else OpenVINOPipeline).from_torch(pipeline)
    else:
        unet = copy.deepcopy(pipeline.unet).to(device)
        if name == "channels_last":
            unet = unet.to(memory_format=torch.channels_last)
        elif name == "bfloat16":
            unet = unet.to(memory_format=torch.channels_last, dtype=torch.bfloat16)
        made = ConditionalDDPMPipeline(
            unet,
            copy.deepcopy(pipeline.scheduler),
            pipeline.vocabulary.names,
            pipeline.config.default_num_inference_steps,
            pipeline.config.default_guidance_scale,
        )
        if name == "compiled":
            compile_networks(made)
    made.set_progress_bar_config(disable=True)
    return made


def measure(
    pipeline: ConditionalDDPMPipeline,
    reported: Callable[[], Any],
    *,
    num_steps: int,
    batch_sizes: list[int],
    systems: list[str],
    num_rounds: int,
    device: torch.device,
) -> dict[str, Any]:
    """Measures all systems of one pipeline side by side.

    Returns:
        For each system `first_call_seconds`, which holds what is prepared once (for `onnx` the export too, if no
        earlier run has left its file), the `difference` from torch, whether it is `within_tolerance`, and by batch size
        the median, the shortest and the number of `seconds_an_image`; or what is `missing`. `reported_call_seconds` is
        the median time of `reported`.
    """
    labels = pipeline.vocabulary.names

    def draw(system: ConditionalDDPMPipeline, batch_size: int) -> np.ndarray:
        class_labels = [[labels[image % len(labels)]] for image in range(batch_size)]
        seeds = list(range(batch_size))
        options = {"num_inference_steps": num_steps, "micro_batch_size": batch_size, "output_type": "np"}
        return system(class_labels, seeds=seeds, **options).images

    expected = {size: draw(make_system("torch", pipeline, device), size) for size in batch_sizes}
    made, records = {}, {}
    for name in systems:
        begin = time.perf_counter()
        try:
            made[name] = make_system(name, pipeline, device)
            differences = [float(np.abs(draw(made[name], size) - expected[size]).max()) for size in batch_sizes]
        # Compilers and exporters fail in ways of their own; the others are measured all the same.
        except Exception as error:
            made.pop(name, None)
            records[name] = {"missing": f"{type(error).__name__}: {error}".partition("\n")[0][:300]}
            continue
        records[name] = {
            "first_call_seconds": time.perf_counter() - begin,
            "difference": max(differences),
            "within_tolerance": max(differences) <= TOLERANCE,
            "seconds_an_image": {},
        }
    seconds = {(name, size): [] for name in made for size in batch_sizes}
    reported_seconds = []
    for _ in range(num_rounds):
        for (name, size), measured in seconds.items():
            begin = time.perf_counter()
            draw(made[name], size)
            measured.append((time.perf_counter() - begin) / size)
        begin = time.perf_counter()
        reported()
        reported_seconds.append(time.perf_counter() - begin)
    for (name, size), measured in seconds.items():
        records[name]["seconds_an_image"][str(size)] = {
            "median": statistics.median(measured),
            "shortest": min(measured),
            "number": len(measured),
        }
    return {"systems": records, "reported_call_seconds": statistics.median(reported_seconds)}


def reported_call(device: torch.device) -> Callable[[], Any]:
    """Makes a function that asks the reported network once, with random weights, and waits for the answer."""
    unet = MultiLabelUNet2DModel.from_preset("reported", num_classes=24, sample_size=64).eval().to(device)
    sample, class_labels = torch.randn(1, 3, 64, 64, device=device), torch.eye(24, device=device)[:1]

    @torch.no_grad()
    def call() -> None:
        unet(sample, 500, class_labels).sample.cpu()

    call()
    return call


def format_results(results: dict[str, Any]) -> str:
    """Writes a line for each measured system."""
    lines = []
    for run in results["runs"].values():
        slowest = REPORTED_CALLS * run["reported_call_seconds"]
        lines.append(f"{run['pipeline']}, {run['num_steps']} steps; as reported, an image takes {slowest:.4g} s")
        for name, record in run["systems"].items():
            if "missing" in record:
                lines.append(f"  {name:<14}missing: {record['missing']}")
                continue
            times = "  ".join(
                f"{size} at a time {times['median']:.4g} s ({slowest / times['median']:.0f}x)"
                for size, times in record["seconds_an_image"].items()
            )
            mark = "" if record["within_tolerance"] else ", NOT within the tolerance"
            lines.append(f"  {name:<14}{times}  difference {record['difference']:.1e}{mark}")
    return "\n".join(lines)


def load_results(file: Path, circumstances: dict[str, Any]) -> dict[str, Any]:
    """Opens what an earlier run measured under the same circumstances, or begins anew."""
    if file.is_file():
        results = json.loads(file.read_text(encoding="utf-8"))
        if all(results.get(key) == value for key, value in circumstances.items()):
            return results
    return {**circumstances, "runs": {}}


def open_pipeline(source: str) -> DiffusionPipeline:
    """Opens a pipeline that all systems can run.

    Raises:
        ValueError: If it is no diffusion model, or one with a guide.
    """
    pipeline = load_pipeline(source)
    if type(pipeline) is not ConditionalDDPMPipeline:
        raise ValueError(f"`pipelines` must be diffusion models, got {source}, a {type(pipeline).__name__}.")
    if pipeline.guide is not None:
        raise ValueError(f"`pipelines` must be guided by nothing but themselves, got {source}, which has a guide.")
    return pipeline


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "pipelines", nargs="*", default=[DEFAULT_PIPELINE], help="folders, hub ids or names of diffusion models"
    )
    parser.add_argument("--num_steps", type=int, nargs="+", default=None, help="by default each pipeline's own")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--num_rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda without onnx and openvino")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_latency.json")
    arguments = parser.parse_args()
    counts = [*arguments.batch_sizes, *(arguments.num_steps or []), arguments.num_rounds]
    if min(counts) < 1:
        parser.error(f"`batch_sizes`, `num_steps` and `num_rounds` must be at least 1, got {min(counts)}.")
    return arguments


def main() -> None:
    """Measures, prints and writes the result; what a user gave wrongly ends it with one line."""
    arguments = parse_arguments()
    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device)
        pipelines = {source: open_pipeline(source) for source in arguments.pipelines}
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        sys.exit(f"cpu_latency.py: {str(error).partition(chr(10))[0]}")
    environment = describe_environment(device)
    for name in ("onnxruntime", "openvino"):
        if importlib.util.find_spec(name) is not None:
            environment["versions"][name] = metadata.version(name)
    circumstances = {
        "schema_version": SCHEMA_VERSION,
        "what": "Seconds an image, alone and in a batch; all systems in turn, round by round.",
        "tolerance": TOLERANCE,
        "reported_calls": REPORTED_CALLS,
        "batch_sizes": arguments.batch_sizes,
        "num_rounds": arguments.num_rounds,
        "asked_for": arguments.systems,
        "environment": environment,
    }
    results = load_results(arguments.out, circumstances)
    reported = None
    for source, pipeline in pipelines.items():
        for num_steps in arguments.num_steps or [pipeline.config.default_num_inference_steps]:
            key = f"{weights_sha256(pipeline.unet)[:16]} {num_steps}"
            if key in results["runs"]:
                continue
            reported = reported or reported_call(device)
            measured = measure(
                pipeline,
                reported,
                num_steps=num_steps,
                batch_sizes=arguments.batch_sizes,
                systems=arguments.systems,
                num_rounds=arguments.num_rounds,
                device=device,
            )
            results["runs"][key] = {
                "pipeline": pipeline_name(source),
                "num_steps": num_steps,
                "guidance_scale": pipeline.config.default_guidance_scale,
                "scheduler": type(pipeline.scheduler).__name__,
                **measured,
                "command": shlex.join(["python", *sys.argv]),
                "date": datetime.date.today().isoformat(),
            }
            write_text(arguments.out, json.dumps(results, indent=2) + "\n")
    print(format_results(results))
    print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()

"""The flags that `iclevr-sample` and `iclevr-evaluate` share."""

import argparse
import inspect
import io
import sys
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from iclevr_diffusion.environment import default_device, device_fault
from iclevr_diffusion.flow_solver import straight_path
from iclevr_diffusion.loading import BACKENDS, DEFAULT_PIPELINE, load_pipeline

SAMPLING_OPTIONS = ("num_inference_steps", "guidance_scale")  # flags that not every kind of pipeline has


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which pipeline draws, and how."""
    parser.add_argument(
        "--pipeline", default=None, help=f"folder or hub id; by default {DEFAULT_PIPELINE}, which comes along"
    )
    parser.add_argument("--revision", default=None, help="branch, tag or commit of a hub id")
    parser.add_argument("--num_inference_steps", type=int, default=None, help="steps; by default the pipeline's own")
    parser.add_argument("--guidance_scale", type=float, default=None, help="1 is off; by default the pipeline's own")
    parser.add_argument(
        "--guide", default=None, help="a weaker model, folder or hub id, that guidance leads away from"
    )
    parser.add_argument("--scheduler", default=None, help="a scheduler class of diffusers, such as DDIMScheduler")
    parser.add_argument("--micro_batch_size", type=int, default=64, help="images that go through the network at once")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="type of the weights"
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="torch",
        help="what runs a diffusion model's network; compiled takes long to begin and less for each image drawn alone, by"
        " CUDA graphs on a GPU; onnx takes all steps in one graph on the CPU",
    )
    parser.add_argument(
        "--device", default=None, help="such as cpu, cuda or mps; by default cuda where it works, else cpu"
    )


def print_any_label() -> None:
    """Has what the terminal's encoding lacks printed as escapes, where an error would end the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not what a test or a notebook has put there
            stream.reconfigure(errors="backslashreplace")


def open_pipeline(args: argparse.Namespace, device: str | torch.device | None) -> DiffusionPipeline:
    """Opens the pipeline that the flags of `add_pipeline_arguments` name, with the scheduler they name.

    Args:
        args: The flags.
        device: Where it draws; by default on a GPU that works, else on the CPU.

    Raises:
        ValueError: If there is no such device, or a flag does not fit the pipeline.
    """
    if args.backend == "onnx" and args.device is None:
        device = "cpu"  # where alone it runs
    elif device is None:
        device = default_device()
    elif (fault := device_fault(device)) is not None:
        raise ValueError(f"`device` must be one of this machine's, such as cpu or cuda, got {str(device)!r}: {fault}")
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    pipeline = load_pipeline(
        args.pipeline,
        revision=args.revision,
        device=device,
        dtype=dtype,
        backend=args.backend,
        guide=args.guide,
    )
    if args.scheduler is not None:
        pipeline.scheduler = make_scheduler(args.scheduler, pipeline)
    return pipeline


def find_scheduler_class(name: Any) -> type[diffusers.SchedulerMixin]:  # noqa: ANN401 -- read from a file, maybe
    """Returns the scheduler class of diffusers of that name.

    Raises:
        ValueError: If `name` is not that of one.
    """
    scheduler_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)):
        raise ValueError(f"`scheduler` must name a scheduler class of diffusers such as DDIMScheduler, got {name!r}.")
    return scheduler_class


def make_scheduler(name: str, pipeline: DiffusionPipeline) -> diffusers.SchedulerMixin:
    """Makes the named scheduler of diffusers with the noise schedule of the pipeline's own one."""
    scheduler_class = find_scheduler_class(name)
    if not hasattr(pipeline, "scheduler"):
        raise ValueError(
            f"`scheduler` must be left out for a {type(pipeline).__name__}, which has none, got {name!r}."
        )
    config, overrides = pipeline.scheduler.config, {}
    accepted = inspect.signature(scheduler_class).parameters
    if "clip_sample" in accepted:
        overrides["clip_sample"] = config.get("clip_sample", False)  # diffusers clips by default, to [-1, 1]
    if pipeline.unet.config.prediction_type == "flow":
        straight = straight_path(config)
        if "use_flow_sigmas" in accepted:
            overrides |= straight
        elif "shift" in accepted:
            overrides["shift"] = straight["flow_shift"]
    return scheduler_class.from_config(config, **overrides)

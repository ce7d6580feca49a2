"""Measures how long pipelines take to draw an image, beside the reported DDPM network at 1000, 50 and 10 calls.

    python benchmarks/sampling.py [PIPELINE ...] --device cuda

By default the pipelines that come along are measured. The reported networks (DDPM, DCGAN, SAGAN, CGAN) are always
measured too, in one run and on one machine, with random weights, which take as long as trained ones. Every image that
is drawn alone is drawn in full; a batch of a pipeline with more than 50 steps is timed on 50 of them and multiplied,
and the result says so. `iclevr-compare` writes the section "Sampling time" of the leaderboard from the result.
"""

import argparse
import datetime
import itertools
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline

from iclevr_diffusion import ICLEVR_LABELS, ConditionalDDPMPipeline, MultiLabelUNet2DModel, load_pipeline
from iclevr_diffusion.call_options import call_options, takes
from iclevr_diffusion.cost import measure_cost
from iclevr_diffusion.environment import default_device, describe_environment
from iclevr_diffusion.files import write_text
from iclevr_diffusion.leaderboard_sampling import SCHEMA_VERSION, YARDSTICK
from iclevr_diffusion.models.cgan import CGANGenerator
from iclevr_diffusion.models.dcgan import DCGANGenerator
from iclevr_diffusion.models.sagan import SAGANGenerator
from iclevr_diffusion.pipelines.pipeline_conditional_gan import ConditionalGANPipeline

TIMED_STEPS = 50  # of a batch that takes more
GENERATORS = {"DCGAN": DCGANGenerator, "SAGAN": SAGANGenerator, "CGAN": CGANGenerator}


def reported_pipelines() -> Iterator[tuple[str, DiffusionPipeline]]:
    """Makes pipelines around the reported networks, with random weights; the DDPM's ancestral sampler takes 1000 steps."""
    names = list(ICLEVR_LABELS.names)
    unet = MultiLabelUNet2DModel.from_preset(
        "reported", num_classes=len(names), sample_size=64, prediction_type="epsilon"
    )
    schedule = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
    for scheduler, steps in (
        (DDPMScheduler(**schedule), 1000),
        (DDIMScheduler(**schedule), 50),
        (DDIMScheduler(**schedule), 10),
    ):
        options = {"default_num_inference_steps": steps, "default_guidance_scale": 1.0}
        name = YARDSTICK if steps == 1000 else f"reported DDPM network, {steps} calls of DDIM"
        yield name, ConditionalDDPMPipeline(unet, scheduler, label_names=names, **options)
    for name, generator_class in GENERATORS.items():
        yield f"reported {name}", ConditionalGANPipeline(generator_class(len(names), 64), names)


def open_named(sources: list[str]) -> dict[str, DiffusionPipeline]:
    """Opens pipelines, named by their folders; without any, those that come along.

    Raises:
        ValueError: If there is no such pipeline, two share a name, or one maps images and draws none.
    """
    if not sources:
        shipped = Path(__file__).parents[1] / "pipelines"
        sources = [str(path.parent) for path in sorted(shipped.glob("*/model_index.json"))]
    pipelines: dict[str, DiffusionPipeline] = {}
    for source in sources:
        path = Path(source).resolve()
        name = path.parent.name if path.name in ("pipeline", "best_pipeline") else path.name
        if name in pipelines:
            raise ValueError(f"`pipelines` must have distinct names, got {name} twice; rename a folder.")
        pipelines[name] = load_pipeline(source)
        if not takes(pipelines[name], "class_labels"):
            raise ValueError(f"`pipelines` must draw images of labels or of nothing, got {source}, which maps images.")
    return pipelines


def measure(pipeline: DiffusionPipeline, batch_size: int) -> dict[str, Any]:
    """Measures one image alone and `batch_size` together, as the pipeline draws by default."""
    is_told = pipeline.vocabulary is not None
    pipeline.set_progress_bar_config(disable=True)
    options = call_options(pipeline, {})
    steps = options.get("num_inference_steps", 1)
    few = options | ({"num_inference_steps": TIMED_STEPS} if steps > TIMED_STEPS else {})
    share = steps / few.get("num_inference_steps", 1)

    def draw(num_images: int, options: dict[str, Any] = few) -> None:
        what = {"class_labels": [[0]] * num_images} if is_told else {"num_images": num_images}
        seeds = list(range(num_images))
        pipeline(**what, seeds=seeds, micro_batch_size=num_images, output_type="np", **options)

    networks = [model for model in pipeline.components.values() if isinstance(model, torch.nn.Module)]
    cost = measure_cost(draw, networks, batch_size=batch_size)
    if few != options:  # what was measured until here has warmed everything up
        begin = time.perf_counter()
        draw(1, options)
        cost["seconds_for_one_image"] = time.perf_counter() - begin
    return {
        "class": type(pipeline).__name__,
        "options": options,
        "num_parameters": sum(weight.numel() for model in networks for weight in model.parameters()),
        "network_calls_per_image": round(cost["network_calls_per_image"] * share),
        "seconds_for_one_image": cost["seconds_for_one_image"],
        "seconds_an_image_in_a_batch": share / cost["images_per_second"],
        "batch_timed_on_steps": None if few == options else TIMED_STEPS,
    }


def main() -> None:
    """Measures, prints and writes the result; what a user gave wrongly ends it with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="*", help="folders, hub ids or names of pipelines that come along")
    parser.add_argument("--device", default=default_device().type, help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch_size", type=int, default=4, help="images that are drawn together")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sampling.json")
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        parser.error(f"`batch_size` must be at least 1, got {arguments.batch_size}.")

    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device)
        named = open_named(arguments.pipelines)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        parser.error(str(error).partition("\n")[0])
    systems: dict[str, Any] = {}
    for name, pipeline in itertools.chain(named.items(), reported_pipelines()):
        systems[name] = measure(pipeline.to(device, getattr(torch, arguments.dtype)), arguments.batch_size)
        print(f"{name}: {systems[name]['seconds_for_one_image']:.4g} seconds for one image", flush=True)
    environment = describe_environment(device)
    result = {
        "schema_version": SCHEMA_VERSION,
        "what": "Seconds to draw an image alone, and each of a batch, in one run on one machine.",
        "machine": environment["machine"],
        "device": device.type,
        "dtype": arguments.dtype,
        "num_threads": torch.get_num_threads(),
        "batch_size": arguments.batch_size,
        "systems": systems,
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment,
        "date": datetime.date.today().isoformat(),
    }
    write_text(arguments.out, json.dumps(result, indent=2) + "\n")
    print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()

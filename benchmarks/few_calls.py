"""Measures how good the images of few network calls are, for several samplers, beside 1000 steps of the model's own.

    python benchmarks/few_calls.py [PIPELINE ...] --out outputs/few_calls
    python benchmarks/few_calls.py --samplers euler --steps 20 --guidance 2 3 5 7 --intervals 0:1 0:0.5 0.2:0.8 \
        --results outputs/guidance.json

Every point draws the same label sets from the same seeds: by a sampler, with so many steps, and guidance as the pipeline
has it or, with `--guidance` and `--intervals`, every combination of these. A judge that had no part in the training
reads the images. A point is also set beside the pipeline as it ships, set by set, and beside 1000 steps of the model's
own sampler, from whose images those of a deterministic sampler differ by its error alone; these are drawn of few label
sets (`--reference_conditions`). Steps are looks at one state of the image, so that Heun's method, which looks twice a
step, takes half as many; guidance asks the network twice a look, and counts twice among network calls. A student,
and any pipeline that takes fewer steps by itself than the fewest of `--steps`, is drawn as it ships only.

Drawn images are kept in `--out`: the same command goes on where it was stopped. `--results` gets all numbers, and beside
it lie a plot (.png) and a sheet of the first images of every point (_images.png).
"""

import argparse
import datetime
import hashlib
import io
import itertools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Tensor
from yardstick import Yardstick, format_score

from iclevr_diffusion import load_pipeline
from iclevr_diffusion.call_options import call_options, takes
from iclevr_diffusion.data import open_store
from iclevr_diffusion.environment import default_device, describe_environment
from iclevr_diffusion.evaluate import pipeline_name
from iclevr_diffusion.files import judge_name, write_text
from iclevr_diffusion.flow_solver import straight_path
from iclevr_diffusion.images import make_table, save_png
from iclevr_diffusion.judging import load_judge, weights_sha256
from iclevr_diffusion.provenance import training_facts
from iclevr_diffusion.rendering import render_dataset
from iclevr_diffusion.scores import score_difference, top_k_hits

SCHEMA_VERSION = 1
NEAR_TICKS = 1.08  # ratio of two ticks below which their labels would run into each other
SAMPLERS = ("euler", "euler-even", "heun", "dpm-solver++", "unipc")
SHIPPED, REFERENCE = "as it ships", "1000 steps"
NUM_REFERENCE_STEPS = 1000
SHORTEST_SIGNAL = -5.1  # log of signal over noise at which DPM-Solver++ begins, where a schedule goes further
NUM_SHOWN = 8
# Colours that stay apart for the colour-blind (*Color Universal Design*, Okabe and Ito, 2008).
STYLES = [("#0072B2", "o"), ("#56B4E9", "P"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v")]


@dataclass(frozen=True)
class Point:
    """A way of drawing; None leaves a setting as the pipeline has it.

    Args:
        sampler: One of `SAMPLERS`, `SHIPPED` or `REFERENCE`.
        steps: Looks at a state of the image.
        guidance_scale: Guidance.
        guidance_interval: Part of the steps in which it is on.
    """

    sampler: str
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    @property
    def num_inference_steps(self) -> int | None:
        """The argument of the pipeline's call. Heun's method looks twice at all states but the first."""
        return (self.steps + 1) // 2 if self.sampler == "heun" and self.steps is not None else self.steps

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        given = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        given["guidance_interval"] = None if self.guidance_interval == (0.0, 1.0) else self.guidance_interval
        return {name: value for name, value in given.items() if value is not None}

    @property
    def name(self) -> str:
        """Words for tables."""
        words = [self.sampler] + ([] if self.steps is None or self.sampler == REFERENCE else [str(self.steps)])
        words += [] if self.guidance_scale is None else [f"guidance {self.guidance_scale:g}"]
        start, stop = self.guidance_interval
        return ", ".join(words + ([] if (start, stop) == (0, 1) else [f"from {start:g} to {stop:g}"]))


def make_scheduler(pipeline: DiffusionPipeline, sampler: str) -> SchedulerMixin:
    """Makes a scheduler for a pipeline's network, on the noise schedule of the pipeline's own.

    - `euler`: straight steps. For a flow these are diffusers' own times, the last of which lies next to 0: of few steps
      one changes next to nothing, but for networks that put out images. Otherwise it is DDIM, on the pipeline's times.
    - `euler-even`: for a flow, straight steps on the times of `dpm-solver++`, which divide the way evenly before they
      are shifted.
    - `heun`: two looks a step, of which the second corrects the first.
    - `dpm-solver++`: order 2 with several steps' predictions of x_0 (*DPM-Solver++*, Lu et al., 2022,
      https://arxiv.org/abs/2211.01095).
    - `unipc`: order 2 with a corrector that needs no further look (*UniPC*, Zhao et al., 2023,
      https://arxiv.org/abs/2302.04867).
    - `REFERENCE`: for a flow Euler's, otherwise the ancestral sampler of Ho et al. (2020).

    The last two solvers tell a flow's network whole numbers for times, as diffusers rounds them off: an error of up to
    a thousandth of the way, which more steps do not take away.

    Raises:
        ValueError: If the network and this sampler do not go together.
    """
    config = pipeline.scheduler.config
    if pipeline.unet.config.prediction_type == "flow":
        straight = straight_path(config)
        shift = straight["flow_shift"]
        makers: dict[str, Callable[[], SchedulerMixin]] = {
            "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=shift),
            "euler-even": lambda: DPMSolverMultistepScheduler(solver_order=1, **straight),
            "heun": lambda: FlowMatchHeunDiscreteScheduler(shift=shift),
            "dpm-solver++": lambda: DPMSolverMultistepScheduler(**straight),
            "unipc": lambda: UniPCMultistepScheduler(**straight),
            REFERENCE: lambda: FlowMatchEulerDiscreteScheduler(shift=shift),
        }
    else:
        # Where almost no signal is left at first, the first step would reach over most of the scale of the logarithm.
        is_long = config.get("beta_schedule") == "squaredcos_cap_v2"
        clipped = {"lambda_min_clipped": SHORTEST_SIGNAL} if is_long else {}
        makers = {
            "euler": lambda: DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False)),
            "dpm-solver++": lambda: DPMSolverMultistepScheduler.from_config(config, **clipped),
            "unipc": lambda: UniPCMultistepScheduler.from_config(config),
            REFERENCE: lambda: DDPMScheduler.from_config(config),
        }
        if not is_long:
            makers["heun"] = lambda: HeunDiscreteScheduler.from_config(config)
    if sampler not in makers:
        raise ValueError(
            f"`sampler` must be one of {', '.join(makers)} for a network that predicts"
            f" {pipeline.unet.config.prediction_type} on this noise schedule, got {sampler}."
        )
    return makers[sampler]()


def draw(
    pipeline: DiffusionPipeline, point: Point, class_labels: Tensor, seeds: Sequence[int], batch_size: int
) -> tuple[np.ndarray, dict[str, float]]:
    """Draws images as a point says and leaves the pipeline as it was.

    Returns:
        Images, uint8 (N, 3, H, W), and `seconds` and `network_calls_per_image`.
    """
    own, num_rows = getattr(pipeline, "scheduler", None), 0

    def count(network: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        nonlocal num_rows
        num_rows += max(len(x) for x in (*arguments, *keywords.values()) if isinstance(x, Tensor) and x.ndim > 1)

    with ExitStack() as stack:
        for network in pipeline.components.values():
            if isinstance(network, torch.nn.Module):
                stack.callback(network.register_forward_pre_hook(count, with_kwargs=True).remove)
        if point.sampler != SHIPPED:
            stack.callback(setattr, pipeline, "scheduler", own)
            pipeline.scheduler = make_scheduler(pipeline, point.sampler)
        begin = time.perf_counter()
        drawn = pipeline(
            class_labels, seeds=list(seeds), micro_batch_size=batch_size, output_type="np", **point.options
        )
        seconds = time.perf_counter() - begin
    num_drawn = -(-len(seeds) // batch_size) * batch_size  # with those that fill the last batch up
    calls = max(1, num_rows / num_drawn)  # a network of which only a part draws is not called as a whole
    facts = {"seconds": round(seconds, 2), "network_calls_per_image": calls}
    return (drawn.images.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 3, 1, 2), facts


class FewCalls:
    """Points of one pipeline: draws those that are missing, measures all.

    Args:
        pipeline: The pipeline.
        yardstick: What is drawn, and what it is measured by.
        out: Folder for drawn images.
        num_reference_conditions: Label sets that the slow sampler draws, the first ones of the yardstick.
        batch_size: Images that go through the network at once.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        yardstick: Yardstick,
        out: Path,
        *,
        num_reference_conditions: int,
        batch_size: int,
    ) -> None:
        self.pipeline, self.yardstick, self.out, self.batch_size = pipeline, yardstick, out, batch_size
        self.num_reference = min(num_reference_conditions, len(yardstick.class_labels))
        models = [model for model in pipeline.components.values() if isinstance(model, torch.nn.Module)]
        self._defaults = call_options(pipeline, {})
        self._identity = {
            "weights_sha256": weights_sha256(*models),
            "batch_size": batch_size,
            "device": pipeline.device.type,
            "dtype": str(models[0].dtype),
        }

    def points(
        self,
        samplers: Sequence[str],
        steps: Sequence[int],
        guidance: Sequence[float | None],
        intervals: Sequence[tuple[float, float]],
    ) -> list[Point]:
        """Lists what is to be drawn of this pipeline: as it ships first, the slow sampler last."""
        is_student = self.pipeline.config.get("student_num_inference_steps") is not None
        if is_student or "num_inference_steps" not in self._defaults:
            return [Point(SHIPPED)]
        is_flow = self.pipeline.unet.config.prediction_type == "flow"
        ways = [Point(*way) for way in itertools.product(samplers, steps, guidance, intervals)]
        if not is_flow:  # where Euler's times are the pipeline's own, `euler-even` is no other sampler
            ways = [way for way in ways if way.sampler != "euler-even"]
        slow = [Point(REFERENCE, NUM_REFERENCE_STEPS)] if self.num_reference else []
        return [Point(SHIPPED), *ways, *slow]

    def draw(self, point: Point) -> tuple[np.ndarray, dict[str, float]]:
        """Returns the images of a point and what they cost, drawn now or before."""
        num_conditions = self.num_reference if point.sampler == REFERENCE else len(self.yardstick.class_labels)
        class_labels = self.yardstick.drawn_labels[: num_conditions * self.yardstick.images_a_condition]
        scheduler = getattr(self.pipeline, "scheduler", None)
        if point.sampler != SHIPPED:
            scheduler = make_scheduler(self.pipeline, point.sampler)
        # What is drawn, in words that are the same for two points that draw the same.
        settings = self._identity | self._defaults | point.options | {"class_labels": class_labels.int().tolist()}
        if scheduler is not None:
            config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
            settings["scheduler"] = [type(scheduler).__name__, config]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        path = self.out / f"{digest[:32]}.npz"
        if not path.exists():
            pixel_values, facts = draw(
                self.pipeline, point, class_labels, range(len(class_labels)), min(self.batch_size, len(class_labels))
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}")
            with unfinished.open("wb") as file:
                np.savez(file, pixel_values=pixel_values, facts=json.dumps(facts))
            os.replace(unfinished, path)
        with np.load(path) as saved:
            return saved["pixel_values"], json.loads(str(saved["facts"]))

    def measure(self, points: Sequence[Point]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """Draws and measures points, and prints a line for each.

        Returns:
            A record a point, and the first images of each, one of a label set, by its name.
        """
        drawn, records = {}, []
        for point in sorted(points, key=lambda point: point.sampler != REFERENCE):  # whose images others need
            try:
                drawn[point] = self.draw(point)
            except ValueError as error:
                records.append({"name": point.name, **asdict(point), "missing": str(error)})
                print(f"  {point.name}: {error}", flush=True)
                continue
            print(f"  {point.name}: drawn, {drawn[point][1]['seconds']:.0f} s", flush=True)
        slow = next((drawn[point] for point in drawn if point.sampler == REFERENCE), None)
        measured = {point: self._measure_few(drawn[point], slow) for point in drawn}
        for point in drawn:
            if point.sampler != REFERENCE:
                measured[point] = self.yardstick.measure(drawn[point][0]) | measured[point]
        own, class_labels = measured[Point(SHIPPED)]["logits"], self.yardstick.class_labels
        for point in [point for point in points if point in drawn]:
            record = {"name": point.name, **asdict(point), **drawn[point][1], **measured[point]}
            if (logits := record.pop("logits", None)) is not None:
                difference = score_difference(logits, own, class_labels, resampled="conditions")
                record["top_k_above_shipped"] = difference["top_k"]
            records.append(record)
            print(f"  {describe(record)}", flush=True)
        every = self.yardstick.images_a_condition
        return records, {point.name: drawn[point][0][::every][:NUM_SHOWN] for point in points if point in drawn}

    def _measure_few(self, drawn: tuple[np.ndarray, Any], slow: tuple[np.ndarray, Any] | None) -> dict[str, Any]:
        """Measures the images of the label sets that the slow sampler draws too."""
        if slow is None:
            return {}
        pixel_values = drawn[0][: len(slow[0])]
        labels = self.yardstick.drawn_labels[: len(slow[0])]
        hits = top_k_hits(self.yardstick.read(pixel_values).logits, labels).sum().item()
        error = np.square(pixel_values.astype(np.float64) - slow[0]).mean() ** 0.5
        few = {"num_images": len(slow[0]), "top_k": hits / labels.sum().item()}
        return {"on_reference": few | {"root_mean_square_difference": error}}


def describe(record: dict[str, Any]) -> str:
    """Writes a point's numbers in one line."""
    if "top_k" not in record:
        few = record["on_reference"]
        return f"{record['name']}: top-k {few['top_k']:.3f} of {few['num_images']} images"
    diversity = "-" if record["diversity"] is None else f"{record['diversity']:.2f}"
    text = (
        f"{record['name']}: {record['network_calls_per_image']:g} calls, top-k {format_score(record['top_k'])}, exact"
        f" {format_score(record['exact_match'])}, kernel distance {record['kernel_distance']:.3f}, diversity"
        f" {diversity}, top-k above shipped {format_score(record['top_k_above_shipped'])}"
    )
    if few := record.get("on_reference"):
        text += f"; of {few['num_images']} images: top-k {few['top_k']:.3f}, difference from 1000 steps"
        text += f" {few['root_mean_square_difference']:.1f}"
    return text


def draw_plot(pipelines: dict[str, Any], real: dict[str, Any]) -> Image.Image:
    """Plots top-k, exact match and kernel distance, a row a pipeline.

    They stand above network calls or, if several scales were asked for, above guidance.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 0.8 + 3.6 * len(pipelines)), dpi=120, layout="constrained")
    panels = figure.subplots(len(pipelines), 3, squeeze=False)
    titles = {"top_k": "top-k", "exact_match": "exact match", "kernel_distance": "kernel distance (0 is best)"}
    for row, (name, result) in zip(panels, pipelines.items(), strict=True):
        records = [record for record in result["points"] if "top_k" in record]
        slow = next((record for record in result["points"] if record["sampler"] == REFERENCE), None)
        is_swept = len({record["guidance_scale"] for record in records if record["sampler"] != SHIPPED}) > 1
        lines: dict[str, list[tuple[float, dict[str, Any]]]] = {}
        for record in records:
            settings = {key: record[key] for key in ("sampler", "steps", "guidance_scale")}
            settings |= {"guidance_scale": None} if is_swept else {"steps": None}
            line = Point(**settings, guidance_interval=tuple(record["guidance_interval"])).name
            guidance = result["options"].get("guidance_scale", 1.0)
            guidance = guidance if record["guidance_scale"] is None else record["guidance_scale"]
            lines.setdefault(line, []).append((guidance if is_swept else record["network_calls_per_image"], record))
        for axes, (metric, title) in zip(row, titles.items(), strict=True):
            for number, (line, points) in enumerate(lines.items()):
                x, low, value, high = np.array(sorted((at, *_ends(record[metric])) for at, record in points)).T
                color, marker = ("black", "*") if line == SHIPPED else STYLES[(number - 1) % len(STYLES)]
                style = {
                    "color": color,
                    "marker": marker,
                    "linestyle": "-" if len(set(x)) > 1 else "none",
                    "capsize": 2,
                }
                errors = np.maximum([value - low, high - value], 0)
                size = 13 if line == SHIPPED else 6
                axes.errorbar(x, value, errors, label=line, markersize=size, linewidth=1.2, **style)
            if metric == "top_k" and slow is not None and "on_reference" in slow:
                few = slow["on_reference"]
                label = f"{REFERENCE}, {few['num_images']} images"
                axes.axhline(few["top_k"], color="#999999", linestyle=":", label=label)
            if metric in real:
                axes.axhline(real[metric], color="#555555", linestyle="--", linewidth=1, label="real images")
            axes.set_xscale("log")
            ticks = sorted({at for points in lines.values() for at, _ in points})
            axes.set_xticks(ticks, label_ticks(ticks))
            axes.minorticks_off()
            axes.set_xlabel("guidance" if is_swept else "network calls an image")
            axes.set_title(f"{name}:\n{title}", fontsize=10, parse_math=False)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        row[0].legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _ends(score: dict[str, float | None] | float) -> tuple[float, float, float]:
    if not isinstance(score, dict):
        return score, score, score
    low, high = (score["value"] if score[end] is None else score[end] for end in ("low", "high"))
    return low, score["value"], high


def draw_sheet(shown: dict[str, dict[str, np.ndarray]], labels: Sequence[str]) -> Image.Image:
    """Lays out the first images of every point, a row a point."""
    rows, captions = [], []
    for pipeline, points in shown.items():
        for point, images in points.items():
            images = [Image.fromarray(image.transpose(1, 2, 0)) for image in images]
            rows.append(images + [Image.new("RGB", images[0].size, "white")] * (len(labels) - len(images)))
            captions.append(f"{pipeline}\n{point}" if len(shown) > 1 else point)
    return make_table(rows, captions, labels)


def open_named(sources: Sequence[str], device: str, dtype: torch.dtype, judge: str) -> dict[str, DiffusionPipeline]:
    """Opens pipelines, named by their folders.

    Raises:
        ValueError: If there is no such pipeline, two share a name, one draws no labels, or the judge had a part in the
            training of one.
    """
    pipelines: dict[str, DiffusionPipeline] = {}
    for source in sources:
        name = pipeline_name(source)
        if name in pipelines:
            raise ValueError(f"`pipelines` must have distinct names, got {name} twice; rename a folder.")
        pipelines[name] = load_pipeline(source, device=device, dtype=dtype)
        if not takes(pipelines[name], "class_labels") or pipelines[name].vocabulary is None:
            raise ValueError(f"`pipelines` must draw images of labels, got {source}, which does not.")
        if judge_name(Path(judge).resolve()) in (training_facts(source)["judges"] or ()):
            raise ValueError(f"`judge` must have no part in the training of {source}, got {judge}, which had.")
        pipelines[name].set_progress_bar_config(disable=True)
    return pipelines


def label_ticks(ticks: Sequence[float]) -> list[str]:
    """Returns the labels of ticks in rising order on a logarithmic axis; one close to its neighbour joins that one's."""
    labels: list[str] = []
    for i, tick in enumerate(ticks):
        if i and tick < NEAR_TICKS * ticks[i - 1]:
            labels[-1], near = "", labels[-1]
            labels.append(f"{near}, {tick:g}")
        else:
            labels.append(f"{tick:g}")
    return labels


def parse_interval(text: str) -> tuple[float, float]:
    """Reads START:STOP."""
    start, separator, stop = text.partition(":")
    try:
        interval = (float(start), float(stop))
    except ValueError:
        interval = (math.nan, math.nan)
    if not separator or not 0 <= interval[0] <= interval[1] <= 1:
        raise argparse.ArgumentTypeError(f"must be START:STOP with 0 <= START <= STOP <= 1, got {text!r}")
    return interval


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "pipelines",
        nargs="*",
        default=["conditional-ddpm-tokens-real"],
        help="folders, hub ids or names of pipelines that come along",
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/few_calls"), help="folder of drawn images")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "few_calls.json")
    parser.add_argument("--data", default=None, help="real images to compare with, held out; by default new scenes")
    parser.add_argument("--num_scenes", type=int, default=600, help="scenes to render where no data are given")
    parser.add_argument("--resolution", type=int, default=64, help="height and width that the pipelines draw")
    parser.add_argument("--judge", default="judge-resnet18-half", help="folder or name of the judge")
    parser.add_argument("--samplers", nargs="*", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20], help="looks at a state of the image")
    parser.add_argument("--guidance", type=float, nargs="+", default=[None], help="scales; by default the pipeline's")
    parser.add_argument(
        "--intervals", type=parse_interval, nargs="+", default=[(0.0, 1.0)], help="START:STOP of the guided steps"
    )
    parser.add_argument("--conditions", type=int, default=100, help="label sets; fewer have no intervals")
    parser.add_argument("--images", type=int, default=2, help="images of each label set")
    parser.add_argument(
        "--reference_conditions", type=int, default=6, help="label sets drawn in 1000 steps too; 0 is none"
    )
    parser.add_argument("--batch_size", type=int, default=20, help="images that go through the network at once")
    parser.add_argument("--device", default=default_device().type, help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    arguments = parser.parse_args(argv)
    numbers = {"num_scenes": 1, "conditions": 1, "images": 2, "batch_size": 1, "reference_conditions": 0}
    for name, least in numbers.items():
        if getattr(arguments, name) < least:
            parser.error(f"`{name}` must be at least {least}, got {getattr(arguments, name)}.")
    if min(arguments.steps) < 1:
        parser.error(f"`steps` must be at least 1, got {min(arguments.steps)}.")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Draws, measures and writes the result after each pipeline."""
    arguments = parse_arguments(argv)
    try:
        pipelines = open_named(arguments.pipelines, arguments.device, getattr(torch, arguments.dtype), arguments.judge)
        first = next(iter(pipelines.values()))
        data = arguments.data
        if data is None:  # a seed that no recipe has, so that no pipeline has seen these scenes
            data = render_dataset(
                arguments.out / "scenes", arguments.num_scenes, size=arguments.resolution, seed=20_261
            )
        store = open_store(None if data == "ICLEVR_ROOT" else data, resolution=arguments.resolution)
        judge = load_judge(arguments.judge, store.vocabulary.names).to(arguments.device)
        for name, pipeline in pipelines.items():
            if list(pipeline.vocabulary.names) != list(store.vocabulary.names):
                raise ValueError(f"`pipelines` must know the labels of the data in their order; {name} has others.")
        yardstick = Yardstick(
            store,
            store.indices("all" if arguments.data is None else "held-out"),
            judge,
            num_conditions=arguments.conditions,
            images_a_condition=arguments.images,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"few_calls: {error}")

    real = yardstick.measure_real()
    print(f"real images: top-k {real['top_k']:.3f}, exact {real['exact_match']:.3f}", flush=True)
    results: dict[str, Any] = {}
    shown = {}
    for name, pipeline in pipelines.items():
        print(name, flush=True)
        few_calls = FewCalls(
            pipeline,
            yardstick,
            arguments.out / "images",
            num_reference_conditions=arguments.reference_conditions,
            batch_size=arguments.batch_size,
        )
        points = few_calls.points(arguments.samplers, arguments.steps, arguments.guidance, arguments.intervals)
        records, shown[name] = few_calls.measure(points)
        results[name] = {"options": call_options(pipeline, {}), "points": records}
        result = {
            "schema_version": SCHEMA_VERSION,
            "what": "Quality against network calls: the same label sets and seeds by several samplers.",
            "judge": Path(arguments.judge).name,
            "data_sha256": store.sha256,
            "num_conditions": len(yardstick.class_labels),
            "images_a_condition": arguments.images,
            "real_images": real,
            "pipelines": results,
            "dtype": arguments.dtype,
            "command": shlex.join(["python", *sys.argv]),
            "environment": describe_environment(first.device),
            "date": datetime.date.today().isoformat(),
        }
        write_text(arguments.results, json.dumps(result, indent=2) + "\n")
    facts = {"judge": Path(arguments.judge).name, "results": arguments.results.name}
    save_png(draw_plot(results, real), arguments.results.with_suffix(".png"), facts)
    labels = [
        "\n".join(store.vocabulary.names[i] for i in row.nonzero().flatten().tolist())
        for row in yardstick.class_labels[:NUM_SHOWN]
    ]
    sheet = draw_sheet(shown, labels)
    save_png(sheet, arguments.results.with_name(f"{arguments.results.stem}_images.png"), facts)
    print(f"Written to {arguments.results}")


if __name__ == "__main__":
    main()

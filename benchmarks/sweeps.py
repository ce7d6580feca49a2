"""Trains variants of a diffusion model at equal cost from several seeds, and ranks them.

    python benchmarks/sweeps.py --out outputs/sweeps --tflop 12
    python benchmarks/sweeps.py --out outputs/sweeps --minutes 3 --only base "shift 1" "shift 4"

The variants are those of `sweeps.yaml`, on scenes of 32x32 pixels with one and two objects; `--variants
benchmarks/sweeps_64.yaml` has others, on scenes of 64x64 pixels with up to three. Each is trained by
train_scripts/train_ddpm.py on rendered scenes: for so many steps that all have the same number of operations, counted in
their networks, or take the same time (`--minutes`), told by a short trial; so the learning rate of each ends its whole
course. A judge that taught none of them reads images of 100 label sets, drawn by the averaged weights, and compares them
with scenes that no variant was trained on. Variants are ranked by the mean over seeds of the top-k, and by that of the
kernel and the Frechet distance. A list may name one `scheduler` that draws the images of all. Every row, a variant and a
seed, has a record of its own: the same command goes on where it was stopped, and rows that have none are listed as missing.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import yaml
from limits import count_operations
from PIL import Image
from yardstick import Yardstick

from iclevr_diffusion import ICLEVR_LABELS, load_pipeline
from iclevr_diffusion.checkpoint import newest_checkpoint, read_manifest
from iclevr_diffusion.command_line import find_scheduler_class, make_scheduler
from iclevr_diffusion.data import open_store
from iclevr_diffusion.denoiser import DenoiserConfig, make_denoiser
from iclevr_diffusion.environment import default_device, describe_environment
from iclevr_diffusion.files import write_text
from iclevr_diffusion.images import make_strip, make_table, save_png
from iclevr_diffusion.judging import load_judge, weights_sha256
from iclevr_diffusion.rendering import render_dataset

REPOSITORY = Path(__file__).resolve().parents[1]
SCHEMA_VERSION = 1
TRIAL_STEPS = 30
SMOOTHED = 10  # the trial's last steps, by which its speed is told
# Which way is better.
METRICS = {"top_k": 1, "exact_match": 1, "kernel_distance": -1, "frechet_distance": -1, "diversity": 1}
RANKED_BY = ("top_k", "kernel_distance", "frechet_distance")
NUM_SHOWN = 8
WAYS = {"trained_as", "call", "average", "guide"}  # of drawing from what another variant has trained


@dataclass(frozen=True)
class Scenes:
    """What is rendered.

    Args:
        resolution: Height and width in pixels.
        max_objects: Most objects of a scene; images show one, two and so on.
        num_train: Scenes to train on.
        num_compared: Other scenes, with which drawn images are compared.
    """

    resolution: int
    max_objects: int
    num_train: int
    num_compared: int


@dataclass(frozen=True)
class Variant:
    """A model to be trained, or another way of drawing from one.

    Args:
        name: What tables call it.
        recipe: Fields of the training script, those of `base` among them.
        call: Arguments of the pipeline's call.
        trained_as: Whose trained model it is; its own name where it is trained.
        average: Length of the power function average that is drawn with; none is the exponential one.
        guide: The variant whose trained model guidance leads away from, if any.
        share: Part of the cost of a training that this one takes.
        scheduler: The class of diffusers that draws its images; none is the one that the training saves.
    """

    name: str
    recipe: dict[str, Any]
    call: dict[str, Any]
    trained_as: str
    average: float | None = None
    guide: str | None = None
    share: float = 1.0
    scheduler: str | None = None

    @property
    def drawing(self) -> dict[str, Any]:
        """What makes its images others than those of another variant of the same training."""
        ways = {"average": self.average, "guide": self.guide, "scheduler": self.scheduler}
        return self.call | {key: value for key, value in ways.items() if value is not None}


def read_variants(path: Path) -> tuple[Scenes, dict[str, Variant]]:
    """Reads a list of variants and the scenes that they are trained on.

    Raises:
        ValueError: If the file is not of the form of `sweeps.yaml`.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or set(content) - {"scheduler"} != {"scenes", "base", "variants"}:
        raise ValueError(
            f"{path} must hold `scenes`, `base` and `variants`, each a mapping, and may hold `scheduler`, a class of"
            " diffusers that draws the images of all."
        )
    fields = [item.name for item in dataclasses.fields(Scenes)]
    if not isinstance(content["scenes"], dict) or set(content["scenes"]) != set(fields):
        raise ValueError(f"{path}: `scenes` must hold {', '.join(fields)} and nothing else, got {content['scenes']}.")
    if not all(isinstance(value, int) and value > 0 for value in content["scenes"].values()):
        raise ValueError(f"{path}: `scenes` must hold positive whole numbers, got {content['scenes']}.")
    scheduler = content.get("scheduler")
    if scheduler is not None:  # before anything is trained
        try:
            find_scheduler_class(scheduler)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    entries = {str(name): dict(entry or {}) for name, entry in content["variants"].items()}
    trained = {
        name: Variant(
            name,
            content["base"] | {key: value for key, value in entry.items() if key != "share"},
            {},
            name,
            share=entry.get("share", 1.0),
            scheduler=scheduler,
        )
        for name, entry in entries.items()
        if "trained_as" not in entry
    }
    variants: dict[str, Variant] = {}
    for name, entry in entries.items():
        if name in trained:
            variants[name] = trained[name]
            continue
        models = [entry[key] for key in ("trained_as", "guide") if key in entry]
        if not set(entry) <= WAYS or len(entry) < 2 or not all(model in trained for model in models):
            raise ValueError(
                f"{path}: {name!r} must have `trained_as`, which names a variant that is trained, and `call`, `average`"
                f" or `guide`, another such variant, and nothing else; got {entry}."
            )
        variants[name] = dataclasses.replace(trained[entry["trained_as"]], name=name, **entry)
        if "average" in entry and entry["average"] not in variants[name].recipe.get("ema_lengths", []):
            raise ValueError(
                f"{path}: `average` of {name!r} must be one of `ema_lengths` of {entry['trained_as']!r}, got"
                f" {entry['average']}."
            )
    folders = {_folder_name(name) for name in variants}
    if len(folders) != len(variants):
        raise ValueError(f"{path}: the names of variants must differ in letters and digits.")
    return Scenes(**content["scenes"]), variants


def network_config(recipe: Mapping[str, Any], resolution: int) -> DenoiserConfig:
    """Returns what a recipe says of network and batches."""
    names = {item.name for item in dataclasses.fields(DenoiserConfig)}
    return DenoiserConfig(**{name: recipe[name] for name in recipe if name in names} | {"resolution": resolution})


def images_a_step(config: DenoiserConfig) -> int:
    """Counts the images of an optimisation step of one process."""
    return config.batch_size * config.gradient_accumulation_steps


def count_flop(recipe: Mapping[str, Any], resolution: int) -> int:
    """Counts the operations, two for each multiplication and its sum, of the network in one step, there and back."""
    config = network_config(recipe, resolution)
    num_classes, has_null = len(ICLEVR_LABELS), recipe.get("label_dropout", 0.1) > 0
    with torch.device("meta"):
        network = make_denoiser(config, num_classes, 3, null_condition=has_null, empty_condition=False)
        inputs = (torch.zeros(1, 3, resolution, resolution), torch.zeros(1), torch.zeros(1, num_classes))
    return count_operations(network, inputs, backward=True) * images_a_step(config)


class Sweep:
    """Trains and measures rows, each a variant and a seed.

    Args:
        scenes: What is rendered.
        variants: The variants by name.
        out: Folder of scenes, runs and records.
        judge: Name or folder of the judge.
        tflop: Operations of a training in 10^12; None where `minutes` counts.
        minutes: Minutes of a training, in the place of operations.
        num_conditions: Label sets drawn.
        images_a_condition: Images of each.
    """

    def __init__(
        self,
        scenes: Scenes,
        variants: Mapping[str, Variant],
        out: Path,
        *,
        judge: str,
        tflop: float | None,
        minutes: float | None = None,
        num_conditions: int = 100,
        images_a_condition: int = 4,
    ) -> None:
        self.scenes, self.variants, self.out, self.tflop, self.minutes = scenes, variants, out, tflop, minutes
        look = {"size": scenes.resolution, "max_objects": scenes.max_objects}
        self._data = render_dataset(out / "scenes", scenes.num_train, seed=0, **look)
        others = render_dataset(out / "other_scenes", scenes.num_compared, seed=1, **look)
        others = open_store(others, resolution=scenes.resolution)
        self.yardstick = Yardstick(
            others,
            others.indices("all"),
            load_judge(judge, others.vocabulary.names).to(_device()),
            num_conditions=num_conditions,
            images_a_condition=images_a_condition,
        )
        measure = [weights_sha256(self.yardstick.judge), others.sha256, num_conditions, images_a_condition]
        self._measure = hashlib.sha256(json.dumps(measure).encode()).hexdigest()[:8]

    def record(self, name: str, seed: int, *, run: bool = True) -> dict[str, Any] | None:
        """Returns the record of a row, and trains and measures it first where there is none.

        Args:
            name: The variant.
            seed: The seed of the training.
            run: Whether to do so; otherwise None where there is no record.
        """
        variant = self.variants[name]
        folder = self._run_folder(variant, seed)
        path = self._record_path(variant, seed)
        if not path.exists():
            if not run:
                return None
            num_steps = self._finish(variant, seed)
            pixel_values = self._draw(variant, seed)
            measures = self.yardstick.measure(pixel_values)
            record = {metric: _value(measures[metric]) for metric in METRICS}
            shown = [
                Image.fromarray(image.transpose(1, 2, 0))
                for image in pixel_values[:: self.yardstick.images_a_condition]
            ]
            save_png(make_strip(shown[:NUM_SHOWN]), path.with_suffix(".png"), {"variant": name, "seed": seed})
            cost = {"num_steps": num_steps, "tflop": num_steps * self._flop(variant) / 1e12}
            cost |= json.loads((folder / "trained.json").read_text())
            if variant.guide is not None:  # whose training is a part of the cost
                guide = self.record(variant.guide, seed)
                cost |= {key: cost[key] + guide[key] for key in ("tflop", "seconds")}
            write_text(path, json.dumps(record | cost) + "\n")
        return json.loads(path.read_text())

    @property
    def shown_labels(self) -> list[list[str]]:
        """The labels of the images of a `strip`."""
        names = self.yardstick.label_names
        rows = self.yardstick.class_labels[:NUM_SHOWN]
        return [[names[i] for i in row.nonzero().flatten().tolist()] for row in rows]

    def strip(self, name: str, seed: int) -> Image.Image:
        """Opens the first images of a row that has a record, each of another label set."""
        with Image.open(self._record_path(self.variants[name], seed).with_suffix(".png")) as image:
            return image.convert("RGB")

    def _finish(self, variant: Variant, seed: int) -> int:
        """Trains what is not trained yet, and returns the number of steps."""
        folder, num_steps = self._run_folder(variant, seed), self._num_steps(variant)
        if not (folder / "trained.json").exists():
            self._train(folder, variant.recipe, seed, num_steps)
            # In the training loop, in all launches together.
            seconds = read_manifest(newest_checkpoint(folder / "checkpoints"))["facts"]["seconds"]
            launches = json.loads((folder / "environment.json").read_text())
            facts = {"seconds": round(seconds, 1), "mixed_precision": launches[-1].get("mixed_precision")}
            write_text(folder / "trained.json", json.dumps(facts) + "\n")
        return num_steps

    def _draw(self, variant: Variant, seed: int) -> np.ndarray:
        """Draws all images that are measured, from the same seeds for every row: uint8 (N, 3, H, W)."""
        guide = None
        if variant.guide is not None:
            self._finish(self.variants[variant.guide], seed)
            guide = self._run_folder(self.variants[variant.guide], seed) / "pipeline"
        name = "pipeline" if variant.average is None else f"pipeline-{variant.average}"
        pipeline = load_pipeline(self._run_folder(variant, seed) / name, device=_device(), guide=guide)
        if variant.scheduler is not None:
            pipeline.scheduler = make_scheduler(variant.scheduler, pipeline)
        pipeline.set_progress_bar_config(disable=True)
        labels = self.yardstick.drawn_labels
        call = {key: tuple(value) if isinstance(value, list) else value for key, value in variant.call.items()}
        images = pipeline(labels, seeds=list(range(len(labels))), output_type="np", **call).images
        return (images.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)

    def _record_path(self, variant: Variant, seed: int) -> Path:
        name = f"{_folder_name(variant.name)}-{self._measure}-{_digest(variant.drawing)}.json"
        return self._run_folder(variant, seed) / "records" / name

    def _flop(self, variant: Variant) -> int:
        return count_flop(variant.recipe, self.scenes.resolution)

    def _num_steps(self, variant: Variant) -> int:
        """Says how many steps a variant may take."""
        if self.minutes is None:
            return max(1, round(variant.share * self.tflop * 1e12 / self._flop(variant)))
        path = self.out / "trials" / f"{_folder_name(variant.trained_as)}-{_digest(variant.recipe)}.json"
        if not path.exists():
            folder = path.with_suffix("")
            self._train(folder, variant.recipe | {"log_every": SMOOTHED}, 0, TRIAL_STEPS)
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            speed = json.loads(lines[-1])["images_per_second"]
            write_text(path, json.dumps({"images_per_second": speed}) + "\n")
        speed = json.loads(path.read_text())["images_per_second"]
        images = images_a_step(network_config(variant.recipe, self.scenes.resolution))
        return max(1, round(60 * variant.share * self.minutes * speed / images))

    def _run_folder(self, variant: Variant, seed: int) -> Path:
        cost = f"{self.tflop:g}-tflop" if self.minutes is None else f"{self.minutes:g}-minutes"
        if variant.share != 1:
            cost = f"{variant.share:g}-of-{cost}"
        return self.out / "runs" / cost / f"{_folder_name(variant.trained_as)}-{_digest(variant.recipe)}-{seed}"

    def _train(self, folder: Path, recipe: dict[str, Any], seed: int, num_steps: int) -> None:
        """Trains by the script, or goes on with it; what it prints goes to a log.

        Raises:
            ValueError: If the training fails.
        """
        fields = {"log_every": 50, "save_every": 500} | recipe
        fields |= {
            "output_dir": str(folder),
            "data": str(self._data),
            "resolution": self.scenes.resolution,
            "seed": seed,
        }
        fields |= {"max_steps": num_steps, "sample_every": 0, "score_every": 0}
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", yaml.safe_dump(fields, sort_keys=False))
        script = REPOSITORY / "train_scripts" / "train_ddpm.py"
        command = [sys.executable, str(script), "--config", str(folder / "recipe.yaml")]
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            try:
                status = process.wait()
            except BaseException:  # a training that is told to stop writes a checkpoint first
                process.terminate()
                process.wait()
                raise
        if status != 0:
            raise ValueError(f"a training ended with status {status}; see {folder / 'log.txt'}")


def _device() -> str:
    return default_device().type


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _value(measure: Any) -> float | None:  # noqa: ANN401 -- a number, or a score with its interval
    return measure["value"] if isinstance(measure, dict) else measure


def summarize(records: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Puts the seeds of each variant together and ranks the variants, those of the most seeds first.

    Returns:
        For each variant with a record its seeds; of each measure the values, mean and standard deviation, and, from the
        seeds that `base` has too, the mean difference from it and in how many seeds it is better; and its ranks among
        those with as many seeds as any has. Sorted by the rank in top-k.
    """
    rows, base = [], records.get("base", {})
    for name, runs in records.items():
        if not runs:
            continue
        row: dict[str, Any] = {"variant": name, "seeds": sorted(runs), "measures": {}, "ranks": {}}
        shared = [seed for seed in row["seeds"] if seed in base and name != "base"]
        for metric, sign in METRICS.items():
            values = [runs[seed][metric] for seed in row["seeds"]]
            measure: dict[str, Any] = {"values": values, "mean": None, "deviation": None}
            if None not in values:
                measure["mean"] = statistics.fmean(values)
                measure["deviation"] = statistics.stdev(values) if len(values) > 1 else None
                differences = [
                    runs[seed][metric] - base[seed][metric] for seed in shared if base[seed][metric] is not None
                ]
                if differences:
                    measure["above_base"] = statistics.fmean(differences)
                    measure["better_than_base"] = sum(sign * difference > 0 for difference in differences)
            row["measures"][metric] = measure
        costs = ("num_steps", "tflop", "seconds")
        row |= {cost: statistics.fmean(runs[seed][cost] for seed in row["seeds"]) for cost in costs}
        row["mixed_precision"] = [runs[seed].get("mixed_precision") for seed in row["seeds"]]
        rows.append(row)
    most = max((len(row["seeds"]) for row in rows), default=0)
    for metric in RANKED_BY:
        ranked = [row for row in rows if len(row["seeds"]) == most and row["measures"][metric]["mean"] is not None]
        ranked.sort(key=lambda row: -METRICS[metric] * row["measures"][metric]["mean"])
        for rank, row in enumerate(ranked, start=1):
            row["ranks"][metric] = rank
    return sorted(rows, key=lambda row: (-len(row["seeds"]), row["ranks"].get("top_k", len(rows) + 1)))


def render_table(rows: Sequence[Mapping[str, Any]], missing: Sequence[str], summary: str) -> str:
    """Writes the table as Markdown."""
    lines = [
        summary,
        "",
        "| variant | seeds | top-k | exact | kernel | Frechet | diversity | rank by top-k, kernel, Frechet |"
        " top-k above base | better in | steps | TFLOP | minutes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        measures = row["measures"]
        cells = [row["variant"], str(len(row["seeds"]))]
        for measure in measures.values():
            spread = "" if measure["deviation"] is None else f" ± {measure['deviation']:.3f}"
            cells.append("-" if measure["mean"] is None else f"{measure['mean']:.3f}{spread}")
        cells.append(", ".join(str(row["ranks"].get(metric, "-")) for metric in RANKED_BY))
        above = measures["top_k"].get("above_base")
        better = measures["top_k"].get("better_than_base")
        cells += ["-" if above is None else f"{above:+.3f}", "-" if better is None else str(better)]
        cells += [f"{row['num_steps']:.0f}", f"{row['tflop']:.2f}", f"{row['seconds'] / 60:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    by_precision: dict[str, list[str]] = {}
    words = {"no": "float32", None: "an unknown precision"}
    for row in rows:
        for seed, precision in zip(row["seeds"], row["mixed_precision"], strict=True):
            by_precision.setdefault(words.get(precision, precision), []).append(f"{row['variant']} (seed {seed})")
    if len(by_precision) > 1:  # the machines differed
        fewest = min(by_precision, key=lambda precision: len(by_precision[precision]))
        others = " or ".join(precision for precision in by_precision if precision != fewest)
        lines += ["", f"Trained in {fewest}, the others in {others}: {', '.join(by_precision[fewest])}."]
    return "\n".join([*lines, "", f"Not run yet: {', '.join(missing) or 'none'}.", ""])


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", type=Path, default=Path(__file__).with_name("sweeps.yaml"))
    parser.add_argument("--only", nargs="+", metavar="VARIANT", default=None, help="variants to run; by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    cost = parser.add_mutually_exclusive_group()
    cost.add_argument("--tflop", type=float, default=12.0, help="operations of a training, in 10^12")
    cost.add_argument("--minutes", type=float, default=None, help="minutes of a training, in the place of operations")
    parser.add_argument("--judge", default="judge-resnet18-half", help="folder or name of the judge")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of scenes and runs; outputs/<list>, if not given"
    )
    parser.add_argument("--results", type=Path, default=None, help="numbers; results/<list>.json, if not given")
    parser.add_argument("--table", action="store_true", help="train nothing, and write the table of what is there")
    arguments = parser.parse_args(argv)
    if arguments.out is None:
        arguments.out = Path("outputs") / arguments.variants.stem
    if arguments.results is None:
        arguments.results = Path(__file__).parent / "results" / f"{arguments.variants.stem}.json"
    for name in ("tflop", "minutes"):
        if getattr(arguments, name) is not None and not getattr(arguments, name) > 0:
            parser.error(f"`{name}` must be positive, got {getattr(arguments, name)}.")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, measures and writes the result after each row; a row that fails leaves the others alone."""
    signal.signal(signal.SIGTERM, _leave)
    arguments = parse_arguments(argv)
    failed: list[str] = []
    try:
        scenes, variants = read_variants(arguments.variants)
        names = list(variants) if arguments.only is None else arguments.only
        if strangers := [name for name in names if name not in variants]:
            raise ValueError(
                f"`only` must name variants of {arguments.variants} ({', '.join(variants)}), got {', '.join(strangers)}."
            )
        budget = {"tflop": arguments.tflop, "minutes": arguments.minutes}
        sweep = Sweep(scenes, variants, arguments.out, judge=arguments.judge, **budget)
        for seed in arguments.seeds:
            for name in names:
                if not arguments.table:
                    try:
                        print(name, seed, sweep.record(name, seed), flush=True)
                    except ValueError as error:
                        failed.append(f"{name}, seed {seed}")
                        print(f"{name}, seed {seed}: {error}", file=sys.stderr, flush=True)
                write_results(sweep, arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"sweeps: {error}")
    except KeyboardInterrupt:
        sys.exit("sweeps: interrupted; the same command goes on.")
    print(f"Written to {arguments.results}")
    if failed:
        sys.exit(f"sweeps: {'; '.join(failed)} failed; the same command tries again.")


def write_results(sweep: Sweep, arguments: argparse.Namespace) -> None:
    """Writes numbers, table and a sheet of images of what has a record."""
    records: dict[str, dict[int, dict[str, Any]]] = {}
    missing = []
    for name in sweep.variants:
        found = {seed: sweep.record(name, seed, run=False) for seed in arguments.seeds}
        records[name] = {seed: record for seed, record in found.items() if record is not None}
        missing += [f"{name} (seed {seed})" for seed, record in found.items() if record is None]
    rows = summarize(records)
    budget = {"tflop": arguments.tflop} if arguments.minutes is None else {"minutes": arguments.minutes}
    real = sweep.yardstick.measure_real()
    result = {
        "schema_version": SCHEMA_VERSION,
        "what": "Variants of a diffusion model trained at equal cost, means over seeds.",
        "budget": budget,
        "resolution": sweep.scenes.resolution,
        "max_objects": sweep.scenes.max_objects,
        "judge": arguments.judge,
        "num_images": len(sweep.yardstick.drawn_labels),
        "real_images": real,
        "recipes": {
            name: variant.recipe | {"call": variant.drawing, "share": variant.share}
            for name, variant in sweep.variants.items()
        },
        "rows": rows,
        "missing": missing,
        "command": shlex.join(["python", *sys.argv]),
        "environment": describe_environment(torch.device(_device())),
        "date": datetime.date.today().isoformat(),
    }
    write_text(arguments.results, json.dumps(result, indent=2) + "\n")
    cost = f"{arguments.tflop:g} TFLOP" if arguments.minutes is None else f"{arguments.minutes:g} minutes"
    environment = result["environment"]
    schedulers = {variant.scheduler for variant in sweep.variants.values()} - {None}
    solver = "".join(f" All drawn by {name}." for name in schedulers)
    summary = (
        f"Written by `benchmarks/sweeps.py`: variants trained for {cost} each on {environment['machine']},"
        f" {sweep.scenes.resolution}x{sweep.scenes.resolution} pixels, one to"
        f" {sweep.scenes.max_objects} objects; means over seeds and standard deviations.{solver} Real images"
        f" give the judge {arguments.judge} top-k {real['top_k']:.3f}, exact {real['exact_match']:.3f}."
    )
    write_text(arguments.results.with_suffix(".md"), render_table(rows, missing, summary))
    if rows:
        captions = [row["variant"] for row in rows]
        strips = [[sweep.strip(row["variant"], row["seeds"][0])] for row in rows]
        sheet = make_table(strips, captions, min_width=2 * sweep.scenes.resolution * NUM_SHOWN)
        save_png(sheet, arguments.results.with_suffix(".png"), {"rows": captions, "labels": sweep.shown_labels})


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()

"""Measures in how many steps a model learns new labels from one that knows others, and in how many from nothing.

    python benchmarks/adapting.py --out outputs/adapting

The set is small and new to `conditional-ddpm-tokens-real`: scenes in which one object of each image has a ninth colour,
orange, so that three labels are new and 24 known; and they are rendered, where that model was last trained on real images. The
judge of rendered scenes, `judge-small-rendered`, is taught the new labels first. Then
train_scripts/train_ddpm.py trains twice by one recipe, with `--init_from` and without, and the judge reads what both draw
of the same validation label sets on the way. Everything goes on where it was stopped, by the same command: about four
minutes of one CPU core in all.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from iclevr_diffusion.environment import describe_environment
from iclevr_diffusion.files import write_text
from iclevr_diffusion.rendering import render_scene, sample_scene
from iclevr_diffusion.rendering.scene import COLORS

REPOSITORY = Path(__file__).resolve().parents[1]
INIT_FROM = "conditional-ddpm-tokens-real"
JUDGE = "judge-small-rendered"
NEW_COLOR, RGB = "orange", (230, 110, 10)
NUM_SCORES = 8  # on the way of each run
RECIPE = {
    "preset": "tokens",  # that of `INIT_FROM`
    "time_shift": 5.0,
    "batch_size": 16,
    "learning_rate": 5e-4,
    "warmup_steps": 50,
    "lr_schedule": "constant",
    "ema_decay": 0.98,  # of a run of a few hundred steps
    "mixed_precision": "bf16",
    "guidance_scale": 2.5,
    "num_inference_steps": 10,
    "num_conditions": 48,
    "sample_every": 0,
    "save_every": 100,
}


def write_set(folder: Path, num_images: int) -> None:
    """Writes scenes of one to three objects as an image folder; one object of each is orange."""
    if (folder / "metadata.jsonl").is_file():
        num_lines = len((folder / "metadata.jsonl").read_text().splitlines())
        if num_lines != num_images:
            sys.exit(f"adapting: {folder} holds {num_lines} images, not {num_images}; give another --out.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    COLORS[NEW_COLOR] = RGB
    lines = []
    for number in range(num_images):
        scene = sample_scene([7, number], 1 + number % 3)
        chosen = np.random.default_rng([8, number]).integers(len(scene.objects))
        objects = [
            dataclasses.replace(item, color=NEW_COLOR) if place == chosen else item
            for place, item in enumerate(scene.objects)
        ]
        image = render_scene(dataclasses.replace(scene, objects=tuple(objects)))
        file_name = f"{number:05d}.png"
        Image.fromarray(image).save(folder / file_name)
        lines.append(json.dumps({"file_name": file_name, "labels": [item.label for item in objects]}))
    write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")


def train(script: str, output_dir: Path, **options: Any) -> None:  # noqa: ANN401 -- any option of the script
    """Trains by a script, or goes on with it."""
    command = [sys.executable, str(REPOSITORY / "train_scripts" / script), "--output_dir", str(output_dir)]
    for option, value in options.items():
        command += [f"--{option}", str(value)]
    output_dir.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "True"}  # what the result says it ran on
    with (output_dir / "log.txt").open("a") as log:
        finished = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if finished.returncode != 0:
        sys.exit(f"adapting: {script} ended with status {finished.returncode}; see {log.name}.")


def scores_of(run: Path) -> dict[int, float]:
    """Reads the validation scores of a run by its steps."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["validation_score"] for line in lines if "validation_score" in line}


def steps_to(scores: dict[int, float], score: float) -> int | None:
    """Returns the first step at which a run was that good, None if it never was."""
    return next((step for step in sorted(scores) if scores[step] >= score), None)


def main() -> None:
    """Makes the set, teaches the judge, trains both ways, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/adapting"), help="folder of images and runs")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "adapting.json")
    parser.add_argument("--num_images", type=int, default=1500)
    parser.add_argument("--num_judge_steps", type=int, default=200)
    parser.add_argument("--num_steps", type=int, default=480, help="steps of each of the two runs")
    arguments = parser.parse_args()

    images, judge_run = arguments.out / "images", arguments.out / "judge"
    write_set(images, arguments.num_images)
    judge_options = {"data": images, "init_from": JUDGE, "flip": True, "max_steps": arguments.num_judge_steps}
    judge_options |= {"learning_rate": 1e-3, "warmup_steps": arguments.num_judge_steps // 10, "batch_size": 64}
    train("train_classifier.py", judge_run, **judge_options)  # which refuses another recipe in the same folder

    curves = {}
    for name, options in (("shipped", {"init_from": INIT_FROM}), ("nothing", {})):
        run = arguments.out / name
        options |= RECIPE | {"data": images, "judge": judge_run / "judge", "max_steps": arguments.num_steps}
        train("train_ddpm.py", run, score_every=max(1, arguments.num_steps // NUM_SCORES), **options)
        curves[name] = scores_of(run)
        print(f"from {name}:", ", ".join(f"{step}: {score:.3f}" for step, score in curves[name].items()), flush=True)

    best = max(curves["nothing"].values())
    steps = {name: steps_to(scores, best) for name, scores in curves.items()}
    print(f"{best:.3f}, the best from nothing, takes {steps['shipped']} steps from {INIT_FROM}.")
    (judge_scores,) = json.loads((judge_run / "results.json").read_text())["held_out"].values()
    result = {
        "settings": {"recipe": RECIPE, "num_images": arguments.num_images, "num_steps": arguments.num_steps},
        "init_from": INIT_FROM,
        "new_labels": [f"{NEW_COLOR} {shape}" for shape in ("cube", "cylinder", "sphere")],
        "judge": {"init_from": JUDGE, "num_steps": arguments.num_judge_steps, "held_out": judge_scores},
        "score": "share of the labels of validation label sets that the judge finds (pooled top-k)",
        "scores": {name: {str(step): score for step, score in scores.items()} for name, scores in curves.items()},
        "best_from_nothing": best,
        "steps_to_best_from_nothing": steps,
        "environment": describe_environment(torch.device("cpu"), 1),
    }
    write_text(arguments.results, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

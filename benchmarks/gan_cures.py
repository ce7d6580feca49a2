"""Trains small GANs that are said to fail, each beside what is said to cure it, from several seeds.

    python benchmarks/gan_cures.py --out outputs/gan_cures

Every GAN is trained by train_scripts/train_gan.py on rendered scenes of 16x16 pixels and then draws four images of each of
64 validation label sets. A judge that taught none of them reads the images, enlarged to its own 64x64; what it reads in
real images of this size is recorded beside. Of each pair the result says in how many seeds the cure did better. A run that
is done is not done again, so that the same command goes on where it was stopped.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iclevr_diffusion import load_pipeline
from iclevr_diffusion.data import ImageStore, normalize, open_store
from iclevr_diffusion.distribution import kernel_distance, relative_diversity
from iclevr_diffusion.environment import default_device, describe_environment
from iclevr_diffusion.files import write_text
from iclevr_diffusion.images import make_grid, save_png
from iclevr_diffusion.judging import load_judge
from iclevr_diffusion.rendering import render_dataset
from iclevr_diffusion.scores import top_k_hits

REPOSITORY = Path(__file__).resolve().parents[1]
RESOLUTION, BATCH_SIZE, NUM_SCENES, NUM_FEW_SCENES = 16, 16, 1500, 60
NUM_CONDITIONS, IMAGES_A_CONDITION, NUM_SHOWN = 64, 4, 8
JUDGE = "judge-resnet18-half"

NARROW = {"base_channels": 24, "discriminator_channels": 24, "latent_dim": 32}
SMOOTH = {"r1_weight": 0.01, "r1_every": 4}
AVERAGED = {"ema_decay": 0.998}
RATES = {"learning_rate": 8e-4, "discriminator_learning_rate": 1.6e-3}
CURED = {"standardize": True, "discriminator": "projection", "loss": "nonsaturating", "betas": (0.0, 0.99)}
CURED |= SMOOTH | AVERAGED | RATES
AUGMENTED = {"diff_augment": ("translation",)}
ACGAN = {"discriminator": "acgan", "discriminator_channels": 6, "auxiliary_weight": 1000.0, "standardize": True}
WGAN = {"discriminator": "wgan", "loss": "wasserstein", "num_critic_steps": 3, "standardize": True}


def without(cure: dict[str, Any]) -> dict[str, Any]:
    """All cures but one."""
    return {name: value for name, value in CURED.items() if name not in cure}


# The options of each GAN beside NARROW; "few" is trained on few scenes. Steps of ramps are shares of all steps.
GANS: dict[str, dict[str, Any]] = {
    "all cures": CURED,
    "no cure": {},
    "other rates": RATES | {"betas": CURED["betas"]},
    "not standardized": without({"standardize": True}),
    "labels as a plane": CURED | {"discriminator": "sagan"},  # of spectral norm too, so that R1 may be on
    "no penalty": without(SMOOTH),
    "not averaged": without(AVERAGED),
    "one rate": CURED | {"discriminator_learning_rate": RATES["learning_rate"]},
    "few": CURED,
    "few, augmented": CURED | AUGMENTED,
    "acgan 1000": ACGAN,
    "acgan 1000, ramp": ACGAN | {"ramp_steps": 0.75},
    "wgan, clipped": WGAN | {"clip_weights": 0.01},
    "wgan, penalty": WGAN | {"gradient_penalty_weight": 10.0},
}
# Failure and cure by the names above, and what is said to be wrong; whether it is so here, the numbers say.
PAIRS = (
    ("no cure", "all cures", "a DCGAN as it is reported, beside all cures at once"),
    ("no cure", "other rates", "two higher learning rates and no momentum, and nothing else"),
    ("not standardized", "all cures", "the networks must first find what differs from the background"),
    ("labels as a plane", "all cures", "the discriminator may overlook the labels"),
    ("no penalty", "all cures", "the discriminator becomes too sure and its gradients useless"),
    ("not averaged", "all cures", "the generator of the last step is a matter of luck"),
    ("one rate", "all cures", "the discriminator lags behind"),
    ("few", "few, augmented", "the discriminator learns few images by heart"),
    ("acgan 1000", "acgan 1000, ramp", "reading the labels drowns drawing the image"),
    ("wgan, clipped", "wgan, penalty", "a critic of clipped weights learns slowly"),
)


# Which way is better. Diversity is not among them: images that show nothing yet are more varied than real ones.
BETTER = {"labels_found": 1, "kernel_distance": -1}


def run_folder(out: Path, name: str, seed: int) -> Path:
    """Where a GAN of this name and seed is trained."""
    return out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def train(name: str, seed: int, data: Path, output_dir: Path, num_steps: int) -> None:
    """Trains one GAN by the script, or goes on with it."""
    options = NARROW | GANS[name] | {"seed": seed, "max_steps": num_steps, "data": data, "output_dir": output_dir}
    if "ramp_steps" in options:
        options["ramp_steps"] = round(options["ramp_steps"] * num_steps)
    options |= {"resolution": RESOLUTION, "batch_size": BATCH_SIZE, "score_every": 0, "sample_every": 500}
    command = [sys.executable, str(REPOSITORY / "train_scripts" / "train_gan.py")]
    for option, value in options.items():
        command += [f"--{option}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / "log.txt").open("a") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=_environment()).returncode
    if status != 0:
        sys.exit(f"gan_cures: the training of {name!r}, seed {seed}, ended with status {status}; see {log.name}.")


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))}


@torch.no_grad()
def read(judge: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the judge's logits and features of images (N, 3, H, W) in [-1, 1], enlarged to its size."""
    size = (judge.config.image_size,) * 2
    features = [
        judge.extract_features(F.interpolate(part, size, mode="bicubic").clamp(-1, 1)) for part in images.split(64)
    ]
    return judge.classifier(torch.cat(features)), torch.cat(features)


class Yardstick:
    """Measures GANs by real images of the same label sets, which it has the judge read once.

    Args:
        store: Rendered scenes.
        judge: A network that reads which labels an image shows.
    """

    def __init__(self, store: ImageStore, judge: nn.Module) -> None:
        self.judge = judge
        indices = store.indices("validation")
        rows, counts = np.unique(store.class_labels[indices], axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:NUM_CONDITIONS]  # those that most real images show
        self.class_labels = torch.from_numpy(rows[order]).float()
        self.names = [[store.vocabulary.names[i] for i in np.flatnonzero(row)] for row in rows[order]]
        everything = store.class_labels.astype(np.int64)
        shown, numbers = [], []
        for number, row in enumerate(rows[order]):
            alike = np.flatnonzero((everything == row).all(axis=1))[:16]
            shown.append(alike)
            numbers += [number] * len(alike)
        self.real_numbers = torch.tensor(numbers)
        self.real = normalize(torch.from_numpy(np.array(store.pixel_values[np.concatenate(shown)])))
        self.real_logits, self.real_features = read(judge, self.real)

    def describe_real(self) -> dict[str, float]:
        """What the judge reads in real images: as much as a GAN can reach."""
        return {"labels_found": _share_found(self.real_logits, self.class_labels[self.real_numbers])}

    def measure(self, folder: Path) -> dict[str, float]:
        """Draws from a pipeline and measures: are the labels there, are images varied, are they like real ones."""
        numbers = torch.arange(len(self.class_labels)).repeat_interleave(IMAGES_A_CONDITION)
        class_labels = self.class_labels[numbers]
        pipeline = load_pipeline(folder, device=default_device())
        drawn = pipeline(class_labels, seeds=list(range(len(numbers))), output_type="pt").images * 2 - 1
        logits, features = read(self.judge, drawn)
        diversity = relative_diversity(self.real.flatten(1), self.real_numbers, drawn.flatten(1), numbers)
        return {
            "labels_found": _share_found(logits, class_labels),
            "diversity": diversity["value"],
            "kernel_distance": kernel_distance(self.real_features, features),
        }


def _share_found(logits: Tensor, class_labels: Tensor) -> float:
    return (top_k_hits(logits, class_labels).sum() / class_labels.sum()).item()


def summarize(records: dict[str, dict[int, dict[str, float]]]) -> list[dict[str, Any]]:
    """Sets each failure beside its cure: the values of all seeds that both have, their means, and who did better."""
    pairs = []
    for failure, cure, wrong in PAIRS:
        seeds = sorted(set(records.get(failure, {})) & set(records.get(cure, {})))
        pair: dict[str, Any] = {"failure": failure, "cure": cure, "wrong": wrong, "seeds": seeds}
        for side in ("failure", "cure") if seeds else ():
            runs = [records[pair[side]][seed] for seed in seeds]
            values = {name: [run[name] for run in runs] for name in runs[0] if name != "seconds"}
            pair[f"{side}_values"] = values
            pair[f"{side}_means"] = {name: statistics.fmean(numbers) for name, numbers in values.items()}
        if seeds:
            pair["seeds_cured"] = {
                name: sum(sign * (records[cure][seed][name] - records[failure][seed][name]) > 0 for seed in seeds)
                for name, sign in BETTER.items()
            }
        pairs.append(pair)
    return pairs


def print_pairs(pairs: list[dict[str, Any]]) -> None:
    """Prints a line a pair and measure: mean and values of the failure, then of the cure."""
    for pair in pairs:
        print(f"{pair['failure']} -> {pair['cure']}: {pair['wrong']}; seeds {pair['seeds']}")
        for name in pair.get("failure_means", ()):
            sides = (
                f"{pair[f'{side}_means'][name]:.3f} ({' '.join(f'{x:.3f}' for x in pair[f'{side}_values'][name])})"
                for side in ("failure", "cure")
            )
            cured = f"; better in {pair['seeds_cured'][name]} of {len(pair['seeds'])} seeds" if name in BETTER else ""
            print(f"    {name:<16} {' -> '.join(sides)}{cured}")


def draw_sheet(folders: dict[str, Path], class_labels: Tensor) -> Any:  # noqa: ANN401 -- a PIL image
    """Draws a row a GAN, of the same labels and seeds."""
    images, captions, class_labels = [], [], class_labels[:NUM_SHOWN]
    for name, folder in folders.items():
        pipeline = load_pipeline(folder, device=default_device())
        images += pipeline(class_labels, seeds=list(range(len(class_labels)))).images
        captions += [name] + [""] * (len(class_labels) - 1)
    return make_grid(images, captions, columns=len(class_labels))


def main() -> None:
    """Trains, measures, prints and writes the result after each GAN."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/gan_cures"), help="folder of scenes and runs")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_steps", type=int, default=3000, help="steps of each GAN")
    arguments = parser.parse_args()

    scenes, few_scenes = arguments.out / "scenes", arguments.out / "few_scenes"
    render_dataset(scenes, NUM_SCENES, size=RESOLUTION, seed=0)
    render_dataset(few_scenes, NUM_FEW_SCENES, size=RESOLUTION, seed=0)
    store = open_store(scenes, resolution=RESOLUTION)
    judge = load_judge(JUDGE, store.vocabulary.names)
    yardstick = Yardstick(store, judge)

    records: dict[str, dict[int, dict[str, float]]] = {name: {} for name in GANS}
    for seed in arguments.seeds:
        for name in GANS:
            folder = run_folder(arguments.out, name, seed)
            path = folder / f"record-{arguments.num_steps}.json"
            if not path.exists():
                start = time.perf_counter()
                train(name, seed, few_scenes if name.startswith("few") else scenes, folder, arguments.num_steps)
                seconds = time.perf_counter() - start
                record = yardstick.measure(folder / "pipeline") | {"seconds": round(seconds, 1)}
                write_text(path, json.dumps(record) + "\n")
            records[name][seed] = json.loads(path.read_text())
            print(name, seed, records[name][seed], flush=True)
        result = {
            "settings": {
                "resolution": RESOLUTION,
                "batch_size": BATCH_SIZE,
                "num_steps": arguments.num_steps,
                "num_scenes": NUM_SCENES,
                "num_few_scenes": NUM_FEW_SCENES,
                "options": {name: NARROW | options for name, options in GANS.items()},
            },
            "judge": JUDGE,
            "num_images": len(yardstick.class_labels) * IMAGES_A_CONDITION,
            "real_images": yardstick.describe_real(),
            "pairs": summarize(records),
            "seconds": {name: [runs[seed]["seconds"] for seed in runs] for name, runs in records.items()},
            "environment": describe_environment(torch.device("cpu"), 1),
        }
        write_text(arguments.results / "gan_cures.json", json.dumps(result, indent=2) + "\n")
        if seed == arguments.seeds[0]:
            folders = {name: run_folder(arguments.out, name, seed) / "pipeline" for name in GANS}
            sheet = draw_sheet(folders, yardstick.class_labels)
            facts = {"rows": list(GANS), "labels": yardstick.names[:NUM_SHOWN], "num_steps": arguments.num_steps}
            save_png(sheet, arguments.results / "gan_cures.png", facts)
    print_pairs(summarize(records))


if __name__ == "__main__":
    main()

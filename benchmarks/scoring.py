"""Measures how long 10,000 drawn images take to be kept, read by a judge and scored.

    python benchmarks/scoring.py

The images come from a generator that takes no time to speak of (coloured noise), so that what is measured is the
evaluation itself: writing the images, reading them by the judge that comes along, the records, and all scores with
their intervals. The two parts are timed apart, on all cores.
"""

import argparse
import datetime
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import DiffusionPipeline

from iclevr_diffusion import ICLEVR_LABELS
from iclevr_diffusion.environment import describe_environment
from iclevr_diffusion.evaluation import Evaluator
from iclevr_diffusion.judging import load_judge
from iclevr_diffusion.protocols import open_protocol

RESOLUTION = 64


class NoisePipeline(DiffusionPipeline):
    """Draws noise whatever the labels are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_to_config()
        self.vocabulary = ICLEVR_LABELS

    def encode_labels(self, class_labels: list[list[str]]) -> torch.Tensor:
        """Makes the multi-hot matrix of lists of names."""
        return self.vocabulary.encode(class_labels)

    def __call__(
        self, class_labels: list[list[str]], *, seeds: list[int], micro_batch_size: int, output_type: str
    ) -> SimpleNamespace:
        """Draws an image a seed, as an array (B, H, W, 3) in [0, 1]."""
        shape = (RESOLUTION, RESOLUTION, 3)
        return SimpleNamespace(images=np.stack([np.random.default_rng(seed).random(shape) for seed in seeds]))


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", default="judge-small", help="folder of a judge, or one that comes along")
    parser.add_argument(
        "--num_images", type=int, default=10_000, help="rounded up to a multiple of 32, the conditions"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scoring.json")
    arguments = parser.parse_args()

    protocol = open_protocol("test", ICLEVR_LABELS)
    num_seeds = -(-arguments.num_images // len(protocol))
    with tempfile.TemporaryDirectory() as folder:
        judges = {"judge": load_judge(arguments.judge, ICLEVR_LABELS.names)}
        evaluator = Evaluator(NoisePipeline(), judges, [protocol], folder, num_seeds=num_seeds)
        begin = time.perf_counter()
        evaluator.draw()
        drawn = time.perf_counter()
        results = evaluator.run()
        scored = time.perf_counter()
    result = {
        "what": f"{results['protocols']['test']['num_images']} images of {RESOLUTION}x{RESOLUTION}, one judge",
        "judge": arguments.judge,
        "command": shlex.join(["python", *sys.argv]),
        "seconds_to_make_and_keep_the_images": drawn - begin,
        "seconds_to_judge_and_score_them": scored - drawn,
        "environment": describe_environment(torch.device("cpu")),
        "date": datetime.date.today().isoformat(),
    }
    text = json.dumps(result, indent=2)
    arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""Compares two evaluations image by image: a student with its teacher, another sampler, other weights.

    iclevr-evaluate --pipeline TEACHER --protocols all matched --out outputs/teacher
    iclevr-evaluate --pipeline STUDENT --protocols all matched --out outputs/student
    python benchmarks/differences.py outputs/student outputs/teacher --out benchmarks/results/student.json

Both have drawn the same labels from the same seeds, so that the intervals of their difference leave out what made a
label set hard, or a seed lucky, for both. Written are the differences of the scores, first less second, by each judge
that read both, for each list that both have drawn equally often, and the quotient of their diversity, for which both
must have drawn the same lists, `matched` among them.
"""

import argparse
import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from iclevr_diffusion import LabelVocabulary
from iclevr_diffusion.environment import describe_environment
from iclevr_diffusion.files import write_text
from iclevr_diffusion.scores import INTERVAL, score_difference


def read_logits(
    folder: Path, protocol: str, judge: str, num_replicates: int
) -> tuple[Tensor, list[list[str]], list[int]]:
    """Reads a judge's outputs (num_conditions, num_replicates, num_classes), the labels of each condition, all seeds."""
    table = pq.read_table(folder / "records.parquet", columns=["protocol", "labels", "seed", f"logits {judge}"])
    table = table.filter(pc.equal(table["protocol"], protocol))
    logits = torch.tensor(table[f"logits {judge}"].to_pylist())
    labels = table["labels"].to_pylist()[::num_replicates]
    return logits.unflatten(0, (-1, num_replicates)), labels, table["seed"].to_pylist()


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Compares two evaluations.

    Raises:
        ValueError: If a folder holds no finished evaluation, the labels differ, or the two share no list or no judge.
    """
    for folder in (first, second):
        if not (folder / "records.parquet").is_file() or not (folder / "results.json").is_file():
            raise ValueError(f"{folder} must hold results.json and records.parquet of iclevr-evaluate; run it first.")
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (first, second))
    if ours["pipeline"]["label_names"] != theirs["pipeline"]["label_names"]:
        raise ValueError(f"{first} and {second} must be of pipelines with the same labels.")
    # Of the same weights and threshold.
    judges = [name for name, of in ours["settings"]["judges"].items() if theirs["settings"]["judges"].get(name) == of]
    same = ("sha256", "num_replicates")
    protocols = [
        name
        for name, of in ours["protocols"].items()
        if name in theirs["protocols"] and all(of[key] == theirs["protocols"][name][key] for key in same)
    ]
    if not judges or not protocols:
        raise ValueError(f"{first} and {second} must share a judge and a list that both have drawn equally often.")
    vocabulary = LabelVocabulary(ours["pipeline"]["label_names"])
    differences: dict[str, Any] = {}
    for protocol in protocols:
        drawn = ours["protocols"][protocol]
        differences[protocol] = {"num_images": drawn["num_images"], "judges": {}}
        for judge in judges:
            logits, labels, seeds = read_logits(first, protocol, judge, drawn["num_replicates"])
            other_logits, _, other_seeds = read_logits(second, protocol, judge, drawn["num_replicates"])
            if seeds != other_seeds:
                raise ValueError(f"{first} and {second} must have drawn {protocol} from the same seeds.")
            differences[protocol]["judges"][judge] = score_difference(
                logits,
                other_logits,
                vocabulary.encode(labels),
                threshold=ours["settings"]["judges"][judge]["threshold"],
                resampled=drawn["resampled"],
            )
    (diversity, measured_on), (other_diversity, also_measured_on) = _diversity(ours), _diversity(theirs)
    quotient = None
    if measured_on == also_measured_on and diversity is not None and other_diversity:
        quotient = diversity / other_diversity
    return {
        "first": _describe(ours),
        "second": _describe(theirs),
        "differences": differences,
        "quotient_of_diversity": quotient,
    }


def _diversity(results: dict[str, Any]) -> tuple[float | None, dict[str, Any]]:
    """Returns how much drawn images of one condition differ in pixels, and of what images that was measured."""
    distribution = results["distribution"]
    measured_on = {"data_sha256": distribution.get("data_sha256")}
    measured_on |= distribution.get("diversity", {}).get("pixels", {})
    return measured_on.pop("value", None), measured_on


def _describe(results: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": results["pipeline"]["name"],
        "weights_sha256": results["pipeline"]["weights_sha256"],
        "options": results["settings"]["options"],
        "network_calls_per_image": results["cost"]["network_calls_per_image"],
    }


def _format(difference: dict[str, float | None]) -> str:
    value, low, high = difference.values()
    return f"{value:+.3f}" + ("" if low is None else f" [{low:+.3f}, {high:+.3f}]")


def main() -> None:
    """Compares, prints and writes; what a user gave wrongly ends it with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="folder of the one evaluation")
    parser.add_argument("second", type=Path, help="folder of the other")
    parser.add_argument(
        "--out", type=Path, default=None, help="JSON file of the result; by default it is only printed"
    )
    arguments = parser.parse_args()
    try:
        result = compare(arguments.first, arguments.second)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for protocol, of in result["differences"].items():
        for judge, scores in of["judges"].items():
            top_k, exact = (_format(scores[name]) for name in ("top_k", "exact_match"))
            print(f"{protocol}, {judge}, {of['num_images']} images: top-k {top_k}, exact match {exact}")
    quotient = result["quotient_of_diversity"]
    print("diversity: " + ("not measured alike" if quotient is None else f"{quotient:.3f} times the second's"))
    if arguments.out is not None:
        result |= {
            "interval": INTERVAL,
            "command": shlex.join(["python", *sys.argv]),
            "environment": describe_environment(torch.device("cpu")),
            "date": datetime.date.today().isoformat(),
        }
        write_text(arguments.out, json.dumps(result, indent=2) + "\n")
        print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()

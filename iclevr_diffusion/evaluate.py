"""`iclevr-evaluate`: scores a pipeline on lists of labels, as a judge sees its images."""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState

from iclevr_diffusion.command_line import add_pipeline_arguments, open_pipeline
from iclevr_diffusion.data import open_store
from iclevr_diffusion.evaluation import Evaluator, load_judge
from iclevr_diffusion.hub import DEFAULT_JUDGE, DEFAULT_PIPELINE
from iclevr_diffusion.labels import read_label_lists
from iclevr_diffusion.scores import format_results


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="iclevr-evaluate",
        description="Draws every list of labels many times and scores the images. Called again with the same --out, it"
        " goes on where it was stopped; on several processes: accelerate launch -m iclevr_diffusion.evaluate ...",
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        default=["test", "new_test"],
        help="files in the form of test.json; test and new_test come along",
    )
    parser.add_argument(
        "--judges",
        nargs="+",
        default=None,
        help="folders or hub ids of classifiers, or the course's checkpoint.pth; by default"
        f" {DEFAULT_JUDGE}, which comes along",
    )
    parser.add_argument(
        "--judges_used_in_training", nargs="+", default=[], help="names of judges that also taught the pipeline"
    )
    parser.add_argument(
        "--seeds", type=int, default=30, help="images of each condition; under 10 the result is marked quick"
    )
    parser.add_argument("--out", default="outputs/scores", help="folder of this evaluation; by default outputs/scores")
    parser.add_argument(
        "--data",
        default=None,
        help="images whose held-out part the judges are tested on; by default ICLEVR_ROOT, if set",
    )
    add_pipeline_arguments(parser)
    return parser.parse_args(argv)


def by_name(sources: Sequence[str], flag: str) -> dict[str, str]:
    """Names files or folders by the last part of their path, and refuses two of one name.

    A folder called `judge`, as every training of a judge writes one, has the name of the run, the folder it lies in.
    """
    named: dict[str, str] = {}
    for source in sources:
        path = Path(source).resolve()
        is_run = flag == "judges" and path.name == "judge"
        name = path.parent.name if is_run else path.name.removesuffix(".json").removesuffix(".pth")
        if name in named:
            raise ValueError(f"`{flag}` must have distinct names, got {named[name]} and {source}; rename one.")
        named[name] = source
    return named


def evaluate(args: argparse.Namespace) -> None:
    """Sets the evaluation up as the command line says, runs it and prints the scores."""
    state = PartialState(cpu=args.device == "cpu", timeout=timedelta(days=1))  # for processes of unlike speed
    if args.device is not None and state.num_processes > 1 and args.device != "cpu":
        raise ValueError(f"`device` must be left out with several processes, got {args.device}: each has its own.")
    pipeline = open_pipeline(args, args.device or state.device)
    pipeline.set_progress_bar_config(disable=True)
    lists = {}
    for name, source in by_name(args.labels, "labels").items():
        # The course's own file names work where there are no such files.
        path = Path(source)
        packaged = name in ("test", "new_test") and path.parent == Path() and not path.is_file()
        lists[name] = read_label_lists(name if packaged else path, pipeline.vocabulary)
    judges = {
        name: load_judge(source, pipeline.vocabulary.names)
        for name, source in by_name(args.judges or [DEFAULT_JUDGE], "judges").items()
    }
    evaluator = Evaluator(
        pipeline,
        judges,
        lists,
        args.out,
        num_seeds=args.seeds,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        micro_batch_size=args.micro_batch_size,
        pipeline_name=args.pipeline or DEFAULT_PIPELINE,
        judges_used_in_training=args.judges_used_in_training,
    )
    store = None
    if args.data or os.environ.get("ICLEVR_ROOT"):
        store = open_store(
            args.data,
            resolution=pipeline.unet.config.sample_size,
            vocabulary=pipeline.vocabulary,
            progress=state.is_main_process,
        )
    results = evaluator.run(store, no_store_reason="give --data or set ICLEVR_ROOT")
    if state.is_main_process:
        print(format_results(results))
        print(f"{results['images_per_second_per_process']:.2f} images a second and process")
        print(f"Written to {Path(args.out).resolve()}: results.json, *_grid.png, *_strips.png, images/, strips/")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; what a user gave wrongly ends it with one line."""
    args = parse_arguments(argv)
    try:
        evaluate(args)
    except (ValueError, OSError) as error:
        sys.exit(f"iclevr-evaluate: {error}")


if __name__ == "__main__":
    main()

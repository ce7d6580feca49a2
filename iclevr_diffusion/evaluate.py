"""`iclevr-evaluate`: scores a pipeline on lists of labels, as a judge sees its images."""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState

from iclevr_diffusion.command_line import SAMPLING_OPTIONS, add_pipeline_arguments, open_pipeline, print_any_label
from iclevr_diffusion.data import ImageStore, open_store
from iclevr_diffusion.environment import asked_for_cpu, lost_processes_note
from iclevr_diffusion.evaluation import DEFAULT_NUM_SEEDS, Evaluator
from iclevr_diffusion.files import judge_name, run_name
from iclevr_diffusion.inception import WEIGHTS_NAME, InceptionFeatures
from iclevr_diffusion.judging import load_judge
from iclevr_diffusion.labels import ICLEVR_LABELS, LabelVocabulary
from iclevr_diffusion.loading import DEFAULT_JUDGES, DEFAULT_PIPELINE
from iclevr_diffusion.protocols import MATCHED, PROTOCOLS, Protocol, matched_protocol, open_protocol
from iclevr_diffusion.provenance import training_facts
from iclevr_diffusion.score_tables import format_results


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="iclevr-evaluate",
        description="Draws every list of labels many times and scores the images. Called again with the same --out, it"
        " goes on where it was stopped; on several processes: accelerate launch -m iclevr_diffusion.evaluate ...",
    )
    parser.add_argument(
        "--protocols",
        nargs="+",
        default=None,
        help=f"what is drawn: {', '.join(PROTOCOLS)}, {MATCHED} (as often as in the held-out images of --data), or files"
        f" in the form of test.json; by default test and new_test, or seen (or all) for other labels, and {MATCHED} with --data",
    )
    parser.add_argument(
        "--judges",
        nargs="+",
        default=None,
        help="folders or hub ids of classifiers, or the course's checkpoint.pth; by default"
        f" {' and '.join(DEFAULT_JUDGES)}, which come along",
    )
    parser.add_argument(
        "--judges_used_in_training", nargs="+", default=[], help="names of judges that also taught the pipeline"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=None,
        help="images of each condition; by default {replicates} of a fixed list, {conditions} of 100 conditions or more"
        " that stand for others, {many conditions} of 1000; under 10 of under 100 conditions the result is marked quick"
        " and has no interval".format(**DEFAULT_NUM_SEEDS),
    )
    parser.add_argument(
        "--best_of",
        type=int,
        default=None,
        help="also score the images that the model's own denoising losses pick, one of each so many of a condition;"
        " --seeds is a multiple of it",
    )
    parser.add_argument("--out", default="outputs/scores", help="folder of this evaluation; by default outputs/scores")
    parser.add_argument(
        "--data",
        default=None,
        help="real images, whose held-out part the judges are tested on and drawn images are compared with; by default"
        " ICLEVR_ROOT, if set",
    )
    parser.add_argument(
        "--inception_weights",
        default=None,
        help=f"file {WEIGHTS_NAME} of the standard Inception network, for FID and KID with {MATCHED}; needs the extra fid",
    )
    parser.add_argument(
        "--name", default=None, help="what results and leaderboard call the pipeline; by default its folder's name"
    )
    add_pipeline_arguments(parser)
    return parser.parse_args(argv)


def judges_by_name(sources: Sequence[str]) -> dict[str, str]:
    """Names judges by the last part of their path, and refuses two of one name.

    A folder called `judge`, as every training of a judge writes one, has the name of the run, the folder it lies in.
    """
    named: dict[str, str] = {}
    for source in sources:
        name = judge_name(Path(source).resolve())
        if name in named:
            raise ValueError(f"`judges` must have distinct names, got {named[name]} and {source}; rename one.")
        named[name] = source
    return named


def evaluate(args: argparse.Namespace) -> None:
    """Sets the evaluation up as the command line says, runs it and prints the scores."""
    use_cpu = args.device == "cpu" or asked_for_cpu()
    state = PartialState(cpu=use_cpu, timeout=timedelta(days=1))  # for processes of unlike speed
    if note := lost_processes_note(state.num_processes):
        print(note, file=sys.stderr)
    if args.device is not None and state.num_processes > 1 and args.device != "cpu":
        raise ValueError(f"`device` must be left out with several processes, got {args.device}: each has its own.")
    pipeline = open_pipeline(args, state.device if state.num_processes > 1 else args.device)
    pipeline.set_progress_bar_config(disable=True)
    vocabulary = getattr(pipeline, "vocabulary", None)
    judges = {
        name: load_judge(source, None if vocabulary is None else vocabulary.names)
        for name, source in judges_by_name(args.judges or DEFAULT_JUDGES).items()
    }
    store, no_store_reason = None, "give --data or set ICLEVR_ROOT"
    if args.data is None and vocabulary not in (None, ICLEVR_LABELS):
        no_store_reason = "give --data"  # what ICLEVR_ROOT names has other labels
    elif args.data or os.environ.get("ICLEVR_ROOT"):
        store = open_store(
            args.data,
            resolution=next(iter(judges.values())).config.image_size,
            vocabulary=vocabulary,
            progress=state.is_main_process,
        )
    facts = training_facts(args.pipeline, revision=args.revision, guide=args.guide)
    evaluator = Evaluator(
        pipeline,
        judges,
        choose_protocols(args.protocols, vocabulary, store, facts["conditions"]),
        args.out,
        num_seeds=args.seeds,
        options={name: getattr(args, name) for name in SAMPLING_OPTIONS},
        micro_batch_size=args.micro_batch_size,
        pipeline_name=args.name or pipeline_name(args.pipeline),
        judges_used_in_training=args.judges_used_in_training,
        training_facts=facts,
        best_of=args.best_of,
        inception=None
        if args.inception_weights is None
        else InceptionFeatures(args.inception_weights).to(pipeline.device),
    )
    results = evaluator.run(store, no_store_reason=no_store_reason)
    if state.is_main_process:
        print(format_results(results))
        print(f"Written to {Path(args.out).resolve()}: results.json, records.parquet, drawings/, pictures")


def choose_protocols(
    names: Sequence[str] | None,
    vocabulary: LabelVocabulary | None,
    store: ImageStore | None,
    training_conditions: Sequence[Sequence[str]] | None,
) -> list[Protocol]:
    """Opens the named protocols, or those that a pipeline is scored by if none is named."""
    if names is None:
        ours = ["all"] if training_conditions is None else ["seen"]
        names = [] if vocabulary is None else ["test", "new_test"] if vocabulary == ICLEVR_LABELS else ours
        has_some = store is not None and store.class_labels[store.indices("held-out")].any()
        names += [MATCHED] if has_some else []
    if MATCHED in names and store is None:
        raise ValueError(f"`protocols`: {MATCHED} needs real images; give --data or set ICLEVR_ROOT.")
    if vocabulary is None and set(names) != {MATCHED}:
        raise ValueError(f"`protocols` must be {MATCHED} for a pipeline without labels, got {', '.join(names)}.")
    return [
        matched_protocol(store)
        if name == MATCHED
        else open_protocol(name, vocabulary, training_conditions=training_conditions)
        for name in names
    ]


def pipeline_name(path_or_repo: str | None) -> str:
    """Names a pipeline by its folder; a folder called `pipeline` has the name of the run it lies in."""
    return run_name(Path(path_or_repo or DEFAULT_PIPELINE).resolve())


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; what a user gave wrongly ends it with one line."""
    args = parse_arguments(argv)
    print_any_label()
    try:
        evaluate(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"iclevr-evaluate: {error}")
    except KeyboardInterrupt:
        sys.exit(f"iclevr-evaluate: interrupted; what was drawn is kept in {args.out}, and the same command goes on.")


if __name__ == "__main__":
    main()

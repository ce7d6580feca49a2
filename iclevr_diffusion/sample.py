"""`iclevr-sample`: draws images of named objects into a folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

import iclevr_diffusion
from iclevr_diffusion.call_options import call_options, request_lines, request_text, takes
from iclevr_diffusion.command_line import SAMPLING_OPTIONS, add_pipeline_arguments, open_pipeline, print_any_label
from iclevr_diffusion.images import file_stem, make_grid, make_strip, save_png
from iclevr_diffusion.labels import LabelVocabulary, read_label_lists
from iclevr_diffusion.loading import DEFAULT_PIPELINE
from iclevr_diffusion.pipelines.composition import Condition, parse_prompt


def read_prompts(
    prompts: Sequence[str], prompt_file: str | None, vocabulary: LabelVocabulary
) -> list[list[str] | str]:
    """Gives the labels of each image asked for on the command line, then of each in the file.

    Text that composes several conditions, or weighs one, is given back as it is, for a diffusion pipeline to read.

    Args:
        prompts: Labels joined by commas, one string an image, or conditions of such labels joined by AND and NOT.
        prompt_file: A file with one such prompt a line, or a JSON file in the form of i-CLEVR's `test.json`.
        vocabulary: The labels that the pipeline knows.
    """
    asked = [(f"prompt {prompt!r}", prompt) for prompt in prompts]
    listed = []
    if prompt_file is not None and (prompt_file.endswith(".json") or prompt_file in ("test", "new_test")):
        listed = read_label_lists(prompt_file, vocabulary)
    elif prompt_file is not None:
        lines = Path(prompt_file).read_text(encoding="utf-8").splitlines()
        asked += [(f"{prompt_file}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    label_lists: list[list[str] | str] = []
    for source, prompt in asked:
        try:
            conditions = parse_prompt(prompt)
            for condition in conditions:
                vocabulary.encode([condition.labels])
        except ValueError as error:
            raise ValueError(f"{source}: {str(error).removeprefix('`class_labels[0]`').lstrip(': ')}") from None
        is_plain = conditions == [Condition(conditions[0].labels)]
        label_lists.append(list(conditions[0].labels) if is_plain else prompt.strip())
    if not label_lists and not listed:
        raise ValueError('There is nothing to draw: give prompts such as "red cube, blue sphere", or --prompt_file.')
    return label_lists + listed


def draw(pipeline: DiffusionPipeline, label_lists: list[list[str] | str], args: argparse.Namespace) -> list[Path]:
    """Draws each list of labels `args.num_images_per_prompt` times and writes PNG files, grid and strips."""
    labels_of_image = [labels for labels in label_lists for _ in range(args.num_images_per_prompt)]
    seeds = [args.seed + i for i in range(len(labels_of_image))]
    options = call_options(pipeline, {name: getattr(args, name) for name in SAMPLING_OPTIONS})
    if args.strip and not takes(pipeline, "num_states"):
        raise ValueError(f"`strip` must be left out for a {type(pipeline).__name__}, which draws in one call.")
    states = {"num_states": min(10, options["num_inference_steps"])} if args.strip else {}
    micro_batch_size = min(args.micro_batch_size, len(seeds))
    output = pipeline(labels_of_image, seeds=seeds, micro_batch_size=micro_batch_size, **options, **states)
    metadata: dict[str, Any] = {"model": args.pipeline or DEFAULT_PIPELINE, **options}
    if args.guide is not None:
        metadata["guide"] = args.guide
    if hasattr(pipeline, "scheduler"):
        metadata["scheduler"] = type(pipeline.scheduler).__name__
    metadata["Software"] = f"iclevr_diffusion {iclevr_diffusion.__version__}"
    out, files = Path(args.out), []
    for i, (image, labels, seed) in enumerate(zip(output.images, labels_of_image, seeds, strict=True)):
        files.append(out / f"{file_stem(i, labels)}.png")
        save_png(image, files[-1], {"labels": request_text(labels), "seed": seed} | metadata)
    sheet = metadata | {"labels": labels_of_image, "seeds": seeds}
    files.append(out / "grid.png")
    save_png(make_grid(output.images, [request_lines(labels) for labels in labels_of_image]), files[-1], sheet)
    if args.strip:
        strips = [make_strip(states) for states in zip(*output.states, output.images, strict=True)]
        files.append(out / "strips.png")
        save_png(make_grid(strips, [request_text(labels) for labels in labels_of_image], columns=1), files[-1], sheet)
    return files


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="iclevr-sample", description="Draws images of named objects into a folder.")
    parser.add_argument(
        "prompts",
        nargs="*",
        help='labels of one image joined by commas, "red cube, blue sphere"; diffusion models also sum conditions:'
        ' "red cube AND gray cube AND NOT blue sphere:0.5"',
    )
    parser.add_argument("--prompt_file", default=None, help="one prompt a line, or JSON in the form of test.json")
    parser.add_argument("--out", default="samples", help="folder; files of the same names in it are overwritten")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image; the next ones count up from it")
    parser.add_argument("--num_images_per_prompt", type=int, default=1)
    parser.add_argument("--strip", action="store_true", help="also write how each image came out of the noise")
    add_pipeline_arguments(parser)
    args = parser.parse_args(argv)
    for name in ("num_images_per_prompt", "micro_batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; what a user gave wrongly ends it with one line."""
    args = parse_arguments(argv)
    print_any_label()
    try:
        pipeline = open_pipeline(args, args.device)
        if pipeline.vocabulary is None:
            raise ValueError(
                f"`pipeline` must draw images of labels, got a {type(pipeline).__name__} that knows none;"
                " iclevr-picture shows what it draws."
            )
        files = draw(pipeline, read_prompts(args.prompts, args.prompt_file, pipeline.vocabulary), args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"iclevr-sample: {error}")
    print(f"{len(files)} files in {Path(args.out).resolve()}; all images: {files[-1 - args.strip]}")


if __name__ == "__main__":
    main()

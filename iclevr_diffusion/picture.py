"""`iclevr-picture`: draws the pictures of a report, from a pipeline or from what training runs logged."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from iclevr_diffusion.command_line import SAMPLING_OPTIONS, add_pipeline_arguments, open_pipeline, print_any_label
from iclevr_diffusion.pictures import (
    Picture,
    draw_classes,
    draw_curves,
    draw_denoising,
    draw_guidance,
    draw_interpolation,
    draw_latents,
    draw_translation,
)
from iclevr_diffusion.sample import read_prompts

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")


def classes(args: argparse.Namespace) -> Picture:
    """A label set a row, or without prompts a label a row; each row is drawn from the same seeds."""
    pipeline = _open(args)
    label_lists = _label_lists(
        args, pipeline, default=pipeline.vocabulary and [[name] for name in pipeline.vocabulary]
    )
    return draw_classes(pipeline, label_lists, args.num_images, seed=args.seed, options=_options(args))


def latents(args: argparse.Namespace) -> Picture:
    """A square of images decoded from latents between four corners; for GANs and VAEs."""
    pipeline = _open(args)
    label_lists = _label_lists(args, pipeline)
    if label_lists is not None and len(label_lists) != 1:
        raise ValueError(f"`prompts` must be one, that of all images, got {len(label_lists)}.")
    labels = label_lists and label_lists[0]
    return draw_latents(pipeline, labels, args.seeds, size=args.size, options=_options(args))


def interpolation(args: argparse.Namespace) -> Picture:
    """The way between two seeds, as a strip for each label set and as a GIF beside it; for GANs and VAEs."""
    pipeline = _open(args)
    label_lists = _label_lists(args, pipeline)
    return draw_interpolation(pipeline, label_lists, args.seeds, num_images=args.num_images, options=_options(args))


def denoising(args: argparse.Namespace) -> Picture:
    """How images come out of the noise; for diffusion models."""
    pipeline = _open(args)
    label_lists = _label_lists(args, pipeline)
    return draw_denoising(pipeline, label_lists, num_states=args.num_states, seed=args.seed, options=_options(args))


def guidance(args: argparse.Namespace) -> Picture:
    """Label sets from the same seeds at several weights of guidance; for diffusion models."""
    pipeline = _open(args)
    label_lists = _label_lists(args, pipeline)
    return draw_guidance(pipeline, label_lists, args.weights, args.num_images, seed=args.seed, options=_options(args))


def translation(args: argparse.Namespace) -> Picture:
    """Images, what a CycleGAN maps them to, and what it maps these back to."""
    pipeline = _open(args)
    if args.images == ["noise"]:
        names, images = [], _noise_images(pipeline, args)
    else:
        files = [file for path in map(Path, args.images) for file in _image_files(path)][: args.num_images]
        names, images = [file.name for file in files], [_read_image(file) for file in files]
    picture = draw_translation(pipeline, images, args.direction, options=_options(args))
    picture.facts |= {"images": names} if names else {"images": "noise", "seed": args.seed}
    return picture


def curves(args: argparse.Namespace) -> Picture:
    """What training runs logged against the step, a panel a name and a line a run."""
    return draw_curves(args.runs, args.names)


def _open(args: argparse.Namespace) -> DiffusionPipeline:
    return open_pipeline(args, args.device)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in (*SAMPLING_OPTIONS, "micro_batch_size")}


def _image_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_ENDINGS)


def _read_image(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ValueError(f"`images` must be image files, folders of them, or the word noise: {error}.") from error


def _noise_images(pipeline: DiffusionPipeline, args: argparse.Namespace) -> list[Image.Image]:
    """Draws images whose bytes are all alike and independent, as those of a domain of noise are."""
    config = getattr(pipeline, f"generator_{args.direction}", pipeline).config
    size = config.get("sample_size", 1)  # what is no CycleGAN is refused where it is called
    source = np.random.default_rng(args.seed)
    pixels = source.integers(256, size=(args.num_images, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def _label_lists(
    args: argparse.Namespace, pipeline: DiffusionPipeline, default: list[list[str]] | None = None
) -> list[list[str] | str] | None:
    """Gives the label sets asked for; `default` if there are none, and None for a pipeline without labels."""
    asked = args.prompts or args.prompt_file
    if getattr(pipeline, "vocabulary", None) is None:
        if asked:
            raise ValueError("`prompts` must be left out, as this pipeline knows no labels.")
        return None
    return default if default and not asked else read_prompts(args.prompts, args.prompt_file, pipeline.vocabulary)


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line; its help shows the usage of all kinds of picture."""
    parser = argparse.ArgumentParser(
        prog="iclevr-picture",
        description="Draws the pictures of a report into a PNG file, which holds how it was drawn as its metadata.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    def add(draw: Callable[[argparse.Namespace], Picture], *, prompts: bool = True) -> argparse.ArgumentParser:
        kind = kinds.add_parser(draw.__name__, help=draw.__doc__, description=draw.__doc__)
        kind.set_defaults(draw=draw)
        kind.add_argument("--out", type=_png_file, default=f"{draw.__name__}.png", help="PNG file to write")
        if prompts:
            kind.add_argument("prompts", nargs="*", help='labels joined by commas: "red cube, blue sphere"')
            kind.add_argument(
                "--prompt_file", default=None, help="one prompt a line, or JSON in the form of test.json"
            )
        return kind

    kind = add(classes)
    kind.add_argument("--num_images", type=_positive, default=8, help="images in a row")
    kind.add_argument("--seed", type=int, default=0, help="seed of the first image of a row")
    add_pipeline_arguments(kind)
    kind = add(latents)
    kind.add_argument(
        "--seeds",
        type=int,
        nargs=4,
        default=(0, 1, 2, 3),
        help="seeds of the corners: top left, top right, bottom left, bottom right",
    )
    kind.add_argument("--size", type=_at_least_two, default=8, help="rows and columns")
    add_pipeline_arguments(kind)
    kind = add(interpolation)
    kind.add_argument("--seeds", type=int, nargs=2, default=(0, 1), help="seeds of the two ends")
    kind.add_argument("--num_images", type=_at_least_two, default=16, help="images in a row, the ends included")
    add_pipeline_arguments(kind)
    kind = add(denoising)
    kind.add_argument("--num_states", type=_positive, default=10, help="states before the image, the noise first")
    kind.add_argument("--seed", type=int, default=0, help="seed of the first row; the next ones count up from it")
    add_pipeline_arguments(kind)
    kind = add(guidance)
    kind.add_argument(
        "--weights",
        type=float,
        nargs="+",
        default=(0.0, 0.5, 2.0),
        help="w of (1 + w) * conditional - w * unconditional; guidance_scale is 1 + w",
    )
    kind.add_argument("--num_images", type=_positive, default=4, help="images of each label set at each weight")
    kind.add_argument("--seed", type=int, default=0, help="seed of the first of these images")
    add_pipeline_arguments(kind)
    kind = add(translation, prompts=False)
    kind.add_argument("images", nargs="+", help="image files, folders of PNG and JPEG files, or the word noise")
    kind.add_argument("--direction", choices=("a_to_b", "b_to_a"), default="a_to_b")
    kind.add_argument("--num_images", type=_positive, default=8, help="how many of the images to take, at most")
    kind.add_argument("--seed", type=int, default=0, help="seed of the noise")
    add_pipeline_arguments(kind)
    kind = add(curves, prompts=False)
    kind.add_argument("runs", nargs="+", help="output folders of training runs, or their metrics.jsonl")
    kind.add_argument("--names", nargs="+", default=None, help="what to draw; by default all losses")
    parser.epilog = "\n".join(kind.format_usage() for kind in kinds.choices.values())
    return parser


def _png_file(text: str) -> Path:
    if Path(text).suffix != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    return Path(text)


def _positive(text: str) -> int:
    return _at_least(1, text)


def _at_least_two(text: str) -> int:
    return _at_least(2, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return number


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; what a user gave wrongly ends it with one line."""
    args = make_parser().parse_args(argv)
    print_any_label()
    try:
        files = args.draw(args).save(args.out)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"iclevr-picture: {error}")
    print("Written:", *(file.resolve() for file in files))


if __name__ == "__main__":
    main()

"""The command `iclevr-inspect`: says what a set of labelled images holds, before a model is trained on it."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from iclevr_diffusion.command_line import print_any_label
from iclevr_diffusion.data import LabelledImages, open_source
from iclevr_diffusion.files import write_text
from iclevr_diffusion.images import save_png
from iclevr_diffusion.inspection import format_inspection, inspect_images, make_sheet


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="iclevr-inspect",
        description="Reads all images of a set and says how it is read, what it holds, and what in it would harm a"
        " training. Exit status 1 if a training would refuse it.",
    )
    parser.add_argument(
        "data",
        help="what --data of a training takes: a folder of images with metadata.jsonl, .csv or .parquet, a folder of"
        " Parquet files, hub:user/name, a YAML file with `images:` and how they are read, a folder in i-CLEVR's layout,"
        " ICLEVR_ROOT, digits or mnist",
    )
    parser.add_argument("--resolution", type=int, default=64, help="size at which equal images are looked for")
    parser.add_argument("--out", default=None, help="folder for inspection.json and sheet.png, a sheet of images")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; what a user gave wrongly, or a training would refuse, ends it with status 1."""
    arguments = parse_arguments(argv)
    print_any_label()
    try:
        source = open_source(arguments.data, skip_faults=True)
        if isinstance(source, LabelledImages):
            print(source.describe())
        found = inspect_images(source, resolution=arguments.resolution)
        if arguments.out is not None:
            out = Path(arguments.out)
            write_text(out / "inspection.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
            sheet = make_sheet(source, found)
            if sheet is not None:
                save_png(sheet, out / "sheet.png", {"data": source.name})
            written = f"Written to {out.resolve()}: inspection.json{'' if sheet is None else ', sheet.png'}"
        print(format_inspection(found))
        if arguments.out is not None:
            print(written)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"iclevr-inspect: {error}")
    if found["refusals"]:
        sys.exit(1)


if __name__ == "__main__":
    main()

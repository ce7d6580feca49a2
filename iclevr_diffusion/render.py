"""The command `iclevr-render`: draws a data set of i-CLEVR-like scenes."""

import argparse
import sys
from collections.abc import Sequence

from iclevr_diffusion.rendering import render_dataset


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="iclevr-render",
        description="Draws scenes of coloured cubes, spheres and cylinders into a folder in i-CLEVR's layout. Called"
        " again after an interruption, it goes on.",
    )
    parser.add_argument("--out", required=True, help="folder to write, new or begun by the same command")
    parser.add_argument("--num_scenes", type=int, default=6003, help="as many as i-CLEVR has by default")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data set")
    parser.add_argument("--min_objects", type=int, default=1, help="objects in a scene's first image")
    parser.add_argument("--max_objects", type=int, default=3, help="objects in a scene's last image, at most 5")
    parser.add_argument(
        "--all_triples",
        action="store_true",
        help="allow the 136 sets of three labels that i-CLEVR's training images lack",
    )
    parser.add_argument("--num_workers", type=int, default=None, help="processes; by default one a processor")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; what a user gave wrongly ends it with one line."""
    arguments = vars(parse_arguments(argv))
    try:
        root = render_dataset(arguments.pop("out"), arguments.pop("num_scenes"), **arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"iclevr-render: {error}")
    except KeyboardInterrupt:
        sys.exit("iclevr-render: interrupted; the same command goes on from here.")
    print(f"The scenes are in {root.resolve()}.")


if __name__ == "__main__":
    main()

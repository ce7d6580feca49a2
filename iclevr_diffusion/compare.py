"""`iclevr-compare`: puts the results of several systems into one leaderboard, as tables and pictures."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from iclevr_diffusion.command_line import print_any_label
from iclevr_diffusion.files import write_text
from iclevr_diffusion.images import save_png
from iclevr_diffusion.leaderboard import load_system, make_leaderboard
from iclevr_diffusion.leaderboard_asides import render_negation, render_picked
from iclevr_diffusion.leaderboard_plots import draw_labels, draw_quality_against_speed, draw_samples, open_samples
from iclevr_diffusion.leaderboard_sampling import load_sampling, render_sampling
from iclevr_diffusion.leaderboard_tables import render_csv, render_markdown, render_summary

RESULTS = "benchmarks/results"
REPORTS = "baselines.md"  # what benchmarks/baselines.py writes
BEGIN, END = "<!-- leaderboard:begin -->", "<!-- leaderboard:end -->"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="iclevr-compare",
        description="Ranks systems by what iclevr-evaluate wrote about them. Results that do not compare are refused.",
    )
    parser.add_argument(
        "results",
        nargs="*",
        metavar="RESULTS",
        help=f"results.json files, or folders that hold one; by default {RESULTS}/*/results.json",
    )
    parser.add_argument("--out", default=RESULTS, help=f"folder of tables and pictures; by default {RESULTS}")
    parser.add_argument("--readme", default=None, help=f"text file whose part from {BEGIN} to {END} is written anew")
    parser.add_argument(
        "--protocols",
        nargs="+",
        default=None,
        help="protocols to show; by default those that every system has drawn alike, but for matched",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; name the files that are not what the results give"
    )
    return parser.parse_args(argv)


class Comparison:
    """A leaderboard with the files that it is written to.

    Args:
        results: `results.json` files, or folders that hold one; empty takes those in `benchmarks/results/`.
        out: Folder of tables and pictures; a `sampling.json` and a `baselines.md` there have their place too.
        readme: Text file that holds a part of it; None writes none.
        protocols: Protocols to show; None shows those that every system has drawn alike, but for `matched`.
    """

    def __init__(
        self,
        results: Sequence[str | Path] = (),
        *,
        out: str | Path = RESULTS,
        readme: str | Path | None = None,
        protocols: Sequence[str] | None = None,
    ) -> None:
        self.board = board = make_leaderboard([load_system(path) for path in find_results(results)], protocols)
        out = Path(out)
        captions, samples, notes = open_samples(board)
        self.texts = {
            out / "leaderboard.md": render_markdown(
                board, out, notes, [*render_negation(board), *render_picked(board), *self._further(out)]
            ),
            out / "leaderboard.csv": render_csv(board),
        }
        if readme is not None:
            readme = Path(readme)
            folder = Path(os.path.relpath(out, readme.parent)).as_posix()
            self.texts[readme] = replace_part(readme, render_summary(board, folder))
        self.pictures: dict[Path, Callable[[], Image.Image]] = {
            out / "quality_against_speed.png": lambda: draw_quality_against_speed(board),
            out / "labels.png": lambda: draw_labels(board),
            out / "samples.png": lambda: draw_samples(captions, samples),
        }

    @staticmethod
    def _further(out: Path) -> list[str]:
        """Gathers what was measured otherwise than by `iclevr-evaluate`, as far as it lies beside the leaderboard."""
        further = []
        if (out / REPORTS).is_file():
            further.append(f"## Reported systems\n\nEach beside what was reported of it: [the table]({REPORTS}).")
        if (out / "sampling.json").is_file():
            further += render_sampling(load_sampling(out / "sampling.json"))
        return further

    def write(self) -> list[Path]:
        """Writes all files and returns them, the pictures first, as they may fail."""
        drawn = {path: draw() for path, draw in self.pictures.items()}
        for path, picture in drawn.items():
            save_png(picture, path, {"inputs_sha256": self.board.inputs_sha256})
        for path, text in self.texts.items():
            write_text(path, text)
        return [*drawn, *self.texts]

    def stale_files(self) -> list[Path]:
        """Lists the files that are missing or not what the results give; of pictures the hash they carry is read."""
        texts = [
            path for path, text in self.texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
        ]
        return texts + [path for path in self.pictures if _hash_in(path) != self.board.inputs_sha256]


def find_results(sources: Sequence[str | Path] = ()) -> list[Path]:
    """Lists the `results.json` files of files and folders; of none, those in `benchmarks/results/`."""
    if not sources:
        paths = sorted(Path(RESULTS).glob("*/results.json"))
        if not paths:
            raise ValueError(f"There is no {RESULTS}/*/results.json here; name the results, or change the folder.")
        return paths
    paths = [Path(source) / "results.json" if Path(source).is_dir() else Path(source) for source in sources]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"`results` must be files or folders with a results.json, and there is no {path}.")
    return paths


def replace_part(path: Path, part: str) -> str:
    """Reads a text and puts `part` between its marks; refuses a text that does not have each of them once."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} must hold the lines {BEGIN} and {END} once, in this order; add them where it goes.")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    return f"{before}{BEGIN}\n\n{part}\n\n{after}"


def _hash_in(path: Path) -> str | None:
    if not path.is_file():
        return None
    with Image.open(path) as picture:
        return picture.info.get("inputs_sha256")


def compare(args: argparse.Namespace) -> None:
    """Writes or checks the leaderboard as the command line says; ends the command with status 1 if it is stale."""
    comparison = Comparison(args.results, out=args.out, readme=args.readme, protocols=args.protocols)
    if not args.check:
        print("Written:", *comparison.write(), sep="\n")
        for name, reason in comparison.board.left_out.items():
            print(f"Left out: {name} {reason}.", file=sys.stderr)
    elif stale := comparison.stale_files():
        sys.exit("\n".join(["iclevr-compare: not what the results give; run it again:", *map(str, stale)]))
    else:
        print("The leaderboard is what the results give.")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; what a user gave wrongly ends it with one line."""
    args = parse_arguments(argv)
    print_any_label()
    try:
        compare(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"iclevr-compare: {error}")


if __name__ == "__main__":
    main()

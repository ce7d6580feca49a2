"""The leaderboard in words and numbers: Markdown with intervals and marks, and CSV."""

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iclevr_diffusion.leaderboard import MEAN, METRICS, Leaderboard, System

REAL = "real images, held out"
DAGGER = "†"
DISTANCES = {
    "frechet_distance": "Frechet distance",
    "kernel_distance": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}
DIVERSITY = ("distribution", "diversity", "judges")
COSTS = ("images_per_second", "seconds_for_one_image", "network_calls_per_image", "num_parameters")
PICTURES = {  # the files beside the Markdown, and what they show
    "quality_against_speed.png": "Top-k of each system against the images it draws in a second",
    "labels.png": "Top-k of each system by label",
    "samples.png": "Images that each system drew of the same labels",
}


@dataclass(frozen=True)
class _Column:
    """A column of a table.

    Args:
        title: What stands above it.
        values: A number, an estimate or a text for each system; None where it is not known.
        real: The same for real images.
        write: Writes a number out.
    """

    title: str
    values: Sequence[Any]
    real: Any = None
    write: Callable[[float], str] = "{:.3f}".format

    def cell(self, value: Any) -> str:  # noqa: ANN401 -- what `values` hold
        """Writes a value out, an estimate with its interval."""
        if isinstance(value, Mapping):
            if value["low"] is None or value["high"] is None:
                return self.cell(value["value"])
            return f"{self.write(value['value'])} [{self.write(value['low'])}, {self.write(value['high'])}]"
        if value is None:
            return "-"
        return value if isinstance(value, str) else self.write(value)

    def best(self, rows: Sequence[int]) -> int | None:
        """Finds the row whose estimate is above all others of `rows`, and its interval too; None if there is none."""
        known = [row for row in rows if isinstance(self.values[row], Mapping) and self.values[row]["low"] is not None]
        known.sort(key=lambda row: -self.values[row]["value"])
        if len(known) < 2:
            return None
        rivals = max(self.values[row]["high"] for row in known[1:])
        return known[0] if self.values[known[0]]["low"] > rivals else None


def _table(systems: Sequence[System], columns: Sequence[_Column], judge: str | None = None) -> str:
    """Lays columns out as a Markdown table; the systems that `judge` taught are marked and never best."""
    taught = [judge is not None and system.is_taught_by(judge) for system in systems]
    best = [column.best([row for row, marked in enumerate(taught) if not marked]) for column in columns]
    lines = ["| system | " + " | ".join(column.title for column in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    if any(column.real is not None for column in columns):
        lines.append(f"| *{REAL}* | " + " | ".join(column.cell(column.real) for column in columns) + " |")
    for row, system in enumerate(systems):
        cells = [column.cell(column.values[row]) for column in columns]
        cells = [f"**{cell}**" if best[place] == row else cell for place, cell in enumerate(cells)]
        lines.append(f"| {_escape(system.name)}{DAGGER * taught[row]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _top_k_columns(board: Leaderboard, judge: str, lists: Sequence[Sequence[str]]) -> list[_Column]:
    return [
        _Column(
            "top-k, mean" if len(names) > 1 else f"top-k, {names[0]}",
            [system.scores(names, judge)["top_k"] for system in board.ranked],
            board.ceiling(names, judge).get("top_k"),
        )
        for names in lists
    ]


def _main_columns(board: Leaderboard, judge: str) -> list[_Column]:
    """Makes the top-k columns of the mean and of each of `main_protocols`."""
    return _top_k_columns(
        board, judge, list(dict.fromkeys([board.main_protocols, *((n,) for n in board.main_protocols)]))
    )


def _exact_match_column(board: Leaderboard, judge: str) -> _Column:
    return _Column(
        "exact match",
        [system.scores(board.main_protocols, judge)["exact_match"] for system in board.ranked],
        board.ceiling(board.main_protocols, judge).get("exact_match"),
    )


def _quality_columns(board: Leaderboard, judge: str) -> list[_Column]:
    precision = [system.scores(board.main_protocols, judge)["precision"] for system in board.ranked]
    distances = ("distribution", "judges", judge)
    frechet = [system.find(*distances, "generated", "frechet_distance") for system in board.ranked]
    diversity = [system.find(*DIVERSITY, judge, "value") for system in board.ranked]
    columns = [
        *_main_columns(board, judge),
        _exact_match_column(board, judge),
        _Column("precision", precision, board.find("held_out_images", "judges", judge, "precision")),
        *_top_k_columns(board, judge, [(name,) for name in board.protocols if name not in board.main_protocols]),
        _Column("Frechet distance", frechet, board.find(*distances, "real", "frechet_distance"), _three_digits),
    ]
    return [*columns, _Column("relative diversity", diversity)] if _compares_diversity(board) else columns


def _compares_diversity(board: Leaderboard) -> bool:
    """Says whether the relative diversities are of the same conditions and real images, which follow what was drawn."""
    found = [system.find(*DIVERSITY, board.judges[0]) for system in board.ranked]
    return len({(part.get("num_conditions"), part.get("num_real")) for part in found if part}) < 2


def _cost_columns(board: Leaderboard, systems: Sequence[System]) -> list[_Column]:
    """Makes the columns of cost; where speeds were measured on several machines, a letter says on which."""

    def speeds(name: str) -> list[str]:
        return [f"{_three_digits(system.results['cost'][name])}{_machine_mark(board, system)}" for system in systems]

    cost = [system.results["cost"] for system in systems]
    return [
        _Column("images/s", speeds("images_per_second")),
        _Column("seconds for one image", speeds("seconds_for_one_image")),
        _Column("network calls an image", [part["network_calls_per_image"] for part in cost], None, _three_digits),
        _Column("parameters", [f"{part['num_parameters'] / 1e6:.2f} M" for part in cost]),
    ]


def _machine_mark(board: Leaderboard, system: System) -> str:
    """Gives the letter, raised, of the machine that a system's speed was measured on; none if there is one for all."""
    letter = chr(ord("a") + board.machines.index(system.measured_on))
    return f"<sup>{letter}</sup>" if len(board.machines) > 1 else ""


def _machine_note(board: Leaderboard, systems: Sequence[System]) -> str:
    places = dict.fromkeys(f"{_machine_mark(board, system)} {system.measured_on}".strip() for system in systems)
    apart = ", and compare only where the letter is the same" if len(places) > 1 else ""
    return f"Speeds were measured on{apart}: {'; '.join(places)}."


def _three_digits(number: float) -> str:
    return f"{float(f'{number:.3g}'):,.10g}"


def render_markdown(board: Leaderboard, folder: Path, notes: Sequence[str] = ()) -> str:
    """Writes the whole leaderboard out.

    Args:
        board: The systems.
        folder: Where the text will lie, beside the pictures.
        notes: Further sentences to be said, such as that a picture lacks a system.
    """
    leading, *others = board.judges
    lists = " and ".join(f"`{name}`" for name in board.main_protocols)
    over = f"means over {lists}" if len(board.main_protocols) > 1 else f"those of {lists}"
    paragraphs = [
        f"<!-- inputs_sha256: {board.inputs_sha256} -->\n\n# Leaderboard",
        "Written by `iclevr-compare` from each system's `results.json`. **Top-k**: of the k labels asked for, the share"
        " among the judge's k highest outputs. **Exact match**: the images in which the judge sees the objects asked"
        f" for and no other. **Precision**: of the objects that it sees, the share asked for. Both are {over}. In"
        " brackets stand 95 % intervals; a number in bold is the best of its column where its interval lies above those"
        " of all others.",
        "The first row is what the judge makes of real held-out images, in top-k and exact match of images with as many"
        " objects as the list asks for; a system above it suits the judge, and does not draw better than reality."
        " **Frechet distance** is one in this judge's features, which compares with no other judge's and with no FID;"
        " its first row is that of other real images. **Relative diversity** is 1 where images of one condition differ"
        " as real ones do.",
        f"## As {leading} sees it",
        f"In the order of this judge's top-k on {lists}. It taught none of the systems.",
        _table(board.ranked, _quality_columns(board, leading) + _cost_columns(board, board.ranked)),
        _machine_note(board, board.ranked),
    ]
    if not _compares_diversity(board):
        paragraphs.append("Relative diversities are not shown: the systems have drawn other conditions for them.")
    if board.quick:
        paragraphs.append(f"Left out, as they drew too few images (quick): {', '.join(board.quick)}.")
    paragraphs += notes
    for judge in others:
        paragraphs += [f"## As {judge} sees it", _table(board.ranked, _quality_columns(board, judge), judge)]
        if any(system.is_taught_by(judge) for system in board.ranked):
            paragraphs.append(f"{DAGGER} {judge} had a part in this system's training: the score is not independent.")
    paragraphs += [f"## {text}\n\n![{text}]({name})" for name, text in PICTURES.items()]
    if board.without_labels:
        paragraphs += ["## Systems that are not told what to draw", _table_without_labels(board)]
        paragraphs.append(_machine_note(board, board.without_labels))
    paragraphs += ["## How the numbers were made", _origins(board, folder)]
    return "\n\n".join(paragraphs) + "\n"


def render_summary(board: Leaderboard, folder: str) -> str:
    """Writes a short table for a README out, with a link to all the rest.

    Args:
        board: The systems.
        folder: Path of the leaderboard's folder from the README.
    """
    judge = board.judges[0]
    columns = _top_k_columns(board, judge, [(name,) for name in board.main_protocols])
    columns.append(_exact_match_column(board, judge))
    columns += [
        column
        for column in _cost_columns(board, board.ranked)
        if column.title in ("images/s", "network calls an image")
    ]
    plot, text = next(iter(PICTURES.items()))
    return "\n\n".join(
        [
            _table(board.ranked, columns),
            f"As {judge} sees it, which taught none of the systems; 95 % intervals in brackets. {_machine_note(board, board.ranked)} By"
            f" other judges, on other lists, by label, and as images: [the leaderboard]({folder}/leaderboard.md).",
            f"![{text}]({folder}/{plot})",
        ]
    )


def _table_without_labels(board: Leaderboard) -> str:
    """Makes a row for each judge of each system, after a row for each judge of other real images."""
    rows, real = [], {}
    costs = _cost_columns(board, board.without_labels)
    for place, system in enumerate(board.without_labels):
        cost = [column.cell(column.values[place]) for column in costs]
        for judge, found in (system.find("distribution", "judges") or {"-": {}}).items():
            rows.append([_escape(system.name), judge, *_distances(found.get("generated", {})), *cost])
            if "real" in found:
                real[judge] = [f"*{REAL}*", judge, *_distances(found["real"]), *([""] * len(cost))]
    titles = ["system", "judge", *DISTANCES.values(), *(column.title for column in costs)]
    lines = [titles, ["---", "---", *["---:"] * (len(titles) - 2)], *real.values(), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _distances(found: Mapping[str, float]) -> list[str]:
    return [_three_digits(found[name]) if found.get(name) is not None else "-" for name in DISTANCES]


def _origins(board: Leaderboard, folder: Path) -> str:
    """Makes a table of what each system is, how it was called, how much it drew, and where its results lie."""
    lines = [
        "| system | class | weights | called with | images | speed measured with | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    for system in board.ranked + board.without_labels:
        results, cost = system.results, system.results["cost"]
        called = ", ".join(f"{name} {value}" for name, value in results["settings"]["options"].items())
        images = ", ".join(f"{name} {part['num_images']:,}" for name, part in results["protocols"].items())
        link = Path(os.path.relpath(system.path, folder)).as_posix()
        cells = [
            f"[{_escape(system.name)}]({link})",
            results["pipeline"]["class"],
            results["pipeline"]["weights_sha256"][:12],
            called or "-",
            images or "-",
            f"batches of {cost['batch_size']}, {cost['dtype']}",
            _short_commit(results["environment"]["git_commit"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _short_commit(commit: str | None) -> str:
    if commit is None:
        return "-"
    number, dash, mark = commit.partition("-")
    return number[:10] + dash + mark


def render_csv(board: Leaderboard) -> str:
    """Writes every number of the tables and those behind them out, a line each."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")

    def write(*cells: Any) -> None:  # noqa: ANN401 -- texts, numbers and None
        writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in cells])

    write("system", "judge", "judge_taught_it", "protocol", "part", "metric", "value", "low", "high")
    for judge in board.judges:
        for row in _ceilings(board, judge):
            write(REAL, judge, "", *row)
    for system in board.ranked + board.without_labels:
        for judge in board.judges if system in board.ranked else ():
            for row in _scores(board, system, judge):
                write(system.name, judge, system.is_taught_by(judge), *row)
            if _compares_diversity(board) and (found := system.find(*DIVERSITY, judge)):
                part = (system.name, judge, system.is_taught_by(judge), "", "diversity", "relative_diversity")
                write(*part, found["value"], "", "")
        for judge, found in (system.find("distribution", "judges") or {}).items():
            taught = system.is_taught_by(judge)
            for part, distances in found.items():
                for name in DISTANCES:
                    write(system.name, judge, taught, "matched", part, name, distances.get(name), "", "")
        for name in COSTS:
            write(system.name, "", "", "", system.measured_on, name, system.results["cost"][name], "", "")
    return file.getvalue()


def _ceilings(board: Leaderboard, judge: str) -> Iterator[list[Any]]:
    """Lists protocol, part, metric, value, low and high of a judge's scores of real images."""
    lists = {name: (name,) for name in board.protocols} | {_lists_name(board): board.main_protocols}
    for name, protocols in lists.items():
        for metric, value in board.ceiling(protocols, judge).items():
            yield [name, "all", metric, value, "", ""]
    held_out = board.find("held_out_images", "judges", judge) or {}
    parts = {"all": held_out} | {f"num_objects {k}": part for k, part in held_out.get("by_num_objects", {}).items()}
    for part, scores in parts.items():
        for metric in METRICS:
            if metric in scores:
                yield ["held-out images", part, metric, scores[metric], "", ""]


def _scores(board: Leaderboard, system: System, judge: str) -> Iterator[list[Any]]:
    """Lists protocol, part, metric, value, low and high of what a judge makes of a system's images."""
    tables = {(_lists_name(board), "all"): system.scores(board.main_protocols, judge)}
    for protocol in board.protocols:
        scores = system.results["protocols"][protocol]["judges"][judge]
        tables[protocol, "all"] = scores["all"]
        tables |= {(protocol, f"num_objects {k}"): part for k, part in scores["by_num_objects"].items()}
        tables |= {(protocol, part): metrics for part, metrics in scores.get("by_seen", {}).items()}
    for (protocol, part), metrics in tables.items():
        for metric in METRICS:
            yield [protocol, part, metric, *(metrics[metric][bound] for bound in ("value", "low", "high"))]


def _lists_name(board: Leaderboard) -> str:
    return MEAN if len(board.main_protocols) > 1 else board.main_protocols[0]

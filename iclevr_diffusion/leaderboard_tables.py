"""The leaderboard in words and numbers: Markdown with intervals and marks, and CSV."""

import csv
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from iclevr_diffusion.leaderboard import MATCHED, MEAN, METRICS, Leaderboard, System

REAL = "real images, held out"
HELD_OUT = "held-out"  # the protocol that tells nothing of a system that was trained on its label sets
DAGGER, DOUBLE_DAGGER = "†", "‡"
DISTANCES = {
    "frechet_distance": "Frechet distance",
    "kernel_distance": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}
NEGATION = {
    "present": "all asked for seen",
    "absent": "nothing negated seen",
    "both": "both",
}
INCEPTION = {"fid": "FID", "kid": "KID"}
DIVERSITY = ("distribution", "diversity", "pixels")  # in a judge's features wrong objects count as diversity
COSTS = ("images_per_second", "seconds_for_one_image", "network_calls_per_image", "num_parameters")
PICTURES = {  # the files beside the Markdown, and what they show
    "quality_against_speed.png": "Top-k of each system against the images it draws in a second",
    "labels.png": "Top-k of each system by label",
    "samples.png": "Images that each system drew of the same labels",
}


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        title: What stands above it.
        values: A number, an estimate or a text for each system; None where it is not known.
        real: The same for real images.
        write: Writes a number out.
        apart: Rows whose number is not to be held against the others', and is marked.
    """

    title: str
    values: Sequence[Any]
    real: Any = None
    write: Callable[[float], str] = "{:.3f}".format
    apart: frozenset[int] = frozenset()

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
        """Finds the row whose interval is above those of all others of `rows`; None if there is none.

        An estimate without an interval is no best one, but a rival by its value.
        """
        found = {row: self.values[row] for row in rows if row not in self.apart}
        found = {row: one for row, one in found.items() if isinstance(one, Mapping) and one["value"] is not None}
        if len(found) < 2:
            return None
        first, *others = sorted(found, key=lambda row: -found[row]["value"])
        highest = max(found[row]["value"] if found[row]["high"] is None else found[row]["high"] for row in others)
        low = found[first]["low"]
        return first if low is not None and low > highest else None


def make_table(systems: Sequence[System], columns: Sequence[Column], judge: str | None = None) -> str:
    """Lays columns out as a Markdown table; the systems that `judge` taught are marked and never best."""
    taught = [judge is not None and system.is_taught_by(judge) for system in systems]
    best = [column.best([row for row, marked in enumerate(taught) if not marked]) for column in columns]
    lines = [markdown_row(["system", *(column.title for column in columns)]), "|---|" + "---:|" * len(columns)]
    if any(column.real is not None for column in columns):
        lines.append(markdown_row([f"*{REAL}*", *(column.cell(column.real) for column in columns)]))
    for row, system in enumerate(systems):
        cells = [column.cell(column.values[row]) for column in columns]
        cells = [f"**{cell}**" if best[place] == row else cell for place, cell in enumerate(cells)]
        cells = [cell + DOUBLE_DAGGER * (row in column.apart) for cell, column in zip(cells, columns, strict=True)]
        lines.append(markdown_row([system.name + DAGGER * taught[row], *cells]))
    return "\n".join(lines)


def markdown_row(cells: Sequence[str]) -> str:
    """Writes the cells of a table's row out."""
    return f"| {' | '.join(map(escape, cells))} |"


def escape(text: str) -> str:
    """Keeps what a file says from ending a cell or a line, and from being read as a formula."""
    return re.sub(r"([|$])", r"\\\1", " ".join(text.split()))


def _top_k_columns(board: Leaderboard, judge: str, lists: Sequence[Sequence[str]]) -> list[Column]:
    return [
        Column(
            "top-k, mean" if len(names) > 1 else f"top-k, {names[0]}",
            [system.scores(names, judge)["top_k"] for system in board.ranked],
            board.ceiling(names, judge).get("top_k"),
            apart=_trained_on(board, names),
        )
        for names in lists
    ]


def _trained_on(board: Leaderboard, protocols: Sequence[str]) -> frozenset[int]:
    """Finds the rows of systems that were trained on what others had held out."""
    if HELD_OUT not in protocols:
        return frozenset()
    return frozenset(row for row, system in enumerate(board.ranked) if system.has_seen(HELD_OUT))


def _seen_notes(board: Leaderboard, protocols: Sequence[str]) -> list[str]:
    if not _trained_on(board, protocols):
        return []
    return [
        f"{DOUBLE_DAGGER} This system was trained on some of the label sets of `{HELD_OUT}`: it shows there what it was"
        " taught, and is not held against systems that were trained without them."
    ]


def _notes(board: Leaderboard) -> list[str]:
    """Says what concerns all tables of a leaderboard."""
    notes = _seen_notes(board, board.protocols)
    if board.differing:
        lists = ", ".join(f"`{escape(name)}`" for name in board.differing)
        notes.append(f"Not shown, as their conditions differ from system to system: {lists}.")
    return notes


def _main_columns(board: Leaderboard, judge: str) -> list[Column]:
    """Makes the top-k columns of the mean and of each of `main_protocols`."""
    return _top_k_columns(
        board, judge, list(dict.fromkeys([board.main_protocols, *((n,) for n in board.main_protocols)]))
    )


def _exact_match_column(board: Leaderboard, judge: str) -> Column:
    return Column(
        "exact match",
        [system.scores(board.main_protocols, judge)["exact_match"] for system in board.ranked],
        board.ceiling(board.main_protocols, judge).get("exact_match"),
        apart=_trained_on(board, board.main_protocols),
    )


def _quality_columns(board: Leaderboard, judge: str) -> list[Column]:
    precision = [system.scores(board.main_protocols, judge)["precision"] for system in board.ranked]
    distances = ("distribution", "judges", judge)
    frechet = [system.find(*distances, "generated", "frechet_distance") for system in board.ranked]
    diversity = [system.find(*DIVERSITY, "value") for system in board.ranked]
    columns = [
        *_main_columns(board, judge),
        _exact_match_column(board, judge),
        Column(
            "precision",
            precision,
            board.find("held_out_images", "judges", judge, "precision"),
            apart=_trained_on(board, board.main_protocols),
        ),
        *_top_k_columns(board, judge, [(name,) for name in board.protocols if name not in board.main_protocols]),
        Column("Frechet distance", frechet, board.find(*distances, "real", "frechet_distance"), three_digits),
    ]
    return [*columns, Column("relative diversity", diversity)] if _compares_diversity(board) else columns


def _compares_diversity(board: Leaderboard) -> bool:
    """Says whether the relative diversities are of the same conditions and real images, which follow what was drawn."""
    found = [system.find(*DIVERSITY) for system in board.ranked]
    return len({(part.get("num_conditions"), part.get("num_real")) for part in found if part}) < 2


def _inception_columns(systems: Sequence[System]) -> list[Column]:
    """Makes the columns of standard FID and KID, where they are known of every system."""
    found = [system.find("distribution", "inception") for system in systems]
    if not all(found):
        return []
    return [
        Column(title, [part["generated"][name] for part in found], found[0]["real"][name], three_digits)
        for name, title in INCEPTION.items()
    ]


def _cost_columns(board: Leaderboard, systems: Sequence[System]) -> list[Column]:
    """Makes the columns of cost; where speeds were measured on several machines, a letter says on which."""

    def speeds(name: str) -> list[str]:
        return [f"{three_digits(system.results['cost'][name])}{_machine_mark(board, system)}" for system in systems]

    cost = [system.results["cost"] for system in systems]
    return [
        Column("images/s", speeds("images_per_second")),
        Column("seconds for one image", speeds("seconds_for_one_image")),
        Column("network calls an image", [part["network_calls_per_image"] for part in cost], None, three_digits),
        Column("parameters", [f"{part['num_parameters'] / 1e6:.2f} M" for part in cost]),
    ]


def _machine_mark(board: Leaderboard, system: System) -> str:
    """Gives the letter, raised, of the machine that a system's speed was measured on; none if there is one for all."""
    letter = chr(ord("a") + board.machines.index(system.measured_on))
    return f"<sup>{letter}</sup>" if len(board.machines) > 1 else ""


def _machine_note(board: Leaderboard, systems: Sequence[System]) -> str:
    places = dict.fromkeys(f"{_machine_mark(board, system)} {system.measured_on}".strip() for system in systems)
    apart = ", and compare only where the letter is the same" if len(places) > 1 else ""
    return f"Speeds were measured on{apart}: {escape('; '.join(places))}."


def three_digits(number: float) -> str:
    """Writes a number out with three significant digits."""
    return f"{float(f'{number:.3g}'):,.10g}"


def render_markdown(board: Leaderboard, folder: Path, notes: Sequence[str] = (), further: Sequence[str] = ()) -> str:
    """Writes the whole leaderboard out.

    Args:
        board: The systems.
        folder: Where the text will lie, beside the pictures.
        notes: Further sentences to be said, such as that a picture lacks a system.
        further: Paragraphs of measurements of another kind, with their headings.
    """
    leading, *others = board.judges
    lists = _lists(board)
    over = f"means over {lists}" if len(board.main_protocols) > 1 else f"those of {lists}"
    paragraphs = [
        f"<!-- inputs_sha256: {board.inputs_sha256} -->\n\n# Leaderboard",
        "Written by `iclevr-compare` from each system's `results.json`. **Top-k**: of the k labels asked for, the share"
        " among the judge's k highest outputs. **Exact match**: the images in which the judge sees the objects asked"
        f" for and no other. **Precision**: of the objects that it sees, the share asked for. Both are {over}. In"
        " brackets stand 95 % intervals; a number in bold is the best of its column where its interval lies above those"
        " of all others, rows and numbers with a mark aside.",
        "The first row is what the judge makes of real held-out images, in top-k and exact match of images with as many"
        " objects as the list asks for; a system above it suits the judge, and does not draw better than reality."
        " **Frechet distance** is one in this judge's features, which compares with no other judge's and with no FID"
        " (one in the features of Inception, shown where it was measured for every system);"
        " its first row is that of other real images. **Relative diversity** is 1 where the pixels of images of one"
        " condition differ as those of real ones do.",
        f"## As {escape(leading)} sees it",
        f"In the order of this judge's top-k on {lists}. It taught none of the systems.",
        _main_table(board),
        _machine_note(board, board.ranked),
        *_notes(board),
    ]
    if not _compares_diversity(board):
        paragraphs.append("Relative diversities are not shown: the systems have drawn other conditions for them.")
    if board.left_out:
        reasons = (f"{escape(name)} {reason}" for name, reason in board.left_out.items())
        paragraphs.append(f"Left out: {'; '.join(reasons)}.")
    paragraphs += map(escape, notes)
    for judge in others:
        paragraphs += [
            f"## As {escape(judge)} sees it",
            make_table(board.ranked, _quality_columns(board, judge), judge),
        ]
        if any(system.is_taught_by(judge) for system in board.ranked):
            paragraphs.append(
                f"{DAGGER} {escape(judge)} had a part in this system's training: the score is not independent."
            )
    paragraphs += [f"## {text}\n\n![{text}]({name})" for name, text in PICTURES.items()]
    for other in board.others:
        paragraphs += [
            f"## Systems of other labels: {escape(labels_in_words(other))}",
            f"In the order of {escape(other.judges[0])}'s top-k on {_lists(other)}. It taught none of these systems.",
            _main_table(other),
            _machine_note(other, other.ranked),
            *_notes(other),
        ]
    if board.without_labels:
        paragraphs += ["## Systems that are not told what to draw", _table_without_labels(board)]
        paragraphs.append(_machine_note(board, board.without_labels))
    paragraphs += [*further, "## How the numbers were made", _origins(board, folder)]
    return "\n\n".join(paragraphs) + "\n"


def _main_table(board: Leaderboard) -> str:
    """Makes the table of all numbers, as the judge that ranks sees them."""
    columns = _quality_columns(board, board.judges[0]) + _inception_columns(board.ranked)
    return make_table(board.ranked, columns + _cost_columns(board, board.ranked))


def _lists(board: Leaderboard) -> str:
    return " and ".join(f"`{escape(name)}`" for name in board.main_protocols)


def labels_in_words(board: Leaderboard) -> str:
    """Names the labels of a leaderboard by the first three."""
    names = board.label_names
    return ", ".join(names[:3]) + (f", ... ({len(names)} labels)" if len(names) > 3 else "")


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
    folder = quote(folder)
    return "\n\n".join(
        [
            make_table(board.ranked, columns),
            *_seen_notes(board, board.main_protocols),
            f"As {escape(judge)} sees it, which taught none of the systems; 95 % intervals in brackets."
            f" {_machine_note(board, board.ranked)} By other judges, on other lists, by label, and as images:"
            f" [the leaderboard]({folder}/leaderboard.md).",
            f"![{text}]({folder}/{plot})",
        ]
    )


def _table_without_labels(board: Leaderboard) -> str:
    """Makes a row for each judge of each system, after a row for each judge of other real images."""
    rows, real = [], {}
    others = _inception_columns(board.without_labels)
    costs = _cost_columns(board, board.without_labels)
    for place, system in enumerate(board.without_labels):
        known = [column.cell(column.values[place]) for column in others + costs]
        for judge, found in (system.find("distribution", "judges") or {"-": {}}).items():
            rows.append([system.name, judge, *_distances(found.get("generated", {})), *known])
            if "real" in found:
                reached = [column.cell(column.real) for column in others]
                real[judge] = [f"*{REAL}*", judge, *_distances(found["real"]), *reached, *([""] * len(costs))]
    titles = ["system", "judge", *DISTANCES.values(), *(column.title for column in others + costs)]
    lines = [titles, ["---", "---", *["---:"] * (len(titles) - 2)], *real.values(), *rows]
    return "\n".join(map(markdown_row, lines))


def _distances(found: Mapping[str, float]) -> list[str]:
    return [three_digits(found[name]) if found.get(name) is not None else "-" for name in DISTANCES]


def _origins(board: Leaderboard, folder: Path) -> str:
    """Makes a table of what each system is, how it was called, how much it drew, and where its results lie."""
    lines = [
        "| system | class | weights | called with | images | speed measured with | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    for system in (*_ranked_by_any(board), *board.without_labels):
        results, cost = system.results, system.results["cost"]
        called = ", ".join(f"{name} {value}" for name, value in results["settings"]["options"].items())
        images = ", ".join(f"{name} {part['num_images']:,}" for name, part in results["protocols"].items())
        link = quote(Path(os.path.relpath(system.path, folder)).as_posix())
        cells = [
            f"[{system.name}]({link})",
            results["pipeline"]["class"],
            results["pipeline"]["weights_sha256"][:12],
            called or "-",
            images or "-",
            f"batches of {cost['batch_size']}, {cost['dtype']}",
            _short_commit(results["environment"]["git_commit"]),
        ]
        lines.append(markdown_row(cells))
    return "\n".join(lines)


def _ranked_by_any(board: Leaderboard) -> list[System]:
    return [system for one in (board, *board.others) for system in one.ranked]


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
    for one in (board, *board.others):
        real = REAL if one is board else f"{REAL}: {labels_in_words(one)}"
        for judge in one.judges:
            for row in _ceilings(one, judge):
                write(real, judge, "", *row)
        for system in one.ranked:
            for judge in one.judges:
                for row in _scores(one, system, judge):
                    write(system.name, judge, system.is_taught_by(judge), *row)
            if _compares_diversity(one) and (found := system.find(*DIVERSITY)):
                write(system.name, "", "", "", "diversity", "relative_diversity", found["value"], "", "")
    for system in (*_ranked_by_any(board), *board.without_labels):
        for judge, found in (system.find("distribution", "judges") or {}).items():
            taught = system.is_taught_by(judge)
            for part, distances in found.items():
                for name in DISTANCES:
                    write(system.name, judge, taught, MATCHED, part, name, distances.get(name), "", "")
        for part, distances in (system.find("distribution", "inception") or {}).items():
            for name in INCEPTION:
                write(system.name, "", "", MATCHED, part, name, distances[name], "", "")
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
    negations = {}
    for protocol in board.drawn:
        scores = system.find("protocols", protocol, "judges", judge) or {}
        if best := scores.get("best_of"):
            tables[protocol, f"best of {best['num_candidates']}"] = best["all"]
        if negation := scores.get("negation"):
            negations[protocol, "negation"] = negation
    for metrics_of, found in ((METRICS, tables), (NEGATION, negations)):
        for (protocol, part), metrics in found.items():
            for metric in metrics_of:
                yield [protocol, part, metric, *(metrics[metric][bound] for bound in ("value", "low", "high"))]


def _lists_name(board: Leaderboard) -> str:
    return MEAN if len(board.main_protocols) > 1 else board.main_protocols[0]

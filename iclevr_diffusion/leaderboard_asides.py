"""What stands beside the ranking in words: what systems leave out when told to, and images picked by their own losses."""

from collections.abc import Mapping
from typing import Any

from iclevr_diffusion.leaderboard import MATCHED, Leaderboard, System
from iclevr_diffusion.leaderboard_tables import DAGGER, NEGATION, Column, escape, labels_in_words, make_table

SECTION_SIGN = "§"
PICKED = {"top_k": "top-k", "exact_match": "exact match"}  # the scores of picked images that are shown


def render_negation(board: Leaderboard) -> list[str]:
    """Writes out who shows all that was asked for and nothing that was negated; nothing if nobody was asked to."""
    tables = []
    for one in (board, *board.others):
        for (protocol, conditions), systems in _drawn_with(one, "negation").items():
            scores = [_scores(system, protocol, one.judges[0])["negation"] for system in systems]
            ceiling = next((part["ceiling"] for part in scores if part.get("ceiling") is not None), None)
            columns = [
                Column(title, [part[name] for part in scores], ceiling if name == "both" else None)
                for name, title in NEGATION.items()
            ]
            tables += [_caption(board, one, protocol, conditions), make_table(systems, columns, one.judges[0])]
    if not tables:
        return []
    explained = (
        "## What was not to be shown\n\nShares of the images of lists in which each set of labels has another one that"
        f" must not be there, as {escape(board.judges[0])} sees them; {DAGGER} marks systems that the judge taught."
        " `unnegated` asks for the same labels from the same seeds without the negation, which shows what it changes. The"
        " first row is what the judge makes of real images, each of which negates a label that it does not show."
    )
    return [explained, *tables]


def render_picked(board: Leaderboard) -> list[str]:
    """Writes out the scores of images that systems have picked themselves; nothing if none has."""
    tables = []
    for one in (board, *board.others):
        for (protocol, conditions), systems in _drawn_with(one, "best_of").items():
            scores = [_scores(system, protocol, one.judges[0]) for system in systems]
            columns = [Column("n", [str(part["best_of"]["num_candidates"]) for part in scores])]
            for name, title in PICKED.items():
                columns.append(Column(f"{title}, one image", [part["all"][name] for part in scores]))
                picked = [
                    columns[-1].cell(part["best_of"]["all"][name]) for part in scores
                ]  # as text, never a best one
                columns.append(Column(f"{title}, best of n {SECTION_SIGN}", picked))
            tables += [_caption(board, one, protocol, conditions), make_table(systems, columns, one.judges[0])]
    if not tables:
        return []
    explained = (
        f"## Images that the model picked\n\n{SECTION_SIGN} Of each n images of a condition the one that the model itself"
        " finds to fit its labels best, by denoising losses with and without them, as"
        f" {escape(board.judges[0])} sees it. No judge has a part in the choice. It takes n drawings and the losses"
        " besides, so these numbers are not held against those of one image drawn once, and rank nothing."
    )
    return [explained, *tables]


def _drawn_with(board: Leaderboard, part: str) -> dict[tuple[str, str], list[System]]:
    """Finds the protocols with such scores by the judge that ranks, and the systems that have them, best first.

    Returns:
        Systems by the name of a protocol and the hash of its conditions, which may differ from system to system.
    """
    found: dict[tuple[str, str], list[System]] = {}
    for protocol in board.drawn:
        for system in board.ranked:
            if protocol != MATCHED and _scores(system, protocol, board.judges[0]).get(part):
                conditions = system.results["protocols"][protocol]["sha256"]
                found.setdefault((protocol, conditions), []).append(system)
    return found


def _scores(system: System, protocol: str, judge: str) -> Mapping[str, Any]:
    return system.find("protocols", protocol, "judges", judge) or {}


def _caption(board: Leaderboard, one: Leaderboard, protocol: str, conditions: str) -> str:
    of = "" if one is board else f" of {labels_in_words(one)}, as {one.judges[0]} sees it"
    others = {system.find("protocols", protocol, "sha256") for system in one.ranked} - {None, conditions}
    of += f", with the conditions {conditions[:8]}" if others else ""
    return f"The list `{escape(protocol)}`{escape(of)}:"

"""What may stand in one table: opens the results of systems, refuses what does not compare, and ranks the rest."""

import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA_VERSION = 2
TASK_LISTS = ("test", "new_test")
MATCHED = "matched"  # the conditions of the real images, drawn for distances from them
MEAN = "mean_of_test_and_new_test"
METRICS = ("top_k", "exact_match", "precision", "recall", "count_accuracy", "mean_average_precision")


class _Kind(NamedTuple):
    """What a value of results.json must be, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:  # noqa: ANN401 -- any JSON
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_count(value: Any) -> bool:  # noqa: ANN401 -- any JSON
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_share(value: Any) -> bool:  # noqa: ANN401 -- any JSON
    return _is_number(value) and 0 <= value <= 1


def _is_line(value: Any) -> bool:  # noqa: ANN401 -- any JSON
    return isinstance(value, str) and value.isprintable() and value.strip() != ""


def _is_estimate(value: Any) -> bool:  # noqa: ANN401 -- any JSON
    if not isinstance(value, Mapping) or not {"value", "low", "high"} <= value.keys():
        return False
    if value["low"] is None and value["high"] is None:
        return value["value"] is None or _is_share(value["value"])
    return all(_is_share(value[end]) for end in ("value", "low", "high")) and value["low"] <= value["high"]


def _or_null(kind: _Kind) -> _Kind:
    return _Kind(f"{kind.words}, or null", lambda value: value is None or kind.fits(value))


_NUMBER = _Kind("a finite number", _is_number)
_POSITIVE = _Kind("a finite number above 0", lambda value: _is_number(value) and value > 0)
_AT_LEAST_0 = _Kind("a finite number of at least 0", lambda value: _is_number(value) and value >= 0)
_SHARE = _Kind("a number from 0 to 1", _is_share)
_COUNT = _Kind("a whole number of at least 0", _is_count)
_LINE = _Kind("a line of text", _is_line)
_LINES = _Kind("a list of lines of text", lambda value: isinstance(value, list) and all(map(_is_line, value)))
_BOOL = _Kind("true or false", lambda value: isinstance(value, bool))
_ESTIMATE = _Kind("`value`, `low` and `high` from 0 to 1, `low` the lower, or null", _is_estimate)
_INTERVAL = _Kind(
    "`value`, `low` and `high` from 0 to 1", lambda value: _is_estimate(value) and value["low"] is not None
)

# What a results.json must hold for the tables to be written; "*" stands for every name, "?" for what may be missing.
_SCORES = dict.fromkeys(METRICS, _ESTIMATE)
_ASIDES = {
    "best_of?": {"num_candidates": _COUNT, "all": _SCORES},
    "negation?": dict.fromkeys(("present", "absent", "both"), _ESTIMATE) | {"ceiling?": _or_null(_SHARE)},
}
_CEILING = {"ceiling?": dict.fromkeys(("top_k", "exact_match"), _or_null(_SHARE))}
_OF_REAL = dict.fromkeys([f"{name}?" for name in METRICS], _or_null(_SHARE))
_DISTANCES = {"frechet_distance?": _AT_LEAST_0, "kernel_distance?": _NUMBER, "density?": _AT_LEAST_0}
_DISTANCES |= dict.fromkeys(("precision?", "recall?", "coverage?"), _SHARE)
_SHAPE = {
    "pipeline": {
        "name": _LINE,
        "class": _LINE,
        "weights_sha256": _LINE,
        "label_names": _or_null(_LINES),
        "trained_on_held_out?": _or_null(_BOOL),  # null where nobody knows
    },
    "settings": {
        "options": {"*": None},
        "judges": {"*": {"weights_sha256": _LINE, "threshold": _NUMBER}},
    },
    "judges_used_in_training": _LINES,
    "protocols": {
        "*": {
            "sha256": _LINE,
            "num_images": _COUNT,
            "quick": _BOOL,
            "resampled": _LINE,
            "judges": {
                "*": {
                    "all": _SCORES,
                    "by_num_objects": {"*": _SCORES},
                    "by_label": {"*": {"num_images": _COUNT, "top_k": _ESTIMATE}},
                    "by_seen?": {"*": _SCORES},
                }
                | _CEILING
                | _ASIDES
            },
        }
    },
    f"{MEAN}?": {"*": _SCORES | _CEILING},
    "held_out_images?": {"judges?": {"*": _OF_REAL | {"by_num_objects?": {"*": _OF_REAL}}}},
    "distribution?": {
        "judges?": {"*": {"generated?": _DISTANCES, "real?": _DISTANCES}},
        "diversity?": {"pixels?": {"value": _or_null(_AT_LEAST_0)}},
        "inception?": dict.fromkeys(("generated", "real"), {"fid": _AT_LEAST_0, "kid": _NUMBER}),
    },
    "cost": {
        "images_per_second": _POSITIVE,
        "seconds_for_one_image": _POSITIVE,
        "batch_size": _COUNT,
        "machine": _LINE,
        "device": _LINE,
        "dtype": _LINE,
        "num_threads": _COUNT,
        "num_parameters": _COUNT,
        "network_calls_per_image": _AT_LEAST_0,
    },
    "environment": {"git_commit": _or_null(_LINE)},
}
_AGAIN = "run iclevr-evaluate again to write it, or leave the file out"


@dataclass(frozen=True)
class System:
    """What `iclevr-evaluate` wrote about one pipeline.

    Args:
        path: Its `results.json`.
        results: The contents of that file.
    """

    path: Path
    results: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The pipeline's name."""
        return self.results["pipeline"]["name"]

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels that it knows, in the order of the alphabet; empty if it is not told what to draw."""
        return tuple(sorted(self.results["pipeline"]["label_names"] or ()))

    @property
    def samples(self) -> Path:
        """The picture of its first images, which lies beside the results."""
        return self.path.with_name("samples.png")

    @property
    def measured_on(self) -> str:
        """What its speed was measured on; speeds on different machines do not compare."""
        cost = self.results["cost"]
        threads = f"{cost['num_threads']} thread{'' if cost['num_threads'] == 1 else 's'}"
        return ", ".join(dict.fromkeys([cost["machine"], cost["device"], threads]))

    def is_taught_by(self, judge: str) -> bool:
        """Whether a judge had a part in the training, so that its scores are not independent."""
        return judge in self.results["judges_used_in_training"]

    def has_seen(self, protocol: str) -> bool:
        """Whether label sets of a protocol are known to have been among those it was trained on."""
        parts = self.results["protocols"][protocol]["judges"].values()
        return any("seen" in part.get("by_seen", {}) for part in parts)

    def scores(self, protocols: Sequence[str], judge: str) -> Mapping[str, Any]:
        """A judge's scores of one protocol, or of the mean of `test` and `new_test`."""
        if len(protocols) > 1:
            return self.results[MEAN][judge]
        return self.results["protocols"][protocols[0]]["judges"][judge]["all"]

    def ceiling(self, protocols: Sequence[str], judge: str) -> Mapping[str, float | None]:
        """The judge's scores of real images with as many objects; empty if there were none."""
        scores = self.results if len(protocols) > 1 else self.results["protocols"][protocols[0]]
        return scores[MEAN if len(protocols) > 1 else "judges"][judge].get("ceiling", {})

    def find(self, *keys: str) -> Any:  # noqa: ANN401 -- any JSON
        """Follows keys into the results; None where they lead nowhere, as into what could not be measured."""
        value: Any = self.results
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


@dataclass(frozen=True)
class Leaderboard:
    """Systems that can be compared, in the order of their rank.

    Args:
        ranked: Systems that draw what they are told, of the same labels, best first.
        without_labels: Systems that are not told what to draw, by name.
        left_out: Why a system was left out, by its name.
        judges: Judges that scored every ranked system; by the first the systems are ranked, so it taught none.
        protocols: Protocols that every ranked system has drawn.
        drawn: Protocols that some of these systems have drawn, as far as they were asked for.
        differing: Protocols that are not shown since their conditions differ from system to system.
        main_protocols: `test` and `new_test`, whose mean ranks the systems, or the one protocol that does.
        others: A leaderboard for each further set of labels.
        inputs_sha256: Hash of what the leaderboard is made of: files, and what was chosen of them.
    """

    ranked: tuple[System, ...]
    without_labels: tuple[System, ...]
    left_out: Mapping[str, str]
    judges: tuple[str, ...]
    protocols: tuple[str, ...]
    drawn: tuple[str, ...]
    differing: tuple[str, ...]
    main_protocols: tuple[str, ...]
    others: tuple["Leaderboard", ...]
    inputs_sha256: str

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels that its ranked systems know."""
        return self.ranked[0].label_names

    @property
    def machines(self) -> tuple[str, ...]:
        """What speeds were measured on, each once."""
        return tuple(dict.fromkeys(system.measured_on for system in self.ranked + self.without_labels))

    def ceiling(self, protocols: Sequence[str], judge: str) -> Mapping[str, float | None]:
        """A judge's scores of real images with as many objects as the protocols ask for; empty if unknown."""
        return _first_known(system.ceiling(protocols, judge) for system in self.ranked) or {}

    def find(self, *keys: str) -> Any:  # noqa: ANN401 -- any JSON
        """Looks up what is the same for every system, such as a judge's scores of real images; None if unknown."""
        return _first_known(system.find(*keys) for system in self.ranked)


def _first_known(values: Iterable[Any]) -> Any:  # noqa: ANN401 -- one of the values
    return next((value for value in values if value not in (None, {})), None)


def load_system(path: Path) -> System:
    """Opens a `results.json`.

    Raises:
        ValueError: If it is not one of this version, or lacks something that the tables show.
    """
    try:
        results = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON, and does not ({error}); {_AGAIN}.") from None
    version = results.get("schema_version") if isinstance(results, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path} must have schema_version {SCHEMA_VERSION}, got {version!r}; {_AGAIN}.")
    if misfit := _misfit(results, _SHAPE):
        raise ValueError(f"{path} is malformed: {misfit}; {_AGAIN}.")
    return System(path, results)


def _misfit(value: Any, shape: Any, place: str = "") -> str | None:  # noqa: ANN401 -- any JSON
    """Names the first place where `value` is not of the shape; what the shape does not list is free."""
    if shape is None:
        return None
    if isinstance(shape, _Kind):
        return None if shape.fits(value) else f"{place} must be {shape.words}, got {value!r}"
    if not isinstance(value, Mapping):
        return f"{place} must be a mapping, got {value!r}"
    if "*" in shape:
        if strange := [key for key in value if not _is_line(key)]:
            return f"the names in {place} must be lines of text, got {strange[0]!r}"
        return _first_known(_misfit(part, shape["*"], f"{place}.{key}") for key, part in value.items())
    for key, part in shape.items():
        name = key.removesuffix("?")
        inner = f"{place}.{name}".removeprefix(".")
        if name not in value and name == key:
            return f"{inner} is missing"
        if name in value and (misfit := _misfit(value[name], part, inner)):
            return misfit
    return None


def make_leaderboard(systems: Sequence[System], protocols: Sequence[str] | None = None) -> Leaderboard:
    """Ranks systems by the mean top-k on `test` and `new_test` that an independent judge gives them.

    Systems that drew too few images for an interval, or that were trained on the images that are held out from others,
    are left out. The judge that ranks is, of those that scored every system and taught none, the one that reads real
    images best. Systems of other labels than most are ranked among themselves.

    Args:
        systems: The systems, in any order.
        protocols: Protocols to be shown of the labels that most systems know; None shows those that all these systems
            have drawn alike, but for `matched`.

    Raises:
        ValueError: If two results do not compare: other conditions, other judges or other real images under one name,
            no protocol or no independent judge for all.
    """
    systems = sorted(systems, key=lambda system: system.name)
    for one, other in pairwise(systems):
        if one.name == other.name:
            raise ValueError(
                f"Systems must have distinct names, and {one.path} and {other.path} are both {one.name!r}; leave one"
                " out, or evaluate it again under another name."
            )
    left_out: dict[str, str] = {}
    without_labels: list[System] = []
    groups: defaultdict[tuple[str, ...], list[System]] = defaultdict(list)
    for system in systems:
        if system.find("pipeline", "trained_on_held_out"):
            left_out[system.name] = "was trained on all images, with none held out"
        elif system.results["protocols"]:
            groups[system.label_names].append(system)
        else:
            without_labels.append(system)
    # The most systems come first; of as many, those of the first name.
    order = sorted(groups.values(), key=lambda group: -sum(not _is_quick(system, protocols) for system in group))
    boards = []
    for group in order:
        wanted = None if boards else protocols
        quick = [system.name for system in group if _is_quick(system, wanted)]
        left_out |= dict.fromkeys(quick, "drew too few images (quick)")
        if len(quick) < len(group):
            boards.append(_rank([system for system in group if system.name not in quick], wanted))
    if not boards:
        reasons = [f"{name} {reason}" for name, reason in sorted(left_out.items())] or ["none draws labels"]
        raise ValueError(
            f"A leaderboard needs at least one system that can be ranked, and {'; '.join(reasons)}; evaluate with at"
            " least ten seeds, such as iclevr-evaluate --seeds 30."
        )
    _check_same_references(without_labels)
    main, *others = boards
    return replace(
        main,
        without_labels=tuple(without_labels),
        left_out=dict(sorted(left_out.items())),
        others=tuple(others),
        inputs_sha256=_hash_inputs(systems, boards),
    )


def _rank(systems: Sequence[System], protocols: Sequence[str] | None) -> Leaderboard:
    """Makes the leaderboard of systems that know the same labels, by itself."""
    _check_same_references(systems)
    shown, differing = _choose_protocols(systems, protocols)
    judges = _choose_judges(systems, shown)
    main = TASK_LISTS if set(TASK_LISTS) <= set(shown) else shown[:1]
    for system in systems:
        scores = system.find(MEAN) if len(main) > 1 else {judge: system.scores(main, judge) for judge in judges}
        shape = dict.fromkeys(judges, _SCORES | {"top_k": _INTERVAL})  # what ranks has an interval
        if misfit := _misfit(scores, shape, MEAN if len(main) > 1 else f"protocols.{main[0]}"):
            raise ValueError(f"{system.path} is malformed: {misfit}; {_AGAIN}.")
    return Leaderboard(
        ranked=tuple(sorted(systems, key=lambda system: -system.scores(main, judges[0])["top_k"]["value"])),
        without_labels=(),
        left_out={},
        judges=judges,
        protocols=shown,
        drawn=tuple(
            sorted(
                set(protocols) if protocols else {name for system in systems for name in system.results["protocols"]}
            )
        ),
        differing=differing,
        main_protocols=main,
        others=(),
        inputs_sha256="",
    )


def _is_quick(system: System, protocols: Sequence[str] | None) -> bool:
    """Whether a list that is to be shown was drawn too few times."""
    drawn = system.results["protocols"]
    return any(part["quick"] for name, part in drawn.items() if name in (protocols or set(drawn) - {MATCHED}))


def _check_same_references(systems: Sequence[System]) -> None:
    """Refuses judges that share no more than their name, and distances from other images or between other numbers."""
    for judge in sorted({name for system in systems for name in system.results["settings"]["judges"]}):
        for key in ("weights_sha256", "threshold"):
            _check_same(systems, f"the {key} of the judge {judge}", ("settings", "judges", judge, key))
    _check_same(systems, "the real images that judges were tested on", ("held_out_images", "data_sha256"))
    _check_same(systems, "the real images that distances are from", ("distribution", "data_sha256"))
    for key in ("num_generated", "num_real"):  # a Frechet distance falls with the number of images
        _check_same(systems, f"the {key} of the distances", ("distribution", key))


def _check_same(systems: Sequence[System], what: str, keys: Sequence[str]) -> None:
    known = [(system, value) for system in systems if (value := system.find(*keys)) is not None]
    for (one, value), (other, other_value) in pairwise(known):
        if value != other_value:
            raise ValueError(
                f"Results in one table must agree in {what}: {'.'.join(keys)} is {str(value)[:16]} in {one.path} and"
                f" {str(other_value)[:16]} in {other.path}. Evaluate both alike, or leave one out."
            )


def _choose_protocols(
    systems: Sequence[System], wanted: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Chooses what to show; names, too, the protocols that all have drawn, but not of the same conditions."""
    for system in systems:
        if strangers := set(wanted or []) - set(system.results["protocols"]):
            raise ValueError(
                f"`--protocols` must name what every system has drawn, and {system.path} lacks"
                f" {', '.join(sorted(strangers))}: it has {', '.join(system.results['protocols'])}. Evaluate it on"
                " those too, or ask for others."
            )
    drawn = [set(system.results["protocols"]) for system in systems]
    shared = set(wanted) if wanted else set.intersection(*drawn) - {MATCHED}
    differing = {name for name in shared if len({_conditions(system, name) for system in systems}) > 1}
    for name in sorted(differing if wanted else differing.intersection(TASK_LISTS)):
        what = f"the conditions of the protocol {name}{', asked for by `--protocols`' if wanted else ''}"
        _check_same(systems, what, ("protocols", name, "sha256"))
    shared -= differing
    if not shared:
        lists = "; ".join(f"{system.path} has {', '.join(system.results['protocols'])}" for system in systems)
        reasons = [f"{name} asks each for other label sets" for name in sorted(differing)]
        if all(MATCHED in names for names in drawn):
            few = " and was drawn too few times" if any(_is_quick(system, [MATCHED]) for system in systems) else ""
            reasons.append(f"{MATCHED} ranks only where `--protocols` asks for it{few}")
        why = f" Of what all have drawn, {'; '.join(reasons)}." if reasons else ""
        raise ValueError(
            f"Systems must share a protocol of the same conditions, and share none: {lists}.{why} Evaluate them on the"
            " same lists, such as a file in the form of test.json."
        )
    for name in sorted(shared):
        _check_same(systems, f"what the intervals of {name} draw again", ("protocols", name, "resampled"))
    shown = sorted(shared, key=lambda name: (*(name != known for known in TASK_LISTS), name))
    return tuple(shown), tuple(sorted(differing))


def _conditions(system: System, protocol: str) -> str:
    return system.results["protocols"][protocol]["sha256"]


def _choose_judges(systems: Sequence[System], protocols: Sequence[str]) -> tuple[str, ...]:
    for system in systems:
        judges = list(system.results["settings"]["judges"])
        if all(system.is_taught_by(judge) for judge in judges):
            raise ValueError(
                f"{system.path} must hold the scores of a judge that had no part in the training, and holds those of"
                f" {', '.join(judges)} alone; run iclevr-evaluate with another judge too."
            )
    parts = [system.results["protocols"][name]["judges"] for system in systems for name in protocols]
    shared = set(parts[0]).intersection(*parts)
    taught = {judge for judge in shared if any(system.is_taught_by(judge) for system in systems)}
    if shared == taught:
        lists = "; ".join(
            f"{system.path} has {', '.join(system.results['settings']['judges'])}"
            + "".join(f", taught by {judge}" for judge in system.results["judges_used_in_training"])
            for system in systems
        )
        raise ValueError(
            f"Systems must share a judge that taught none of them, and share none: {lists}. Run iclevr-evaluate with"
            " the same judges for all."
        )

    def order(judge: str) -> tuple[bool, float, str]:
        read = _first_known(system.find("held_out_images", "judges", judge, "exact_match") for system in systems)
        return judge in taught, -(read or 0.0), judge

    return tuple(sorted(shared, key=order))


def _hash_inputs(systems: Sequence[System], boards: Sequence[Leaderboard]) -> str:
    """Hashes the systems' files, each `results.json` before its `samples.png`, and what is shown of whom."""
    chosen = [[board.protocols, [system.name for system in board.ranked]] for board in boards]
    digest = hashlib.sha256(json.dumps(chosen).encode())
    for system in systems:
        for path in (system.path, system.samples):
            if path.is_file():
                digest.update(path.read_bytes())
    return digest.hexdigest()


def top_k_by_label(board: Leaderboard) -> tuple[list[str], list[list[float | None]]]:
    """Gives the share of images in which the ranking judge finds a label asked for, by label.

    It is taken from the protocol `all` if every system has drawn it, else from the images of `main_protocols` together.

    Returns:
        The labels, and a row of values for each ranked system; None where no image was asked to show the label.
    """
    names = labels_protocols(board)
    rows = []
    for system in board.ranked:
        hits, counts = Counter(), Counter()
        for name in names:
            for label, scores in system.results["protocols"][name]["judges"][board.judges[0]]["by_label"].items():
                if scores["top_k"]["value"] is not None:
                    hits[label] += scores["num_images"] * scores["top_k"]["value"]
                    counts[label] += scores["num_images"]
        rows.append({label: hits[label] / counts[label] for label in counts})
    labels = list(dict.fromkeys(label for row in rows for label in row))
    return labels, [[row.get(label) for label in labels] for row in rows]


def labels_protocols(board: Leaderboard) -> tuple[str, ...]:
    """Names the protocols whose images `top_k_by_label` counts."""
    return ("all",) if "all" in board.protocols else board.main_protocols

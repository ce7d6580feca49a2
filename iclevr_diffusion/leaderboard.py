"""What may stand in one table: opens the results of systems, refuses what does not compare, and ranks the rest."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 2
TASK_LISTS = ("test", "new_test")
MEAN = "mean_of_test_and_new_test"
METRICS = ("top_k", "exact_match", "precision", "recall", "count_accuracy", "mean_average_precision")

# What a results.json must hold for the tables to be written; "*" stands for every name.
_NUMBER = (int, float)
_INTERVAL = dict.fromkeys(("value", "low", "high"), _NUMBER)
_ESTIMATE = dict.fromkeys(("value", "low", "high"), (int, float, type(None)))
_SCORES = dict.fromkeys(METRICS, _ESTIMATE)
_SHAPE = {
    "pipeline": {"name": str, "class": str, "weights_sha256": str},
    "settings": {"options": dict, "judges": {"*": {"weights_sha256": str, "threshold": _NUMBER}}},
    "judges_used_in_training": list,
    "protocols": {
        "*": {
            "sha256": str,
            "num_images": int,
            "quick": bool,
            "judges": {
                "*": {
                    "all": _SCORES,
                    "by_num_objects": {"*": _SCORES},
                    "by_label": {"*": {"num_images": int, "top_k": _ESTIMATE}},
                }
            },
        }
    },
    "cost": {
        "images_per_second": _NUMBER,
        "seconds_for_one_image": _NUMBER,
        "batch_size": int,
        "device": str,
        "dtype": str,
        "num_threads": int,
        "num_parameters": int,
        "network_calls_per_image": _NUMBER,
    },
    "environment": {"machine": str, "git_commit": (str, type(None))},
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
    def samples(self) -> Path:
        """The picture of its first images, which lies beside the results."""
        return self.path.with_name("samples.png")

    @property
    def measured_on(self) -> str:
        """What its speed was measured on; speeds on different machines do not compare."""
        cost, machine = self.results["cost"], self.results["environment"]["machine"]
        threads = f"{cost['num_threads']} thread{'' if cost['num_threads'] == 1 else 's'}"
        return ", ".join(dict.fromkeys([machine, cost["device"], threads]))

    def is_taught_by(self, judge: str) -> bool:
        """Whether a judge had a part in the training, so that its scores are not independent."""
        return judge in self.results["judges_used_in_training"]

    def scores(self, protocols: Sequence[str], judge: str) -> Mapping[str, Any]:
        """A judge's scores of one protocol, or of the mean of `test` and `new_test`."""
        if len(protocols) > 1:
            return self.results[MEAN][judge]
        return self.results["protocols"][protocols[0]]["judges"][judge]["all"]

    def ceiling(self, protocols: Sequence[str], judge: str) -> Mapping[str, float]:
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
        ranked: Systems that draw what they are told, best first.
        without_labels: Systems that are not told what to draw, by name.
        quick: Names of systems that were left out for having drawn too few images.
        judges: Judges that scored every ranked system; by the first the systems are ranked, so it taught none.
        protocols: Protocols that every ranked system has drawn.
        main_protocols: `test` and `new_test`, whose mean ranks the systems, or the one protocol that does.
        inputs_sha256: Hash of all the files that the leaderboard is made of.
    """

    ranked: tuple[System, ...]
    without_labels: tuple[System, ...]
    quick: tuple[str, ...]
    judges: tuple[str, ...]
    protocols: tuple[str, ...]
    main_protocols: tuple[str, ...]
    inputs_sha256: str

    @property
    def machines(self) -> tuple[str, ...]:
        """What speeds were measured on, each once."""
        return tuple(dict.fromkeys(system.measured_on for system in self.ranked + self.without_labels))

    def ceiling(self, protocols: Sequence[str], judge: str) -> Mapping[str, float]:
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
    if not isinstance(shape, Mapping):
        kinds = " or ".join(kind.__name__ for kind in (shape if isinstance(shape, tuple) else (shape,)))
        return None if isinstance(value, shape) else f"{place} must be {kinds}, got {value!r}"
    if not isinstance(value, Mapping):
        return f"{place} must be a mapping, got {value!r}"
    for key, part in (dict.fromkeys(value, shape["*"]) if "*" in shape else shape).items():
        inner = f"{place}.{key}".removeprefix(".")
        if key not in value:
            return f"{inner} is missing"
        if misfit := _misfit(value[key], part, inner):
            return misfit
    return None


def make_leaderboard(systems: Sequence[System], protocols: Sequence[str] | None = None) -> Leaderboard:
    """Ranks systems by the mean top-k on `test` and `new_test` that an independent judge gives them.

    Systems that drew too few images for an interval are left out. The judge that ranks is, of those that scored every
    system and taught none, the one that reads real images best.

    Args:
        systems: The systems, in any order.
        protocols: Protocols to be shown; None shows those that all systems have drawn.

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
    labelled = [system for system in systems if system.results["protocols"]]
    without_labels = [system for system in systems if not system.results["protocols"]]
    quick = [system.name for system in labelled if _is_quick(system, protocols)]
    ranked = [system for system in labelled if system.name not in quick]
    if not ranked:
        reason = f"{', '.join(quick)} drew too few images (quick)" if quick else "none draws labels"
        raise ValueError(
            f"A leaderboard needs at least one system that can be ranked, and {reason}; evaluate with at least ten"
            " seeds, such as iclevr-evaluate --seeds 30."
        )
    for group in (ranked, without_labels):
        _check_same_references(group)
    shown = _choose_protocols(ranked, protocols)
    judges = _choose_judges(ranked, shown)
    main = TASK_LISTS if set(TASK_LISTS) <= set(shown) else shown[:1]
    for system in ranked:
        scores = system.find(MEAN) if len(main) > 1 else {judge: system.scores(main, judge) for judge in judges}
        shape = dict.fromkeys(judges, _SCORES | {"top_k": _INTERVAL})  # what ranks has an interval
        if misfit := _misfit(scores, shape, MEAN if len(main) > 1 else f"protocols.{main[0]}"):
            raise ValueError(f"{system.path} is malformed: {misfit}; {_AGAIN}.")
    return Leaderboard(
        ranked=tuple(sorted(ranked, key=lambda system: -system.scores(main, judges[0])["top_k"]["value"])),
        without_labels=tuple(without_labels),
        quick=tuple(quick),
        judges=judges,
        protocols=shown,
        main_protocols=main,
        inputs_sha256=_hash_files(systems),
    )


def _is_quick(system: System, protocols: Sequence[str] | None) -> bool:
    drawn = system.results["protocols"]
    return any(part["quick"] for name, part in drawn.items() if protocols is None or name in protocols)


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


def _choose_protocols(systems: Sequence[System], wanted: Sequence[str] | None) -> tuple[str, ...]:
    for system in systems:
        if strangers := set(wanted or []) - set(system.results["protocols"]):
            raise ValueError(
                f"`protocols` must name what every system has drawn, and {system.path} lacks"
                f" {', '.join(sorted(strangers))}: it has {', '.join(system.results['protocols'])}. Evaluate it on"
                " those too, or ask for others."
            )
    shared = set(wanted or systems[0].results["protocols"])
    shared = shared.intersection(*(system.results["protocols"] for system in systems))
    if not shared:
        lists = "; ".join(f"{system.path} has {', '.join(system.results['protocols'])}" for system in systems)
        raise ValueError(f"Systems must share a protocol, and share none: {lists}. Evaluate them on the same lists.")
    for name in sorted(shared):
        _check_same(systems, f"the conditions of the protocol {name}", ("protocols", name, "sha256"))
    return tuple(sorted(shared, key=lambda name: (*(name != known for known in TASK_LISTS), name)))


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


def _hash_files(systems: Sequence[System]) -> str:
    """Hashes the systems' files one after the other, each `results.json` before its `samples.png`."""
    digest = hashlib.sha256()
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

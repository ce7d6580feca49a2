"""Which label sets a pipeline is asked to draw in an evaluation."""

import dataclasses
import difflib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np

from iclevr_diffusion.data import ImageStore
from iclevr_diffusion.labels import ASSETS, ICLEVR_LABELS, LabelVocabulary, read_label_lists

PROTOCOLS = ("test", "new_test", "held-out", "seen", "all", "unseen", "crowded", "composed", "negated", "unnegated")
MATCHED = "matched"  # by `matched_protocol`, as it needs images
COMBINATIONS = "combinations"  # by `combinations_protocol`, likewise

_MAX_CONDITIONS = 100_000  # of `all`: 84 labels; at 30 images each, already three million images
_NUM_CROWDED = _NUM_NEGATED = 100  # sets of each size
_MAX_COMBINATIONS = 100
_MAX_SEEN = 1000  # of `seen`
_FEW_CONDITIONS = 100  # a list of fewer conditions stands for itself, one of more for the sets it was drawn from


@dataclass(frozen=True)
class Protocol:
    """The conditions of an evaluation.

    Args:
        name: What the results call it.
        conditions: Labels of each image to draw; each condition is drawn several times, as replicates.
        resampled: What the intervals of its scores resample: `replicates` within each condition where the conditions
            are all that is asked for, `conditions` where they stand for more such label sets.
        prompts: What a pipeline is asked for each condition, where that is text and not the labels themselves; see
            `iclevr_diffusion.pipelines.composition.parse_prompt`.
        negated: For each condition the labels that its images must not show, where that is scored.
        seeded_as: Name of the protocol whose images have the same seeds, condition by condition, so that they differ
            only in how they were asked for.
    """

    name: str
    conditions: tuple[tuple[str, ...], ...]
    resampled: Literal["replicates", "conditions"]
    prompts: tuple[str, ...] | None = None
    negated: tuple[tuple[str, ...], ...] | None = None
    seeded_as: str | None = None

    def __len__(self) -> int:
        return len(self.conditions)

    @property
    def sha256(self) -> str:
        """Hash of what is asked for in its order, without the name: scores are comparable where it is the same."""
        asked = self.conditions
        if self.prompts is not None or self.negated is not None:
            asked = (self.conditions, self.prompts, self.negated)
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def request(self, position: int) -> str | list[str]:
        """Gives what a pipeline is asked for the condition at `position`: text or labels."""
        return list(self.conditions[position]) if self.prompts is None else self.prompts[position]


def open_protocol(
    name_or_path: str | Path,
    vocabulary: LabelVocabulary,
    *,
    training_conditions: Sequence[Sequence[str]] | None = None,
) -> Protocol:
    """Opens a protocol by its name, or makes one of a list of one's own.

    - `test`, `new_test`: the lists of i-CLEVR, whose label sets nearly all occur among its training images.
    - `held-out`: 24 pairs and 96 triples of i-CLEVR's labels, each label in two of the pairs and twelve of the triples,
      and no pair in a triple. A training run with `hold_out: held-out` sees no image that shows all labels of one of
      them, so that a pipeline must combine what it has only seen apart, as in *Compositional Abilities Emerge
      Multiplicatively* (Okawa et al., 2023, https://arxiv.org/abs/2310.09336).
    - `seen`: the label sets that the training images show, up to 1,000 of them chosen by a hash: sets that make sense,
      whatever the labels mean.
    - `all`: every set of one, two and three labels, 2,324 for the 24 of i-CLEVR.
    - `unseen`: those of `all` that no training image shows.
    - `crowded`: up to 100 sets of four and of five labels, more than i-CLEVR's images show, as in *Local Mechanisms of
      Compositional Generalization in Conditional Diffusion* (Bradley, 2025, https://arxiv.org/abs/2509.16447).
    - `composed`: the sets of `crowded` from the same seeds, each label a condition of its own, joined by AND as in
      *Compositional Visual Generation with Composable Diffusion Models* (Liu et al., 2022,
      https://arxiv.org/abs/2206.01714).
    - `negated`: up to 100 sets of one and of two labels, each with AND NOT another label, one that shares a word with
      them where there is such a one (i-CLEVR's colour or shape); and `unnegated`: the same labels from the same seeds
      without it, which shows what the negation changes.

    Any of i-CLEVR's labels can stand beside any other. Other labels can exclude each other, as the digits of one place
    do: where their training conditions are known, `crowded` and `composed` join only labels of which any two stand
    together in a training image, and `negated` and `unnegated` ask for label sets that training images show.

    Args:
        name_or_path: One of `PROTOCOLS`, or a file in the form of i-CLEVR's `test.json`, which gives its own name.
        vocabulary: The labels that the pipeline knows.
        training_conditions: Label sets of the images that the pipeline was trained on, see `provenance.training_facts`; only
            `seen` and `unseen` need them.

    Raises:
        FileNotFoundError: If it is neither a name nor a file.
        ValueError: If the protocol does not fit the vocabulary, the training conditions that it needs are not known or
            leave nothing unseen, or the file holds an empty or repeated condition, or no list of conditions, or has
            the name of one of `PROTOCOLS` and other conditions.
    """
    if name_or_path in ("test", "new_test", "held-out"):
        conditions = _packaged_conditions(name_or_path, vocabulary)
    elif name_or_path == "all":
        conditions = _all_conditions(vocabulary)
    elif name_or_path == "seen":
        conditions = _seen_conditions(vocabulary, training_conditions)
    elif name_or_path == "unseen":
        conditions = _unseen_conditions(vocabulary, training_conditions)
    elif name_or_path == "crowded":
        conditions = _crowded_conditions(vocabulary, training_conditions)
    elif name_or_path == "composed":
        crowded = open_protocol("crowded", vocabulary, training_conditions=training_conditions)
        prompts = tuple(" AND ".join(labels) for labels in crowded.conditions)
        return dataclasses.replace(crowded, name="composed", prompts=prompts, seeded_as="crowded")
    elif name_or_path in ("negated", "unnegated"):
        return _negated_protocol(name_or_path, vocabulary, training_conditions)
    else:
        path = Path(name_or_path)
        conditions = _read_conditions(path, vocabulary)
        if path.stem in PROTOCOLS:
            return _same_protocol(path, conditions, vocabulary, training_conditions)
        name_or_path = path.stem
    return Protocol(name_or_path, tuple(map(tuple, conditions)), _resampled(conditions))


def _resampled(conditions: Sequence[object]) -> Literal["replicates", "conditions"]:
    """Says what intervals resample: few conditions drawn again would give intervals that cover less than they say."""
    return "replicates" if len(conditions) < _FEW_CONDITIONS else "conditions"


def _same_protocol(
    path: Path,
    conditions: Sequence[Sequence[str]],
    vocabulary: LabelVocabulary,
    training_conditions: Sequence[Sequence[str]] | None,
) -> Protocol:
    """Opens the protocol that a file is named after; other conditions under its name would pass for its own."""
    try:
        protocol = open_protocol(path.stem, vocabulary, training_conditions=training_conditions)
    except ValueError:  # a name that means nothing here, such as `test` for other labels than i-CLEVR's
        protocol = None
    as_listed = Protocol(path.stem, tuple(map(tuple, conditions)), "conditions")  # a file can ask for labels alone
    if protocol is None or protocol.sha256 != as_listed.sha256:
        raise ValueError(
            f"{path} must hold the conditions of the protocol {path.stem!r} in their order, and asks for something else;"
            " give the file another name."
        )
    return protocol


def matched_protocol(store: ImageStore) -> Protocol:
    """Asks for the label sets of the held-out images, each as often as it occurs there.

    What is drawn then differs from these images in nothing but the images themselves, which is what distribution
    metrics measure. Images without labels are left out.

    Raises:
        ValueError: If no held-out image has labels.
    """
    rows = store.class_labels[store.indices("held-out")]
    names = store.vocabulary.names
    conditions = tuple(tuple(names[i] for i in row.nonzero()[0]) for row in rows if row.any())
    if not conditions:
        raise ValueError(
            "`store` must have held-out images with labels, and none of its images is one; a twentieth of the scenes is"
            " held out, so give a data set of more scenes."
        )
    return Protocol(MATCHED, conditions, "conditions")


def combinations_protocol(store: ImageStore) -> Protocol:
    """Chooses a tenth of the images' sets of two labels or more, 100 at most, for a training run to hold out.

    Labels take turns, and each keeps at least half of its images when those that show a held-out set, whatever else
    they show, are left out. So the pipeline can know every label, and must combine them as it has never seen them.

    Raises:
        ValueError: If no set can be held out.
    """
    names = store.vocabulary.names
    rows, num_images = np.unique(store.class_labels, axis=0, return_counts=True)
    rows = rows.astype(np.int64)
    # Sets of several labels, in the order of hashes of their names.
    several = sorted(
        (row for row in rows if row.sum() > 1), key=lambda row: _hash(" ".join(names[i] for i in row.nonzero()[0]))
    )
    candidates = np.array(several, dtype=np.int64).reshape(-1, len(names))
    number = min(_MAX_COMBINATIONS, max(1, len(candidates) // 10))
    enough, left = (rows.T @ num_images) / 2, np.ones(len(rows), dtype=bool)
    num_uses, held_out = np.zeros(len(names), dtype=np.int64), []
    while len(candidates) and len(held_out) < number:
        position = int(np.argmin(candidates @ num_uses))  # of the labels used least so far
        row, candidates = candidates[position], np.delete(candidates, position, axis=0)
        still_left = left & (rows @ row < row.sum())
        if (rows[still_left].T @ num_images[still_left] >= enough).all():
            held_out.append(row)
            num_uses += row
            left = still_left
    if not held_out:
        raise ValueError(
            "There is no set of two labels or more to hold out of which each label keeps half of its images; give a"
            " file in the form of test.json, or more images."
        )
    conditions = sorted(tuple(row.nonzero()[0].tolist()) for row in held_out)
    return Protocol(
        COMBINATIONS, tuple(tuple(names[i] for i in labels) for labels in conditions), _resampled(conditions)
    )


def _packaged_conditions(name: str, vocabulary: LabelVocabulary) -> list[list[str]]:
    path = ASSETS / f"{name.replace('-', '_')}.json"
    labels = {label for condition in json.loads(path.read_text(encoding="utf-8")) for label in condition}
    if missing := sorted(labels - set(vocabulary)):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"The protocol `{name}` asks for i-CLEVR's labels, but the vocabulary of {len(vocabulary)} labels lacks"
            f" {', '.join(missing[:3])}{more}; take `seen` or `all`, give a file in the form of test.json, or have a"
            f" training run hold out sets of its own labels with `hold_out: {COMBINATIONS}`."
        )
    return read_label_lists(path, vocabulary)


def _all_conditions(vocabulary: LabelVocabulary) -> list[tuple[str, ...]]:
    sizes = (1, 2, 3)
    num_conditions = sum(math.comb(len(vocabulary), size) for size in sizes)
    if num_conditions > _MAX_CONDITIONS:
        raise ValueError(
            f"The protocols `all` and `unseen` hold at most {_MAX_CONDITIONS:,} label sets, but {len(vocabulary)} labels"
            f" form {num_conditions:,} sets of one to three; take `seen`, or give a file in the form of test.json with some."
        )
    return [condition for size in sizes for condition in combinations(vocabulary, size)]


def _label_sets(
    name: str, vocabulary: LabelVocabulary, training_conditions: Sequence[Sequence[str]] | None
) -> set[frozenset[str]]:
    """Returns the label sets of the training images, which the protocol `name` needs."""
    if training_conditions is None:
        raise ValueError(
            f"The protocol `{name}` needs `training_conditions`, the label sets of the training images, and this pipeline"
            " comes without them; evaluate the `pipeline` folder of its training run, which conditions.json lies beside,"
            " or export it again with `export_pipeline(..., training=run_folder)`."
        )
    try:
        return {
            frozenset(vocabulary.names[vocabulary.index(label)] for label in labels) for labels in training_conditions
        }
    except ValueError as error:
        raise ValueError(f"`training_conditions` must hold labels that the pipeline knows: {error}") from None


def _seen_conditions(
    vocabulary: LabelVocabulary, training_conditions: Sequence[Sequence[str]] | None
) -> list[tuple[str, ...]]:
    seen = _label_sets("seen", vocabulary, training_conditions) - {frozenset()}
    if not seen:
        raise ValueError("The protocol `seen` is empty: no training image has a label.")
    conditions = [tuple(sorted(labels, key=vocabulary.index)) for labels in seen]
    conditions = sorted(conditions, key=lambda labels: _hash(json.dumps(labels)))[:_MAX_SEEN]
    return sorted(conditions, key=lambda labels: (len(labels), [vocabulary.index(label) for label in labels]))


def _unseen_conditions(
    vocabulary: LabelVocabulary, training_conditions: Sequence[Sequence[str]] | None
) -> list[tuple[str, ...]]:
    seen = _label_sets("unseen", vocabulary, training_conditions)
    conditions = _all_conditions(vocabulary)
    unseen = [condition for condition in conditions if frozenset(condition) not in seen]
    if not unseen:
        raise ValueError(
            f"The protocol `unseen` is empty: the training images show all {len(conditions):,} sets of one to three"
            " labels; take `all`."
        )
    return unseen


def _crowded_conditions(
    vocabulary: LabelVocabulary, training_conditions: Sequence[Sequence[str]] | None
) -> list[tuple[str, ...]]:
    if len(vocabulary) < 5:
        raise ValueError(
            f"The protocol `crowded` needs at least 5 labels for sets of four and five, got {len(vocabulary)}; give a"
            " file in the form of test.json."
        )
    fits = _fits_anyhow
    if set(vocabulary) != set(ICLEVR_LABELS) and training_conditions is not None:
        seen = _label_sets("crowded", vocabulary, training_conditions)
        pairs = {frozenset(pair) for labels in seen for pair in combinations(labels, 2)}

        def fits(labels: Sequence[str]) -> bool:
            return all(frozenset((labels[-1], other)) in pairs for other in labels[:-1])

    conditions = [labels for size in (4, 5) for labels in _balanced_sets(vocabulary, size, _NUM_CROWDED, fits)]
    if not conditions:
        raise ValueError(
            "The protocol `crowded` joins four and five labels of which any two stand together in a training image, and"
            " there are no such four: these labels exclude each other. Take `seen`, or give a file in the form of"
            " test.json."
        )
    return conditions


def _negated_protocol(
    name: str, vocabulary: LabelVocabulary, training_conditions: Sequence[Sequence[str]] | None
) -> Protocol:
    """Negates labels that share a word with one asked for, where there are any, since these are drawn by mistake most.

    Each set of one label is taken with several negations in turn, so that there are about as many as of two.
    """
    if len(vocabulary) < 3:
        raise ValueError(
            f"The protocol `{name}` needs at least 3 labels, for sets of two and one that they must not show, got"
            f" {len(vocabulary)}; draw text of your own with iclevr-sample."
        )
    seen = None
    if set(vocabulary) != set(ICLEVR_LABELS) and training_conditions is not None:
        seen = _label_sets(name, vocabulary, training_conditions)
    conditions, negated, num_uses = [], [], Counter()
    for size, num_negations in ((1, 4), (2, 1)):

        def fits(labels: Sequence[str], size: int = size) -> bool:
            return seen is None or len(labels) < size or frozenset(labels) in seen

        for labels in _balanced_sets(vocabulary, size, _NUM_NEGATED // num_negations, fits):
            words = {word for label in labels for word in label.split()}
            order = {
                label: (words.isdisjoint(label.split()), num_uses[label], _hash(f"{' '.join(sorted(labels))} {label}"))
                for label in vocabulary
                if label not in labels
            }
            for left_out in sorted(order, key=order.__getitem__)[:num_negations]:
                num_uses[left_out] += 1
                conditions.append(labels)
                negated.append((left_out,))
    if not conditions:
        raise ValueError(
            f"The protocol `{name}` asks for one and two labels as training images show them, and none shows so few;"
            " draw text of your own with iclevr-sample."
        )
    prompts = None
    if name == "negated":
        prompts = tuple(
            f"{', '.join(labels)} AND NOT {left_out}" for labels, (left_out,) in zip(conditions, negated, strict=True)
        )
    return Protocol(
        name,
        tuple(conditions),
        "conditions",
        prompts=prompts,
        negated=tuple(negated),
        seeded_as="negated" if name == "unnegated" else None,
    )


def _fits_anyhow(labels: Sequence[str]) -> bool:
    return True


def _balanced_sets(
    vocabulary: LabelVocabulary, size: int, number: int, fits: Callable[[Sequence[str]], bool]
) -> list[tuple[str, ...]]:
    """Draws sets of the labels used least so far; hashes break ties, so that no library's generator is relied upon.

    Args:
        vocabulary: The labels.
        size: Labels of a set.
        number: How many sets are drawn, if there are so many.
        fits: Whether a set's first labels may stand together, if those without the last one may.
    """
    drawn: dict[frozenset[str], None] = {}
    num_uses = Counter()
    for draw in range(min(number, math.comb(len(vocabulary), size))):
        order = sorted(vocabulary, key=lambda label: (num_uses[label], _hash(f"{size} {draw} {label}")))
        # The first ones come first, and what follows differs from them as late as possible.
        condition = next((labels for labels in _sets_in_order(order, size, fits) if labels not in drawn), None)
        if condition is None:
            break
        drawn[condition] = None
        num_uses.update(condition)
    return [tuple(sorted(labels, key=vocabulary.index)) for labels in drawn]


def _sets_in_order(
    order: Sequence[str], size: int, fits: Callable[[Sequence[str]], bool], chosen: tuple[str, ...] = ()
) -> Iterator[frozenset[str]]:
    """Yields what `itertools.combinations` does, without the sets that do not fit."""
    if len(chosen) == size:
        yield frozenset(chosen)
        return
    for position, label in enumerate(order):
        if fits((*chosen, label)):
            yield from _sets_in_order(order[position + 1 :], size, fits, (*chosen, label))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _read_conditions(path: Path, vocabulary: LabelVocabulary) -> list[list[str]]:
    if not path.is_file():
        nearest = difflib.get_close_matches(str(path), (*PROTOCOLS, MATCHED), n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise FileNotFoundError(
            f"A protocol must be one of {', '.join((*PROTOCOLS, MATCHED))} or a file in the form of test.json; there is"
            f" no file {path}.{hint}"
        )
    if path.stem == MATCHED:
        raise ValueError(
            f"{path} must have another name: {MATCHED!r} is the protocol of the held-out images; rename it."
        )
    conditions = read_label_lists(path, vocabulary)
    first: dict[frozenset[str], int] = {}
    for position, condition in enumerate(conditions):
        if not condition:
            raise ValueError(
                f"{path} must name at least one label in every condition, got none in number {position}; without one"
                " there is nothing to find in the image."
            )
        earlier = first.setdefault(frozenset(condition), position)
        if earlier != position:
            raise ValueError(
                f"{path} must ask for each label set once, got {', '.join(condition)} in numbers {earlier} and"
                f" {position}, which would be the same images twice; draw more images of each condition instead."
            )
    return conditions

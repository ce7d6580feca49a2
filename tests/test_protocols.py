import json
from collections import Counter
from itertools import combinations
from math import comb
from types import SimpleNamespace

import numpy as np
import pytest

from iclevr_diffusion import ICLEVR_LABELS, LabelVocabulary
from iclevr_diffusion.data import open_store
from iclevr_diffusion.labels import ASSETS
from iclevr_diffusion.protocols import PROTOCOLS, Protocol, combinations_protocol, matched_protocol, open_protocol
from iclevr_diffusion.rendering.sampling import ABSENT_TRIPLES

COLOURS = LabelVocabulary(["red", "green", "blue"])


def letters(number):
    return LabelVocabulary([f"label {index}" for index in range(number)])


def sets(protocol):
    return list(map(frozenset, protocol.conditions))


def write(folder, conditions, name="mine.json"):
    path = folder / name
    path.write_text(json.dumps(conditions))
    return path


@pytest.mark.parametrize(
    ("name", "sizes", "resampled"),
    [
        ("test", {1: 6, 2: 12, 3: 14}, "replicates"),
        ("new_test", {2: 12, 3: 20}, "replicates"),
        ("held-out", {2: 24, 3: 96}, "conditions"),
        ("all", {1: 24, 2: 276, 3: 2024}, "conditions"),
        ("crowded", {4: 100, 5: 100}, "conditions"),
        ("unseen", {3: 136}, "conditions"),
        ("composed", {4: 100, 5: 100}, "conditions"),
    ],
)
def test_each_protocol_has_its_number_of_sets_and_none_twice(name, sizes, resampled):
    every = open_protocol("all", ICLEVR_LABELS)
    seen = [labels for labels in every.conditions if frozenset(map(ICLEVR_LABELS.index, labels)) not in ABSENT_TRIPLES]
    protocol = open_protocol(name, ICLEVR_LABELS, training_conditions=seen)
    assert protocol.name == name and protocol.resampled == resampled
    assert Counter(map(len, protocol.conditions)) == sizes and len(protocol) == sum(sizes.values())
    assert len(set(sets(protocol))) == len(protocol)
    assert all(set(labels) <= set(ICLEVR_LABELS) for labels in protocol.conditions)
    assert name in PROTOCOLS


def test_the_standard_lists_keep_their_order():
    for name in ("test", "new_test"):
        conditions = json.loads((ASSETS / f"{name}.json").read_text())
        assert [list(labels) for labels in open_protocol(name, ICLEVR_LABELS).conditions] == conditions


def test_held_out_sets_are_balanced_and_mix_what_they_share():
    held_out = sets(open_protocol("held-out", ICLEVR_LABELS))
    pairs, triples = held_out[:24], held_out[24:]
    assert {label: sum(label in pair for pair in pairs) for label in ICLEVR_LABELS} == dict.fromkeys(ICLEVR_LABELS, 2)
    assert {label: sum(label in triple for triple in triples) for label in ICLEVR_LABELS} == dict.fromkeys(
        ICLEVR_LABELS, 12
    )
    shared = Counter()
    for pair in pairs:
        colours, shapes = (len(set(words)) for words in zip(*(label.split() for label in pair), strict=True))
        shared["colour" if colours == 1 else "shape" if shapes == 1 else "nothing"] += 1
    # Three pairs of one colour are all that the standard lists leave.
    assert shared == {"colour": 3, "shape": 9, "nothing": 12}


def test_a_held_out_triple_is_new_by_itself_and_not_by_a_held_out_pair():
    held_out = sets(open_protocol("held-out", ICLEVR_LABELS))
    assert not any(pair < triple for pair in held_out[:24] for triple in held_out[24:])


def test_every_held_out_triple_is_one_that_training_images_show():
    triples = {
        frozenset(map(ICLEVR_LABELS.index, labels)) for labels in sets(open_protocol("held-out", ICLEVR_LABELS))
    }
    assert not triples & ABSENT_TRIPLES


def test_the_standard_lists_ask_for_nothing_that_is_held_out():
    held_out = sets(open_protocol("held-out", ICLEVR_LABELS))
    for name in ("test", "new_test"):
        assert not [
            labels for labels in sets(open_protocol(name, ICLEVR_LABELS)) for left in held_out if left <= labels
        ]


def test_without_the_held_out_sets_every_label_and_every_other_pair_is_still_trained_on(iclevr_root):
    held_out = sets(open_protocol("held-out", ICLEVR_LABELS))
    shown = [frozenset(labels) for labels in json.loads((iclevr_root / "train.json").read_text()).values()]
    parts = {labels: {frozenset(part) for k in (2, 3) for part in combinations(labels, k)} for labels in set(shown)}
    kept = [labels for labels in shown if parts[labels].isdisjoint(held_out)]
    assert set(held_out) <= set(shown)
    assert len(shown) - len(kept) == 2219
    labels = Counter(label for image in kept for label in image)
    pairs = Counter(frozenset(pair) for image in kept for pair in combinations(sorted(image), 2))
    assert len(labels) == 24 and min(labels.values()) > 1000
    assert len(pairs) == 276 - 24 and min(pairs.values()) > 30


def test_all_sets_of_three_labels_are_the_seven_that_one_counts_by_hand():
    assert open_protocol("all", COLOURS).conditions == (
        ("red",),
        ("green",),
        ("blue",),
        ("red", "green"),
        ("red", "blue"),
        ("green", "blue"),
        ("red", "green", "blue"),
    )


def test_unseen_sets_are_compared_without_regard_to_order():
    seen = [["red"], ["blue"], ("blue", "red"), [], ["blue", "green", "red"]]
    unseen = open_protocol("unseen", COLOURS, training_conditions=seen)
    assert unseen.conditions == (("green",), ("red", "green"), ("green", "blue"))


def test_unseen_needs_the_training_conditions_and_something_that_they_lack():
    with pytest.raises(
        ValueError, match=r"needs `training_conditions`.*export_pipeline\(\.\.\., training=run_folder\)"
    ):
        open_protocol("unseen", COLOURS)
    seen = open_protocol("all", COLOURS).conditions
    with pytest.raises(ValueError, match="`unseen` is empty: the training images show all 7 sets"):
        open_protocol("unseen", COLOURS, training_conditions=seen)
    with pytest.raises(ValueError, match="`training_conditions` must hold labels .* Unknown label 'gren'"):
        open_protocol("unseen", COLOURS, training_conditions=[["gren"]])


def test_too_many_labels_for_all_sets_are_refused_with_the_number():
    assert len(open_protocol("all", letters(84))) == 84 + comb(84, 2) + comb(84, 3) == 98_854
    for name in ("all", "unseen"):
        with pytest.raises(
            ValueError, match="85 labels form 102,425 sets of one to three; take `seen`, or give a file"
        ):
            open_protocol(name, letters(85), training_conditions=[])


@pytest.mark.parametrize("vocabulary", [ICLEVR_LABELS, letters(9), letters(80)], ids=len)
def test_crowded_sets_ask_for_each_label_about_equally_often(vocabulary):
    crowded = open_protocol("crowded", vocabulary).conditions
    assert Counter(map(len, crowded)) == {4: 100, 5: 100} and len(set(map(frozenset, crowded))) == 200
    for size in (4, 5):
        counts = Counter(label for labels in crowded if len(labels) == size for label in labels)
        assert sorted(counts) == sorted(vocabulary) and max(counts.values()) - min(counts.values()) <= 2


def test_composed_sets_ask_for_each_label_by_itself_from_the_same_seeds():
    composed, crowded = open_protocol("composed", ICLEVR_LABELS), open_protocol("crowded", ICLEVR_LABELS)
    assert composed.conditions == crowded.conditions and composed.sha256 != crowded.sha256
    assert composed.seeded_as == "crowded" and crowded.seeded_as is None
    for position, labels in enumerate(composed.conditions):
        assert composed.request(position) == " AND ".join(labels) and crowded.request(position) == list(labels)


@pytest.mark.parametrize("vocabulary", [ICLEVR_LABELS, letters(9)], ids=len)
def test_negated_sets_lack_a_label_and_every_label_about_equally_often(vocabulary):
    negated, plain = (open_protocol(name, vocabulary) for name in ("negated", "unnegated"))
    sizes = Counter(map(len, negated.conditions))
    assert sizes == {1: 4 * len(vocabulary), 2: min(100, comb(len(vocabulary), 2))}
    assert len(set(negated.prompts)) == len(negated) == sum(sizes.values()) and negated.resampled == "conditions"
    for position, (labels, (left_out,)) in enumerate(zip(negated.conditions, negated.negated, strict=True)):
        assert left_out not in labels and negated.request(position) == f"{', '.join(labels)} AND NOT {left_out}"
    counts = Counter(left_out for (left_out,) in negated.negated)
    assert sorted(counts) == sorted(vocabulary) and max(counts.values()) - min(counts.values()) <= 2
    assert (plain.conditions, plain.negated) == (negated.conditions, negated.negated)
    assert plain.request(0) == list(plain.conditions[0]) and plain.seeded_as == "negated"
    assert plain.sha256 != negated.sha256


def test_negated_sets_are_the_same_everywhere_and_for_every_order_of_the_labels():
    negated = open_protocol("negated", ICLEVR_LABELS)
    assert negated.sha256 == "81478d5f708f355feebdc5663362aae5d03799850109c3dead264ae3f45e437c"
    turned = open_protocol("negated", LabelVocabulary(ICLEVR_LABELS.names[::-1]))
    assert set(zip(sets(turned), turned.negated, strict=True)) == set(zip(sets(negated), negated.negated, strict=True))


def test_a_negated_label_shares_its_colour_or_its_shape_with_one_asked_for():
    protocol = open_protocol("negated", ICLEVR_LABELS)
    for labels, (left_out,) in zip(protocol.conditions, protocol.negated, strict=True):
        assert set(left_out.split()) & set(" ".join(labels).split())


def test_negation_needs_a_label_for_each_of_two_and_one_to_be_left_out():
    assert "red, green AND NOT blue" in open_protocol("negated", COLOURS).prompts
    with pytest.raises(ValueError, match="`negated` needs at least 3 labels, .* got 2"):
        open_protocol("negated", LabelVocabulary(["red", "green"]))


def test_a_file_of_labels_is_not_taken_for_a_composition(tmp_path):
    path = write(tmp_path, open_protocol("composed", ICLEVR_LABELS).conditions, "composed.json")
    with pytest.raises(ValueError, match="composed.json must hold .* give the file another name"):
        open_protocol(path, ICLEVR_LABELS)


def test_few_labels_form_fewer_crowded_sets():
    assert Counter(map(len, open_protocol("crowded", letters(6)).conditions)) == {4: 15, 5: 6}
    with pytest.raises(ValueError, match="needs at least 5 labels for sets of four and five, got 3"):
        open_protocol("crowded", COLOURS)


def test_crowded_sets_are_the_same_everywhere_and_for_every_order_of_the_labels():
    crowded = open_protocol("crowded", ICLEVR_LABELS)
    assert crowded.sha256 == "d0b5b67caeb27531660e56825840a7472586e5390523b8d7e2fd2a3cf3f63db7"
    turned = open_protocol("crowded", LabelVocabulary(ICLEVR_LABELS.names[::-1]))
    assert sets(turned) == sets(crowded)


@pytest.mark.parametrize("name", ["test", "new_test", "held-out"])
def test_lists_of_iclevr_are_refused_for_other_labels(name):
    with pytest.raises(
        ValueError, match=f"`{name}` asks for i-CLEVR's labels, but the vocabulary of 3 labels lacks blue"
    ):
        open_protocol(name, COLOURS)
    turned = LabelVocabulary(ICLEVR_LABELS.names[::-1])
    assert open_protocol(name, turned) == open_protocol(name, ICLEVR_LABELS)


def test_a_file_gives_name_order_and_labels_as_the_vocabulary_writes_them(tmp_path):
    protocol = open_protocol(write(tmp_path, [["blue", "red"], [1]]), COLOURS)
    assert protocol == Protocol("mine", (("blue", "red"), ("green",)), "replicates")
    assert open_protocol(str(tmp_path / "mine.json"), COLOURS) == protocol


@pytest.mark.parametrize(("number", "resampled"), [(99, "replicates"), (100, "conditions")])
def test_a_file_of_a_hundred_conditions_stands_for_more_of_their_kind(tmp_path, number, resampled):
    vocabulary = letters(number)
    assert open_protocol(write(tmp_path, [[name] for name in vocabulary]), vocabulary).resampled == resampled


def test_every_list_of_few_conditions_stands_for_itself():
    conditions = [["red"], ["red", "green"]]
    for name in ("seen", "unseen", "all"):
        protocol = open_protocol(name, COLOURS, training_conditions=conditions)
        assert len(protocol) < 100 and protocol.resampled == "replicates"


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ([["red"], []], "mine.json must name at least one label in every condition, got none in number 1"),
        (
            [["red", "blue"], ["red"], ["blue", "red"]],
            "mine.json must ask for each label set once, got blue, red in numbers 0 and 2",
        ),
        ([["gren"]], r"mine.json: `class_labels\[0\]`: Unknown label 'gren'; did you mean 'green'"),
        ({"red": 0}, "mine.json must hold a list of label lists"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, conditions, message):
    with pytest.raises(ValueError, match=message):
        open_protocol(write(tmp_path, conditions), COLOURS)


def test_a_file_does_not_take_the_name_of_the_held_out_images(tmp_path):
    with pytest.raises(ValueError, match="matched.json must have another name: 'matched' is the protocol of"):
        open_protocol(write(tmp_path, [["red"]], "matched.json"), COLOURS)


def test_a_file_named_after_a_protocol_must_hold_its_conditions(tmp_path):
    for name, other in (("test", "new_test"), ("new_test", "test"), ("all", "test")):
        path = write(tmp_path, open_protocol(other, ICLEVR_LABELS).conditions, f"{name}.json")
        with pytest.raises(
            ValueError, match=f"{name}.json must hold the conditions of the protocol '{name}' in their"
        ):
            open_protocol(path, ICLEVR_LABELS)
    with pytest.raises(ValueError, match="test.json must hold .* give the file another name"):  # it has no such labels
        open_protocol(write(tmp_path, [["red"]], "test.json"), COLOURS)
    with pytest.raises(ValueError, match="unseen.json must hold .* give the file another name"):  # nobody knows
        open_protocol(write(tmp_path, [["red"]], "unseen.json"), COLOURS)


@pytest.mark.parametrize("name", ["test", "crowded"])
def test_a_file_with_the_conditions_of_its_namesake_is_that_protocol(name, tmp_path):
    protocol = open_protocol(name, ICLEVR_LABELS)
    assert open_protocol(write(tmp_path, protocol.conditions, f"{name}.json"), ICLEVR_LABELS) == protocol
    path = write(tmp_path, protocol.conditions[::-1], f"{name}.json")
    with pytest.raises(ValueError, match="in their order"):
        open_protocol(path, ICLEVR_LABELS)


def test_a_name_that_is_none_is_answered_with_the_names():
    with pytest.raises(
        FileNotFoundError,
        match="one of test, new_test, held-out, seen, all, unseen, crowded, composed, negated, unnegated, matched or a file",
    ):
        open_protocol("heldout", COLOURS)


def test_the_hash_is_that_of_the_conditions_in_their_order():
    conditions = (("red",), ("green", "blue"))
    first = Protocol("a", conditions, "replicates")
    # sha256 of the text [["red"], ["green", "blue"]]
    assert first.sha256 == "a457a123ba2daf0ea5204b856518b1b181da242b3f5437a4fb8e14ba6b47beee"
    assert Protocol("b", conditions, "conditions").sha256 == first.sha256
    assert Protocol("a", conditions[::-1], "replicates").sha256 != first.sha256


def test_matched_conditions_are_those_of_the_held_out_images_as_often_as_there():
    store = SimpleNamespace(
        vocabulary=COLOURS,
        class_labels=np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 1, 1]], dtype=np.uint8),
        indices=lambda split: np.array({"held-out": [1, 2, 3]}[split]),
    )
    assert matched_protocol(store) == Protocol("matched", (("green", "blue"),) * 2, "conditions")


def test_matched_conditions_of_a_folder_are_those_of_its_held_out_scenes(tiny_dataset, tmp_path):
    store = open_store(tiny_dataset, resolution=16, cache_dir=tmp_path, progress=False)
    labels = json.loads((tiny_dataset / "train.json").read_text())
    scene = [labels[f"CLEVR_train_000000_{k}.png"] for k in range(3)]  # the only one of four that is held out
    assert sets(matched_protocol(store)) == list(map(frozenset, scene))


def test_a_data_set_without_held_out_images_has_no_matched_conditions():
    store = SimpleNamespace(
        vocabulary=COLOURS,
        class_labels=np.array([[1, 0, 0], [0, 0, 0]], dtype=np.uint8),
        indices=lambda split: np.array({"held-out": [1]}[split]),
    )
    with pytest.raises(
        ValueError, match="`store` must have held-out images with labels, and none of its images is one"
    ):
        matched_protocol(store)


# Two digits side by side: any of the first place stands beside any of the second, none beside another of its own.
PLACES = LabelVocabulary([f"{place} {digit}" for place in ("tens", "units") for digit in range(10)])
PAIRS = [(f"tens {tens}", f"units {units}") for tens in range(10) for units in range(10)]


def test_seen_sets_are_those_of_the_training_images_each_once_and_without_the_empty_one():
    conditions = [(), ("blue", "green"), ("red",), ("green", "blue")]
    seen = open_protocol("seen", COLOURS, training_conditions=conditions)
    assert seen == Protocol("seen", (("red",), ("green", "blue")), "replicates")
    assert open_protocol("seen", PLACES, training_conditions=PAIRS).resampled == "conditions"
    for given, message in ((None, "`seen` needs `training_conditions`"), ([()], "no training image has a label")):
        with pytest.raises(ValueError, match=message):
            open_protocol("seen", COLOURS, training_conditions=given)


def test_of_very_many_seen_sets_a_thousand_stand_for_all():
    many = list(combinations(letters(60), 2))
    seen, turned = (open_protocol("seen", letters(60), training_conditions=sets) for sets in (many, many[::-1]))
    assert len(seen) == 1000 and seen == turned and set(seen.conditions) <= set(many)


def test_labels_that_exclude_each_other_are_not_crowded_together():
    with pytest.raises(ValueError, match="there are no such four: these labels exclude each other. Take `seen`"):
        open_protocol("crowded", PLACES, training_conditions=PAIRS)
    # 0 stands beside 1 to 4, any two of which stand together; 5 stands beside 0 alone.
    names = letters(6).names
    pairs = [*combinations(names[:5], 2), (names[0], names[5])]
    crowded = open_protocol("composed", letters(6), training_conditions=pairs)
    assert Counter(map(len, crowded.conditions)) == {4: 5, 5: 1}
    assert all(names[5] not in labels for labels in crowded.conditions)


def test_i_clevr_s_crowded_sets_do_not_depend_on_what_was_trained_on():
    conditions = [("red cube", "blue cube")]
    given = open_protocol("crowded", ICLEVR_LABELS, training_conditions=conditions)
    assert given == open_protocol("crowded", ICLEVR_LABELS)


def test_negations_are_of_sets_that_training_images_show():
    for name in ("negated", "unnegated"):
        protocol = open_protocol(name, PLACES, training_conditions=PAIRS[::2])
        assert 0 < len(protocol) <= 50 and set(protocol.conditions) <= set(PAIRS[::2])
        assert all(
            not set(labels) & set(others) for labels, others in zip(protocol.conditions, protocol.negated, strict=True)
        )
    with pytest.raises(ValueError, match="`negated` asks for one and two labels as training images show them"):
        open_protocol("negated", COLOURS, training_conditions=[("red", "green", "blue")])


def make_store(rows):
    return SimpleNamespace(vocabulary=PLACES, class_labels=PLACES.encode(rows).numpy().astype(np.uint8))


def test_a_tenth_of_the_combinations_is_held_out_and_every_label_keeps_half_of_its_images():
    store = make_store(PAIRS * 3)
    held_out = combinations_protocol(store)
    assert held_out.name == "combinations" and len(held_out) == 10
    assert held_out.resampled == "replicates"  # they are too few to stand for others
    counts = Counter(label for labels in held_out.conditions for label in labels)
    assert set(counts) == set(PLACES) and set(counts.values()) == {1}
    assert combinations_protocol(make_store(PAIRS[::-1])) == held_out


def test_a_label_with_one_combination_is_not_held_out_with_it():
    alone = PAIRS[22:100:11]  # tens 2 with units 2 alone, and so on
    (held_out,) = combinations_protocol(make_store([*alone, PAIRS[0], PAIRS[1], PAIRS[10], PAIRS[11]])).conditions
    assert held_out in (PAIRS[0], PAIRS[1], PAIRS[10], PAIRS[11])
    for rows in ([PAIRS[0]], [PAIRS[0][:1], PAIRS[0][1:]]):
        with pytest.raises(ValueError, match="no set of two labels or more to hold out"):
            combinations_protocol(make_store(rows))

import json

import numpy as np
import pytest
import torch

from iclevr_diffusion import ICLEVR_LABELS, LabelVocabulary, read_label_lists

COLOURS = LabelVocabulary(["red", "green", "blue"])


def test_iclevr_has_eight_colours_of_three_shapes_in_the_order_of_its_file():
    assert len(ICLEVR_LABELS) == 24
    assert ICLEVR_LABELS.names[:2] == ("gray cube", "red cube")
    assert ICLEVR_LABELS.index("yellow cylinder") == 23
    assert {name.split()[1] for name in ICLEVR_LABELS} == {"cube", "sphere", "cylinder"}


@pytest.mark.parametrize(
    "class_labels",
    [
        [["red", "blue"], ["green"]],
        [[0, 2], [1]],
        (("blue", 0), ("green",)),
        [[np.int64(0), 2], [1]],
        torch.tensor([[1, 0, 1], [0, 1, 0]]),
        torch.tensor([[True, False, True], [False, True, False]]),
        np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]),
        np.array([[1, 0, 1], [0, 1, 0]], dtype=np.uint8),
    ],
)
def test_every_spelling_gives_the_same_matrix(class_labels):
    encoded = COLOURS.encode(class_labels)
    assert encoded.dtype == torch.float32
    assert encoded.tolist() == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    assert COLOURS.decode(encoded) == [["red", "blue"], ["green"]]


def test_a_one_dimensional_integer_array_is_one_label_an_image():
    assert COLOURS.decode(COLOURS.encode(torch.tensor([2, 0]))) == [["blue"], ["red"]]
    assert COLOURS.decode(COLOURS.encode(np.array([2, 0], dtype=np.int32))) == [["blue"], ["red"]]


def test_an_empty_inner_list_is_an_empty_scene():
    assert COLOURS.encode([[], ["red"]]).tolist() == [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert COLOURS.decode(torch.zeros(1, 3)) == [[]]


def test_weights_above_zero_are_kept():
    assert COLOURS.encode(torch.tensor([[0.5, 0.0, 2.0]])).tolist() == [[0.5, 0.0, 2.0]]


@pytest.mark.parametrize(
    ("class_labels", "message"),
    [
        ("red", r"write \[\['red'\]\]"),
        ("red, blue", r"write \[\['red', 'blue'\]\]"),
        (["red", "blue"], r"write \[\['red', 'blue'\]\], for an image each \[\['red'\], \['blue'\]\]"),
        ([0, 2], r"write \[\[0, 2\]\]"),
        ([["red"], "blue"], r"'blue' outside"),
        ([], r"\[\[\]\] asks for one empty scene"),
        (None, "NoneType"),
        ({"red"}, "got set"),
        ([["rde"]], r"`class_labels\[0\]`: Unknown label 'rde'; did you mean 'red'"),
        (
            [["red and blue"]],
            r"Unknown label .red and blue.; .*Commas join the labels of one image; AND and NOT, in capitals",
        ),
        ([["red"], ["RED"]], r"`class_labels\[1\]`: Unknown label 'RED'; did you mean 'red'"),
        ([["violet"]], "known: red, green, blue"),
        ([["red", "red"]], "once"),
        ([["red", 0]], "once"),
        ([[0, 1, 0]], "must be a tensor or an array"),
        ([[3]], "between 0 and 2, got 3"),
        ([[-1]], "between 0 and 2, got -1"),
        ([[True]], "got True of type bool"),
        ([[0.0]], "got 0.0 of type float"),
        ([[None]], "NoneType"),
        (torch.zeros(2, 4), r"shape \(batch, 3\).*got \(2, 4\)"),
        (torch.zeros(0, 3), r"got \(0, 3\)"),
        (torch.zeros(2), r"got \(2,\) of torch.float32"),
        (torch.zeros(2, dtype=torch.bool), r"got \(2,\) of torch.bool"),
        (torch.zeros(1, 3, 1), r"\(1, 3, 1\)"),
        (torch.tensor([0, 3]), "between 0 and 2"),
        (torch.tensor([-1]), "between 0 and 2"),
        (torch.tensor([[0.0, float("nan"), 1.0]]), "got nan"),
        (torch.tensor([[0.0, float("inf"), 1.0]]), "got inf"),
        (np.array([[0.0, -1.0, 1.0]]), "got -1.0"),
        (torch.zeros(1, 3, dtype=torch.complex64), "real numbers"),
        (np.array([["red", "green", "blue"]]), "give names as lists"),
    ],
)
def test_anything_else_is_refused_with_the_right_spelling(class_labels, message):
    with pytest.raises(ValueError, match=message):
        COLOURS.encode(class_labels)


@pytest.mark.parametrize("names", [[], ["red", "red"], "red", ["red", ""], ["red", 1], [" red"]])
def test_names_must_be_distinct_non_empty_strings(names):
    with pytest.raises(ValueError, match="`names`"):
        LabelVocabulary(names)


def test_vocabularies_are_equal_where_their_names_are():
    assert LabelVocabulary(["red", "green", "blue"]) == COLOURS
    assert LabelVocabulary(["green", "red", "blue"]) != COLOURS
    assert list(COLOURS) == ["red", "green", "blue"]


def test_a_vocabulary_is_read_in_the_order_of_its_indices(tmp_path):
    path = tmp_path / "objects.json"
    path.write_text(json.dumps({"blue": 2, "red": 0, "green": 1}))
    assert LabelVocabulary.from_json(path) == COLOURS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["red"]', "must map"),
        ('{"red": "0"}', "must map"),
        ('{"red": true}', "must map"),
        ('{"red": 0, "blue": 2}', "without a gap"),
        ('{"red": 0, "blue": 0}', "without a gap"),
        ('{"red": 0', "UTF-8: .*line 1"),
        ('{"red": 0, "blue": 1, "red": 2}', r"\['red'\] more than once"),
        ("{}", "at least one"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused(text, message, tmp_path):
    path = tmp_path / "objects.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        LabelVocabulary.from_json(path)


def test_the_packaged_lists_ask_for_72_and_84_labels():
    for name, num_labels in [("test", 72), ("new_test", 84)]:
        label_lists = read_label_lists(name)
        assert len(label_lists) == 32
        assert ICLEVR_LABELS.encode(label_lists).sum() == num_labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[["red"], ["gren"]]', r"lists.json: `class_labels\[1\]`: Unknown label 'gren'; did you mean 'green'"),
        ('["red"]', "outside"),
        ("[]", "list of label lists"),
        ('{"red": 0}', "list of label lists"),
        ("[[", "UTF-8: .*line 1"),
    ],
)
def test_a_file_of_lists_that_does_not_fit_is_refused_by_name(text, message, tmp_path):
    path = tmp_path / "lists.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_label_lists(path, COLOURS)


def test_a_missing_file_of_lists_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="new_test"):
        read_label_lists(tmp_path / "absent.json")


def test_a_file_that_is_not_text_is_refused_by_name(tmp_path):
    path = tmp_path / "objects.json"
    path.write_bytes(b'{"\xff": 0}')
    with pytest.raises(ValueError, match="objects.json must be JSON in UTF-8"):
        LabelVocabulary.from_json(path)
    with pytest.raises(ValueError, match="objects.json must be JSON in UTF-8"):
        read_label_lists(path, COLOURS)

import re

import numpy as np
import pytest
import torch

from iclevr_diffusion.score_tables import format_results
from iclevr_diffusion.scores import (
    INTERVAL,
    ceiling,
    exact_match,
    found_labels,
    is_quick,
    negation_ceiling,
    score_conditions,
    score_images,
    score_mean,
    score_negation,
    top_k_hits,
)

COUNTED_LOGITS = torch.tensor(
    [
        [3.0, 1.0, 2.0, -1.0],  # asked for 0: the highest
        [3.0, 1.0, 2.0, -1.0],  # asked for 0 and 1: only 0 is among the two highest
        [3.0, 1.0, 2.0, -1.0],  # asked for 1 and 3: neither is
        [3.0, 1.0, 2.0, -1.0],  # asked for 0, 1 and 2: all are
    ]
)
COUNTED_LABELS = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 0]])
METRICS = ("top_k", "exact_match", "precision", "recall", "count_accuracy", "mean_average_precision")


def score_counted(rows=slice(None), num_replicates=1, **arguments):
    arguments = {"label_names": "abcd", "resampled": "replicates"} | arguments
    logits = COUNTED_LOGITS[rows, None].expand(-1, num_replicates, -1)
    return score_conditions(logits, COUNTED_LABELS[rows], **arguments)


def values(scores):
    return {name: score["value"] for name, score in scores.items() if name != "num_images"}


def draw_list(num_conditions, num_replicates, num_classes=4, seed=0):
    """Logits and labels of a list whose judge is right most of the time, one to three labels a condition."""
    generator = torch.Generator().manual_seed(seed)
    class_labels = torch.zeros(num_conditions, num_classes)
    for row, labels in enumerate(class_labels):
        labels[torch.randperm(num_classes, generator=generator)[: 1 + row % 3]] = 1
    noise = torch.randn(num_conditions, num_replicates, num_classes, generator=generator)
    return 2 * class_labels[:, None] - 1 + noise, class_labels


def logits_of_marks(found):
    """Logits of two classes (num_conditions, num_replicates, 2): the judge sees the first where `found`."""
    found = torch.as_tensor(found, dtype=torch.float32)
    return torch.stack([2 * found - 1, 1 - 2 * found], dim=-1)


def score_marks(found, **arguments):
    class_labels = torch.tensor([[1.0, 0.0]]).expand(len(found), 2)
    arguments = {"label_names": "ab", "resampled": "replicates"} | arguments
    return score_conditions(logits_of_marks(found), class_labels, **arguments)


# Hits and matches


def test_hits_are_the_labels_asked_for_among_the_k_highest_outputs():
    assert top_k_hits(COUNTED_LOGITS, COUNTED_LABELS).tolist() == [1, 1, 0, 3]
    assert found_labels(COUNTED_LOGITS, COUNTED_LABELS)[1].tolist() == [True, False, False, False]


def test_hits_are_the_same_for_logits_and_for_probabilities():
    logits = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    class_labels = (torch.rand(50, 24, generator=torch.Generator().manual_seed(1)) < 0.1).float()
    assert top_k_hits(logits, class_labels).equal(top_k_hits(logits.sigmoid(), class_labels))


def test_an_image_asked_for_nothing_has_no_hit():
    assert top_k_hits(COUNTED_LOGITS, torch.zeros(4, 4)).tolist() == [0, 0, 0, 0]


def test_any_positive_entry_asks_for_its_label_once():
    assert top_k_hits(COUNTED_LOGITS, COUNTED_LABELS * 2.5).tolist() == [1, 1, 0, 3]


def test_an_exact_match_has_no_object_missing_and_none_too_many():
    class_labels = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert exact_match(COUNTED_LOGITS, class_labels).tolist() == [True, False, False, False]
    assert exact_match(COUNTED_LOGITS, COUNTED_LABELS, threshold=2.5).tolist() == [True, False, False, False]


@pytest.mark.parametrize("metric", [top_k_hits, exact_match, score_images])
def test_shapes_that_differ_and_outputs_that_are_not_finite_are_refused(metric):
    with pytest.raises(ValueError, match=r"got \(4, 4\) and \(4, 3\)"):
        metric(COUNTED_LOGITS, COUNTED_LABELS[:, :3])
    with pytest.raises(ValueError, match="must be finite"):
        metric(COUNTED_LOGITS.clone().fill_(torch.nan), COUNTED_LABELS)


# Scores of a list


def test_the_scores_of_four_images_are_those_counted_by_hand():
    # The judge sees a, b and c in each image: 12 objects, of which 7 were asked for, and 8 labels were asked for. All
    # images get the same outputs, so that the average precision of a label is the share of the images asked for it.
    scores = score_counted()
    assert values(scores["all"]) == pytest.approx(
        {
            "top_k": 5 / 8,
            "exact_match": 1 / 4,
            "precision": 7 / 12,
            "recall": 7 / 8,
            "count_accuracy": 1 / 4,
            "mean_average_precision": (3 + 3 + 1 + 1) / 4 / 4,
        }
    )
    assert scores["all"]["num_images"] == 4


def test_average_precision_ranks_the_images_by_one_label_with_ties_let_in_together():
    logits = torch.tensor([4.0, 3.0, 3.0, 2.0, 1.0])[:, None, None].expand(-1, 1, 2)
    class_labels = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1], [1, 0]])
    by_label = score_conditions(logits, class_labels, label_names="ab", resampled="replicates")["by_label"]
    # a: 1 of 1 image at 4, 2 of 3 at 3, 3 of 5 at 1. b: 1 of 3 images at 3, 2 of 4 at 2.
    assert by_label["a"]["average_precision"]["value"] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert by_label["b"]["average_precision"]["value"] == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_the_example_of_the_guide_to_these_scores_is_right():
    # The three images of benchmarks/README.md: the first is right, in the second an object is too many, in the third
    # one is missing.
    logits = torch.tensor([[5.0, -5.0, -6.0], [5.0, 4.0, 3.0], [-4.0, -0.5, 2.0]])
    scores = score_images(logits, torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 1]]))
    assert [scores[name] for name in METRICS] == pytest.approx([1, 1 / 3, 4 / 5, 4 / 5, 1 / 3, (1 + 1 + 1 / 2) / 3])


def test_the_score_is_pooled_over_labels_and_not_averaged_over_images():
    scores = score_counted(slice(3))["all"]
    assert scores["top_k"]["value"] == pytest.approx((1 + 1 + 0) / (1 + 2 + 2))  # the mean over images would be .5
    assert scores["exact_match"]["value"] == 0


def test_scores_are_split_by_number_of_objects_and_by_label():
    scores = score_counted(num_replicates=3)
    by_num_objects, by_label = scores["by_num_objects"], scores["by_label"]
    assert {k: (part["num_images"], part["top_k"]["value"]) for k, part in by_num_objects.items()} == {
        "1": (3, 1.0),
        "2": (6, 1 / 4),
        "3": (3, 1.0),
    }
    assert by_num_objects["1"]["precision"]["value"] == pytest.approx(1 / 3)
    assert {name: part["num_images"] for name, part in by_label.items()} == {"a": 9, "b": 9, "c": 3, "d": 3}
    assert values(by_label["b"]) == pytest.approx(
        {"top_k": 1 / 3, "precision": 3 / 4, "recall": 1.0, "average_precision": 3 / 4}
    )
    # d is never seen: no precision is defined, and nothing of what was asked for is found.
    assert values(by_label["d"]) == {"top_k": 0.0, "precision": None, "recall": 0.0, "average_precision": 0.25}


def test_a_label_that_is_not_asked_for_has_no_score():
    scores = score_counted(slice(2))
    assert list(scores["by_label"]) == ["a", "b"]
    assert scores["by_label"]["a"]["average_precision"]["value"] is None  # no image without it
    assert scores["all"]["mean_average_precision"]["value"] == scores["by_label"]["b"]["average_precision"]["value"]


def test_conditions_of_the_training_are_told_from_new_ones():
    scores = score_counted(seen=torch.tensor([True, False, True, False]))["by_seen"]
    assert {name: part["top_k"]["value"] for name, part in scores.items()} == {"seen": 1 / 3, "unseen": 4 / 5}
    assert list(score_counted(seen=torch.ones(4, dtype=torch.bool))["by_seen"]) == ["seen"]
    assert "by_seen" not in score_counted()


def test_the_spread_of_single_seeds_is_that_of_whole_lists():
    scores = score_marks([[1, 0, 1], [1, 0, 0]])
    assert scores["one_seed_top_k"] == {"min": 0.0, "median": 0.5, "max": 1.0}
    assert scores["all"]["top_k"]["value"] == pytest.approx(0.5)


def test_a_higher_threshold_sees_less_but_ranks_the_same():
    scores, strict = score_counted()["all"], score_counted(threshold=2.5)["all"]
    assert values(strict) == pytest.approx(
        values(scores) | {"exact_match": 1 / 4, "precision": 3 / 4, "recall": 3 / 8, "count_accuracy": 1 / 4}
    )
    nothing_seen = score_counted(threshold=9.0)["all"]
    assert nothing_seen["precision"] == {"value": None, "low": None, "high": None}
    assert nothing_seen["recall"]["value"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_names": "abc"}, "`label_names` must name each of the 4 classes of `logits`, got 3"),
        ({"resampled": "images"}, "`resampled` must be 'replicates' or 'conditions', got 'images'"),
        (
            {"seen": torch.ones(3, dtype=torch.bool)},
            r"`seen` must be bool of shape \(4,\).* got torch.bool of .*\(3,\)",
        ),
        ({"seen": torch.ones(4)}, r"`seen` must be bool of shape \(4,\).* got torch.float32"),
    ],
)
def test_arguments_that_do_not_fit_the_list_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        score_counted(**arguments)


@pytest.mark.parametrize("size", [(4, 4), (3, 1, 4), (4, 1, 3), (4, 0, 4)])
def test_outputs_that_are_no_list_of_conditions_are_refused(size):
    logits = torch.zeros(size)
    message = re.escape(f"got {size} and (4, 4)")
    with pytest.raises(ValueError, match=message):
        score_conditions(logits, COUNTED_LABELS, label_names="abcd", resampled="replicates")
    with pytest.raises(ValueError, match=message):
        score_mean([(logits, COUNTED_LABELS)])


def test_outputs_of_a_list_that_are_not_finite_are_refused():
    logits = COUNTED_LOGITS[:, None].clone()
    logits[2, 0, 1] = torch.inf
    with pytest.raises(ValueError, match="`logits` must be finite"):
        score_conditions(logits, COUNTED_LABELS, label_names="abcd", resampled="replicates")


# The same scores from other libraries


@pytest.mark.parametrize("decimals", [6, 0], ids=["no ties", "many ties"])
def test_scores_equal_those_of_scikit_learn(decimals):
    metrics = pytest.importorskip("sklearn.metrics")
    logits, class_labels = draw_list(40, 3)
    logits = logits.round(decimals=decimals)
    scores = score_conditions(logits, class_labels, label_names="abcd", resampled="conditions")
    asked, outputs = class_labels.repeat_interleave(3, dim=0).numpy(), logits.flatten(0, 1).numpy()
    seen = outputs > 0
    of_labels = metrics.average_precision_score(asked, outputs, average=None)
    assert [scores["by_label"][name]["average_precision"]["value"] for name in "abcd"] == pytest.approx(of_labels)
    for name, function in {"precision": metrics.precision_score, "recall": metrics.recall_score}.items():
        assert scores["all"][name]["value"] == pytest.approx(function(asked, seen, average="micro"))
        of_labels = function(asked, seen, average=None)
        assert [scores["by_label"][label][name]["value"] for label in "abcd"] == pytest.approx(of_labels)
    assert scores["all"]["exact_match"]["value"] == pytest.approx(metrics.accuracy_score(asked, seen))


@pytest.mark.parametrize("decimals", [3, 0], ids=["few ties", "many ties"])
def test_scores_equal_those_of_torchmetrics(decimals):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    logits, class_labels = draw_list(40, 3)
    outputs, asked = logits.round(decimals=decimals).flatten(0, 1), class_labels.repeat_interleave(3, dim=0).long()
    scores = score_images(outputs, asked)
    expected = {
        "mean_average_precision": functional.multilabel_average_precision(outputs, asked, 4),
        "precision": functional.multilabel_precision(outputs, asked, 4, average="micro"),
        "recall": functional.multilabel_recall(outputs, asked, 4, average="micro"),
        "exact_match": functional.multilabel_exact_match(outputs, asked, 4),
    }
    assert {name: scores[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()})


# Means of lists, real images, ceilings


def test_the_mean_of_lists_weighs_lists_alike_however_long_they_are():
    labels = torch.tensor([[1.0, 0.0]])
    parts = [(logits_of_marks([[1], [1], [1]]), labels.expand(3, 2)), (logits_of_marks([[0]]), labels)]
    scores = score_mean(parts)
    assert scores["top_k"] == {"value": 0.5, "low": None, "high": None}
    assert scores["exact_match"]["value"] == 0.5 and set(scores) == set(METRICS)
    with pytest.raises(ValueError, match="`parts` must hold at least one list"):
        score_mean([])


def test_the_interval_of_a_mean_is_narrower_than_those_of_its_lists():
    first, second = draw_list(30, 10, seed=0), draw_list(30, 10, seed=1)
    mean = score_mean([first, second])
    alone = [score_conditions(*part, label_names="abcd", resampled="replicates")["all"] for part in (first, second)]
    for name in METRICS:
        width, *widths = (score[name]["high"] - score[name]["low"] for score in (mean, *alone))
        assert mean[name]["value"] == pytest.approx(sum(score[name]["value"] for score in alone) / 2)
        assert width == pytest.approx(np.hypot(*widths) / 2, rel=0.15)  # the lists' errors are independent


def test_the_mean_with_a_list_too_short_for_an_interval_has_none():
    assert score_mean([draw_list(30, 10), draw_list(30, 9)])["top_k"]["low"] is None


def test_images_of_known_labels_are_scored_in_all_and_by_number_of_objects():
    scores = score_images(COUNTED_LOGITS, COUNTED_LABELS)
    assert {name: scores[name] for name in METRICS} == pytest.approx(values(score_counted()["all"]))
    assert scores["num_images"] == 4
    assert scores["by_num_objects"]["2"] == {
        "num_images": 2,
        "top_k": 0.25,
        "exact_match": 0.0,
        "precision": 0.5,
        "recall": 0.75,
        "count_accuracy": 0.0,
        "mean_average_precision": 0.5,  # a and d in one of two images each; b is in both, c in none
        "negation": 0.25,  # a, b and c are seen: of c and d one is rightly not there, and of b and d not all are
    }


def test_images_of_nothing_have_no_hits_to_count_but_an_exact_match():
    scores = score_images(COUNTED_LOGITS - torch.tensor([[9.0], [0], [9], [9]]), torch.zeros(4, 4))
    assert scores["by_num_objects"]["0"] == {
        "num_images": 4,
        "top_k": None,
        "exact_match": 0.75,
        "precision": 0.0,
        "recall": None,
        "count_accuracy": 0.75,
        "mean_average_precision": None,
        "negation": (1 + 0.25 + 1 + 1) / 4,
    }


def test_negation_counts_what_is_there_and_what_is_not():
    absent = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    logits = COUNTED_LOGITS[:, None].expand(-1, 10, -1)
    scores = score_negation(logits, COUNTED_LABELS, absent, resampled="conditions")
    # a, b and c are seen: the first shows b besides; the third lacks d
    assert {name: score["value"] for name, score in scores.items() if name != "num_images"} == {
        "present": 0.75,
        "absent": 0.75,
        "both": 0.5,
    }
    assert scores["num_images"] == 40
    assert 0 <= scores["both"]["low"] < 0.5 < scores["both"]["high"] <= 1
    fixed = score_negation(logits, COUNTED_LABELS, absent, resampled="replicates")
    assert fixed["both"] == {"value": 0.5, "low": 0.5, "high": 0.5}  # all replicates are alike
    quick = score_negation(logits[:, :1], COUNTED_LABELS, absent, resampled="replicates")
    assert quick["both"] == {"value": 0.5, "low": None, "high": None}
    strict = score_negation(logits, COUNTED_LABELS, absent, threshold=1.5, resampled="replicates")
    assert (strict["present"]["value"], strict["absent"]["value"]) == (0.25, 1.0)  # a and c are seen
    with pytest.raises(ValueError, match="`resampled` must be 'replicates' or 'conditions', got 'seeds'"):
        score_negation(logits[:, :1], COUNTED_LABELS, absent, resampled="seeds")


def test_the_interval_of_a_negation_is_that_of_the_binomial_distribution():
    logits = torch.tensor([1.0, -1.0] * 200)[None, :, None]
    both = score_negation(logits, torch.ones(1, 1), torch.zeros(1, 1), resampled="replicates")["both"]
    assert [both["low"], both["high"]] == pytest.approx([0.5 - 1.96 / 40, 0.5 + 1.96 / 40], abs=0.004)


def test_the_ceiling_of_negation_weighs_conditions_alike():
    held_out = score_images(COUNTED_LOGITS, COUNTED_LABELS)  # one object: of b, c and d one is not seen
    assert negation_ceiling(held_out, np.array([1, 2, 2])) == pytest.approx((1 / 3 + 0.25 + 0.25) / 3)
    assert negation_ceiling(held_out, np.array([1, 4])) is None


def test_the_ceiling_is_the_judges_own_score_for_the_same_numbers_of_objects():
    held_out = {
        "by_num_objects": {
            "1": {"top_k": 1.0, "exact_match": 0.9},
            "2": {"top_k": 0.9, "exact_match": 0.8},
            "3": {"top_k": 0.6, "exact_match": 0.5},
        }
    }
    found = ceiling(held_out, np.array([1, 2, 2, 3]))
    assert found["top_k"] == pytest.approx((1 * 1.0 + 4 * 0.9 + 3 * 0.6) / 8)
    assert found["exact_match"] == pytest.approx((0.9 + 0.8 + 0.8 + 0.5) / 4)
    assert score_counted(ceiling=found)["ceiling"] == found and "ceiling" not in score_counted()
    assert ceiling(held_out, np.array([1, 4])) is None


def test_conditions_that_ask_for_nothing_weigh_nothing_in_the_ceiling_of_top_k():
    of_nothing = {"top_k": None, "exact_match": 0.5}
    held_out = {"by_num_objects": {"0": of_nothing, "2": {"top_k": 0.9, "exact_match": 0.8}}}
    assert ceiling(held_out, np.array([0, 2])) == pytest.approx({"top_k": 0.9, "exact_match": 0.65})
    assert ceiling(held_out, np.array([0])) == of_nothing


# Intervals


@pytest.mark.parametrize(
    ("num_conditions", "num_replicates", "quick"), [(99, 9, True), (99, 10, False), (100, 1, False), (1, 10, False)]
)
def test_a_list_is_quick_with_few_replicates_and_few_conditions(num_conditions, num_replicates, quick):
    assert is_quick(num_conditions, num_replicates) == quick


def all_estimates(scores):
    if "value" in scores:
        return [scores]
    return [found for part in scores.values() if isinstance(part, dict) for found in all_estimates(part)]


def test_a_quick_list_has_values_and_no_interval():
    logits, class_labels = draw_list(30, 9)
    estimates = all_estimates(score_conditions(logits, class_labels, label_names="abcd", resampled="replicates"))
    assert len(estimates) == 4 * 6 + 4 * 4  # in all and by number of objects, and by label
    assert all(estimate["value"] is not None for estimate in estimates)
    assert all(estimate["low"] is None and estimate["high"] is None for estimate in estimates)


def test_a_single_unit_to_draw_again_gives_a_value_and_no_interval():
    logits, class_labels = draw_list(100, 1)
    scores = score_conditions(logits, class_labels, label_names="abcd", resampled="replicates")["all"]
    assert scores["top_k"]["value"] is not None and scores["top_k"]["low"] is None
    assert score_marks([[0, 1] * 5], resampled="conditions")["all"]["top_k"] == {
        "value": 0.5,
        "low": None,
        "high": None,
    }


def test_the_interval_of_one_condition_is_that_of_the_binomial_distribution():
    estimate = score_marks([[0, 1] * 50])["all"]["top_k"]
    assert estimate["value"] == 0.5
    assert estimate["low"] == pytest.approx(0.40, abs=0.015)  # Binomial(100, .5) has the quantiles 40 and 60
    assert estimate["high"] == pytest.approx(0.60, abs=0.015)


def test_the_interval_is_not_too_narrow_where_there_are_two_replicates():
    # The mean of two replicates, one found and one not, has the estimated variance 1/4, that of 400 such means 1/1600.
    estimate = score_marks([[0, 1]] * 400)["all"]["top_k"]
    assert [estimate["low"], estimate["high"]] == pytest.approx([0.5 - 1.96 / 40, 0.5 + 1.96 / 40], abs=0.004)


def brute_force_intervals(logits, class_labels, resampled):
    """Draws images again one by one and scores them as if they were all there is."""
    random = np.random.default_rng(1)
    num_conditions, num_replicates, _ = logits.shape
    drawn = {name: [] for name in METRICS}
    for _ in range(300):
        if resampled == "conditions":
            rows = random.integers(num_conditions, size=num_conditions - 1)
            images, labels = logits[rows], class_labels[rows]
        else:
            columns = torch.from_numpy(random.integers(num_replicates, size=(num_conditions, num_replicates - 1)))
            images, labels = logits.gather(1, columns[:, :, None].expand(-1, -1, logits.shape[2])), class_labels
        scores = score_images(images.flatten(0, 1), labels.repeat_interleave(images.shape[1], dim=0))
        for name in METRICS:
            drawn[name].append(scores[name])
    of_all = score_images(logits.flatten(0, 1), class_labels.repeat_interleave(num_replicates, dim=0))
    moves = {"mean_average_precision": of_all["mean_average_precision"] - np.mean(drawn["mean_average_precision"])}
    return {name: np.quantile(found, [0.025, 0.975]) + moves.get(name, 0) for name, found in drawn.items()}


@pytest.mark.parametrize("resampled", ["replicates", "conditions"])
def test_intervals_are_those_of_drawing_images_again_one_by_one(resampled):
    logits, class_labels = draw_list(12, 10)
    logits = logits.round(decimals=1)  # with ties
    scores = score_conditions(logits, class_labels, label_names="abcd", resampled=resampled)["all"]
    for name, (low, high) in brute_force_intervals(logits, class_labels, resampled).items():
        found, tolerance = scores[name], 0.2 * (high - low)
        assert [found["low"], found["high"]] == pytest.approx([low, high], abs=tolerance), name


def test_the_interval_of_a_part_is_that_of_the_part_alone_if_conditions_are_fixed():
    logits, class_labels = draw_list(12, 30)
    rows = torch.arange(12) % 3 == 1  # the conditions of two labels
    part = score_conditions(logits, class_labels, label_names="abcd", resampled="replicates")["by_num_objects"]["2"]
    alone = score_conditions(logits[rows], class_labels[rows], label_names="abcd", resampled="replicates")["all"]
    for name in METRICS:
        width = alone[name]["high"] - alone[name]["low"]
        assert part[name]["value"] == alone[name]["value"]
        assert [part[name][end] for end in ("low", "high")] == pytest.approx(
            [alone[name][end] for end in ("low", "high")], abs=0.15 * width
        )


def test_conditions_that_differ_widen_the_interval_only_if_they_are_drawn_again():
    found = [[1] * 10] * 9 + [[0] * 10] * 9
    assert score_marks(found)["all"]["top_k"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    estimate = score_marks(found, resampled="conditions")["all"]["top_k"]
    assert estimate["high"] - estimate["low"] == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(17), rel=0.1)


def test_a_score_that_many_resamples_leave_undefined_has_no_interval():
    # The judge sees a in one condition of 20, which a third of the resamples lack; in 8 of 20 next to none lack them.
    rare, common = (
        score_marks([[1] * 10] * count + [[0] * 10] * (20 - count), resampled="conditions") for count in (1, 8)
    )
    assert rare["by_label"]["a"]["precision"] == {"value": 1.0, "low": None, "high": None}
    assert common["by_label"]["a"]["precision"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_intervals_contain_the_truth_about_as_often_as_they_say():
    random, truth, num_contained = np.random.default_rng(0), 0.8, 0
    for _ in range(60):
        estimate = score_marks(random.random((20, 10)) < truth)["all"]["top_k"]
        num_contained += estimate["low"] <= truth <= estimate["high"]
    assert num_contained >= 52  # of 60; 57 are expected


def test_an_interval_of_average_precision_lies_about_its_score_where_the_ranking_is_by_chance():
    _, class_labels = draw_list(24, 1, num_classes=24)
    logits = torch.randn(24, 10, 24, generator=torch.Generator().manual_seed(1))
    estimate = score_mean([(logits, class_labels)])["mean_average_precision"]
    middle = (estimate["low"] + estimate["high"]) / 2
    assert abs(middle - estimate["value"]) < 0.1 * (estimate["high"] - estimate["low"])  # of the resamples: a third


@pytest.mark.slow
@pytest.mark.parametrize("resampled", ["replicates", "conditions"])
@pytest.mark.parametrize("signal", [0.0, 3.0])
def test_intervals_of_average_precision_contain_the_truth_about_as_often_as_they_say(signal, resampled, monkeypatch):
    monkeypatch.setitem(INTERVAL, "num_resamples", 100)
    random = np.random.default_rng(0)

    def draw():
        seed = int(random.integers(2**31)) if resampled == "conditions" else 0  # other sets of the kind, or the same
        labels = draw_list(60, 1, num_classes=24, seed=seed)[1]
        return signal * labels[:, None] + torch.from_numpy(random.normal(size=(60, 10, 24))).float(), labels

    def score(logits, labels):
        return score_conditions(logits, labels, label_names=list(map(str, range(24))), resampled=resampled)["all"]

    drawn = [draw() for _ in range(200)]
    truth = np.mean(
        [
            score_images(logits.flatten(0, 1), labels.repeat_interleave(10, dim=0))["mean_average_precision"]
            for logits, labels in drawn
        ]
    )
    estimates = [score(*part)["mean_average_precision"] for part in drawn[:40]]
    assert all(estimate["low"] <= estimate["value"] <= estimate["high"] for estimate in estimates)
    assert sum(estimate["low"] <= truth <= estimate["high"] for estimate in estimates) >= 35  # 38 are expected


def test_intervals_of_average_precision_end_at_one():
    # The judge ranks nearly every image right: resamples are at most 1, and moved up they would be above it.
    logits, class_labels = draw_list(30, 10)
    by_label = score_conditions(
        2 * class_labels[:, None] + logits, class_labels, label_names="abcd", resampled="replicates"
    )
    estimates = [
        by_label["all"]["mean_average_precision"],
        *(part["average_precision"] for part in by_label["by_label"].values()),
    ]
    assert all(estimate["value"] <= estimate["high"] <= 1 for estimate in estimates)


def test_intervals_are_the_same_each_time():
    assert score_counted(num_replicates=10) == score_counted(num_replicates=10)
    assert INTERVAL["seed"] == 0


# The printed table


def make_results(num_replicates=10, **entries):
    held_out = score_images(COUNTED_LOGITS, COUNTED_LABELS)
    scores = score_counted(
        num_replicates=num_replicates,
        seen=torch.tensor([True, False, True, False]),
        ceiling=ceiling(held_out, np.array([1, 2, 2, 3])),
    )
    protocol = {"quick": is_quick(4, num_replicates), "judges": {"judge": scores}}
    mean = {name: scores["all"][name] for name in METRICS}
    return {
        "settings": {"judges": {"judge": {}}},
        "judges_used_in_training": [],
        "protocols": {"test": protocol, "new_test": protocol},
        "mean_of_test_and_new_test": {"judge": mean | {"ceiling": scores["ceiling"]}},
        "held_out_images": {"judges": {"judge": held_out}},
        "distribution": {"missing": "the protocol 'matched' was not drawn"},
        "cost": {
            "images_per_second": 12.345,
            "seconds_for_one_image": 0.5,
            "batch_size": 64,
            "device": "cpu",
            "dtype": "float32",
            "num_threads": 2,
            "num_parameters": 1_234_567,
            "network_calls_per_image": 40,
        },
    } | entries


def test_the_printed_table_has_a_row_for_every_list_and_part_with_its_ceiling():
    lines = format_results(make_results()).splitlines()
    rows = [" ".join(line.split()) for line in lines]
    assert "test all 0.625 0.625-0.625 0.250 0.583 0.875 0.250 0.500 0.625 0.250" in rows
    assert "2 0.250 0.250-0.250 0.000 0.500 0.750 0.000 0.500 0.250 0.000" in rows
    assert "unseen 0.800 0.800-0.800 0.500 0.833 1.000 0.500 0.500 - -" in rows
    assert any(line.startswith("mean test, new_test ") for line in lines)
    assert any(line.startswith("held-out real images ") and line.endswith(" -") for line in lines)
    assert any(
        "12.35 images/s in batches of 64, 0.5 s for one image (cpu, float32, 2 CPU threads)" in s for s in lines
    )
    assert max(map(len, lines)) <= 120


def test_the_printed_table_says_which_scores_are_not_to_be_trusted():
    table = format_results(make_results(num_replicates=1, judges_used_in_training=["judge"]))
    for words in (
        "Judge judge: taught the pipeline, not independent",
        "test *",
        "* This judge also taught",
        "not for the leaderboard: test, new_test.",
    ):
        assert words in table
    table = format_results(make_results())
    assert "*" not in table and "Quick" not in table


def test_the_printed_table_sets_negation_and_picked_images_apart():
    results = make_results()
    logits, absent = COUNTED_LOGITS[:, None].expand(-1, 10, -1), torch.tensor([[0.0, 1, 0, 0]] * 4)
    negation = score_negation(logits, COUNTED_LABELS, absent, resampled="replicates") | {"ceiling": 0.9}
    entry = results["protocols"]["test"]["judges"]["judge"]
    entry |= {"negation": negation, "best_of": {"num_candidates": 5, "all": entry["all"]}}
    results["settings"]["best_of"] = {"num_candidates": 5, "num_draws": 8}
    lines = format_results(results).splitlines()
    rows = [" ".join(line.split()) for line in lines]
    assert "test best 5 + 0.625 0.625-0.625 0.250 0.583 0.875 0.250 0.500 - -" in rows
    assert (
        "test: all asked for seen 0.750, nothing negated seen 0.000, both 0.000 (0.000-0.000); real images 0.900"
        in rows
    )
    assert any(line.startswith("+ Of each 5 images the one that the model itself finds") for line in lines)
    assert max(map(len, lines)) <= 120
    assert "+" not in format_results(make_results())


def test_the_printed_table_says_why_something_is_missing():
    table = format_results(make_results(held_out_images={"missing": "none were given"}))
    assert "No score of the judges on real images: none were given." in table
    assert "No comparison with real images: the protocol 'matched' was not drawn." in table


def test_the_printed_table_of_a_pipeline_without_labels_compares_its_images_alone():
    measures = {
        "frechet_distance": 12.3456,
        "kernel_distance": 0.012345,
        "precision": 0.9,
        "recall": 0.8,
        "density": 1.1,
        "coverage": 0.7,
    }
    distribution = {
        "num_generated": 20,
        "num_real": 30,
        "judges": {"judge": {"generated": measures, "real": measures | {"frechet_distance": 1.5}}},
        "diversity": {"pixels": {"value": 0.95}, "judges": {"judge": {"value": None}}},
        "inception": {"generated": {"fid": 23.456, "kid": 0.0123}, "real": {"fid": 7.5, "kid": -0.001}},
        "memorisation": {"copies": 0.125, "held_out": {"copies": 0.0}, "trained_on_these": False},
    }
    results = make_results(protocols={}, distribution=distribution)
    del results["mean_of_test_and_new_test"]
    lines = format_results(results).splitlines()
    rows = [" ".join(line.split()) for line in lines]
    assert lines[0].startswith("20 drawn against 30 held-out real images")
    assert "judge 12.35 0.0123 0.900 0.800 1.100 0.700 -" in rows
    assert "judge (real) 1.5 0.0123 0.900 0.800 1.100 0.700 -" in rows
    assert "pixels 0.950" in rows
    assert "Inception 23.46 0.0123 (the standard FID and KID)" in rows
    assert "Inception (real) 7.5 -0.001 (the standard FID and KID)" in rows
    assert any("12.50% of the drawn, 0.00% of the held-out real images; but it was not" in line for line in lines)
    assert max(map(len, lines)) <= 120

"""Scores of generated images against the labels asked for, with intervals: pure functions of a judge's outputs.

A judge sees an object where its output is above a threshold. The scores of a set of images are

- `top_k`: of all labels asked for, the share among the judge's k highest outputs for an image of k labels: the
  course's score, pooled over labels, blind to objects that nobody asked for;
- `exact_match`: the share of images in which the judge sees just the objects asked for;
- `precision`: of all objects seen, the share asked for; `recall`: of all labels asked for, the share seen;
- `count_accuracy`: the share of images in which as many objects are seen as were asked for;
- `mean_average_precision`: the mean over labels of the average precision at which the judge's output for a label
  ranks the images that were asked for it before the others; it needs no threshold.

A score that nothing defines, such as a precision where nothing is seen, is None.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import BoolTensor, LongTensor, Tensor

INTERVAL = {
    "level": 0.95,
    "method": (
        "percentile bootstrap; each resample draws, with replacement and one fewer than there are, replicates within"
        " each condition, or conditions with all their replicates: what a protocol's `resampled` says; for average"
        " precision, whose resamples are too high, moved so that their mean is the score, and cut to [0, 1]"
    ),
    "num_resamples": 2000,
    "num_resamples_of_average_precision": 500,  # the first of these
    "seed": 0,
}
RANKING_METRICS = ("mean_average_precision", "average_precision")  # whose resamples are moved
# Share of the resamples in which a score may be undefined before its interval is, too. Of a part of k conditions of a long
# list, e^-k of the resamples hold none: fewer than seven give intervals that cover less than they say.
MAX_UNDEFINED = 0.001

# A list of fewer of both says too little of how far a score would move on another draw.
MIN_REPLICATES, MIN_CONDITIONS = 10, 100


def is_quick(num_conditions: int, num_replicates: int) -> bool:
    """Says whether a list is drawn too few times for an interval: its scores are for a quick look only."""
    return num_replicates < MIN_REPLICATES and num_conditions < MIN_CONDITIONS


def top_k_hits(logits: Tensor, class_labels: Tensor) -> LongTensor:
    """Counts for each image how many of the judge's k highest outputs are among the k labels asked for.

    The course's score of a list of images is the sum of these hits divided by the sum of the labels asked for.

    Args:
        logits: A judge's outputs (B, num_classes); any monotone function of them counts the same.
        class_labels: Labels asked for (B, num_classes); an entry above 0 asks for that object.

    Returns:
        Hits (B,), each between 0 and the image's number of labels.
    """
    return found_labels(logits, class_labels).sum(dim=1)


def found_labels(logits: Tensor, class_labels: Tensor) -> BoolTensor:
    """Marks the labels asked for that are among the judge's k highest outputs, k the number of labels asked for.

    Args:
        logits: A judge's outputs (B, num_classes).
        class_labels: Labels asked for (B, num_classes); an entry above 0 asks for that object.

    Returns:
        Marks (B, num_classes), false for every label that was not asked for.
    """
    asked = _matching(logits, class_labels) > 0
    ranks = logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return asked & (ranks < asked.sum(dim=1, keepdim=True))


def exact_match(logits: Tensor, class_labels: Tensor, threshold: float = 0.0) -> BoolTensor:
    """Says for each image whether the judge sees exactly the objects asked for: none missing, none too many.

    Args:
        logits: A judge's outputs (B, num_classes) before the sigmoid.
        class_labels: Labels asked for (B, num_classes); an entry above 0 asks for that object.
        threshold: A logit above it means that the judge sees the object; 0 is a probability of one half.

    Returns:
        Matches (B,).
    """
    return ((logits > threshold) == (_matching(logits, class_labels) > 0)).all(dim=1)


def _matching(logits: Tensor, class_labels: Tensor) -> Tensor:
    if logits.ndim != 2 or logits.shape != class_labels.shape:
        raise ValueError(
            "`logits` and `class_labels` must both have shape (batch, num_classes), got"
            f" {tuple(logits.shape)} and {tuple(class_labels.shape)}."
        )
    if not torch.isfinite(logits).all():
        raise ValueError("`logits` must be finite, got NaN or infinity; were the images finite?")
    return class_labels.to(logits.device)


class _Reading(NamedTuple):
    """What a judge reads in images: arrays (N, num_classes), of floats and three times of bool."""

    logits: np.ndarray
    asked: np.ndarray
    found: np.ndarray  # as `found_labels` says
    seen: np.ndarray

    def of(self, rows: np.ndarray) -> "_Reading":
        return _Reading(*(part[rows] for part in self))


def _read(logits: Tensor, class_labels: Tensor, threshold: float) -> _Reading:
    found = found_labels(logits, class_labels)
    parts = (logits.float(), class_labels > 0, found, logits > threshold)
    return _Reading(*(part.cpu().numpy() for part in parts))


def _read_list(logits: Tensor, class_labels: Tensor, threshold: float) -> _Reading:
    """Reads the images (num_conditions, num_replicates, num_classes) of a list, condition by condition."""
    if (
        logits.ndim != 3
        or class_labels.shape != (logits.shape[0], logits.shape[2])
        or 0 in (logits.shape[0], logits.shape[1])
    ):
        raise ValueError(
            "`logits` must have shape (num_conditions, num_replicates, num_classes), at least one of each, and"
            f" `class_labels` (num_conditions, num_classes), got {tuple(logits.shape)} and"
            f" {tuple(class_labels.shape)}."
        )
    return _read(logits.flatten(0, 1), class_labels.repeat_interleave(logits.shape[1], dim=0), threshold)


def _check_resampled(resampled: str) -> None:
    if resampled not in ("replicates", "conditions"):
        raise ValueError(f"`resampled` must be 'replicates' or 'conditions', got {resampled!r}.")


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divides, with NaN for what is undefined: both are 0 there."""
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def _measure(reading: _Reading, weights: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Computes all scores of images under many weightings at once.

    Args:
        reading: What the judge reads in the N images.
        weights: How often images count, in whole numbers (N / n, num_weightings), each row for n images in succession.

    Returns:
        The scores of all images (num_weightings,) and of each label (num_classes, num_weightings). Those that rank
        images have the first `INTERVAL["num_resamples_of_average_precision"]` weightings only.
    """
    _, asked, found, seen = reading
    is_exact, is_counted = (asked == seen).all(axis=1), asked.sum(axis=1) == seen.sum(axis=1)
    marks = np.column_stack([asked, found, seen, asked & seen, is_exact, is_counted, np.ones_like(is_exact)])
    counts = marks.reshape(len(weights), -1, marks.shape[1]).sum(axis=1).T.astype(weights.dtype) @ weights
    counts = counts.astype(np.float64)  # as float32 they are whole numbers without error, but their ratios are not
    num_asked, num_hits, num_seen, num_right = counts[:-3].reshape(4, -1, weights.shape[1])
    num_exact, num_counted, num_images = counts[-3:]
    average_precision = _average_precision(
        reading.logits, asked, weights[:, : INTERVAL["num_resamples_of_average_precision"]]
    )
    is_defined = ~np.isnan(average_precision)
    in_all = {
        "top_k": _ratio(num_hits.sum(axis=0), num_asked.sum(axis=0)),
        "exact_match": _ratio(num_exact, num_images),
        "precision": _ratio(num_right.sum(axis=0), num_seen.sum(axis=0)),
        "recall": _ratio(num_right.sum(axis=0), num_asked.sum(axis=0)),
        "count_accuracy": _ratio(num_counted, num_images),
        "mean_average_precision": _ratio(np.nansum(average_precision, axis=0), is_defined.sum(axis=0)),
    }
    by_label = {
        "top_k": _ratio(num_hits, num_asked),
        "precision": _ratio(num_right, num_seen),
        "recall": _ratio(num_right, num_asked),
        "average_precision": average_precision,
    }
    return in_all, by_label


def _average_precision(logits: np.ndarray, asked: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Computes the average precision of each label under many weightings.

    It is the sum over thresholds of precision times the recall gained, without interpolation, and images of equal
    output pass a threshold together, as in scikit-learn's `average_precision_score`.

    Args:
        logits: A judge's outputs (N, num_classes).
        asked: Whether an image was asked for a label (N, num_classes).
        weights: How often images count, in whole numbers (N / n, num_weightings), each row for n images in succession.

    Returns:
        Average precision (num_classes, num_weightings), NaN where no image or every image was asked for the label.
    """
    images_per_weight = len(logits) // len(weights)
    num_images = weights.sum(axis=0) * images_per_weight
    average_precision = np.full((logits.shape[1], weights.shape[1]), np.nan)
    for k in range(logits.shape[1]):
        if not asked[:, k].any():
            continue
        order = np.argsort(-logits[:, k], kind="stable")
        is_positive = asked[order, k]
        # Only thresholds that let positive images in gain recall: the ranks between two of them are summed as one run.
        ends = np.append(np.flatnonzero(np.diff(logits[order, k])), len(order) - 1)
        ends = ends[np.diff(is_positive.cumsum()[ends], prepend=0) > 0]
        starts = np.append(0, ends[:-1] + 1)
        positives = np.flatnonzero(is_positive)
        rows = order // images_per_weight
        gained = np.add.reduceat(weights[rows[positives]], np.searchsorted(positives, starts), axis=0)
        right = gained.cumsum(axis=0, dtype=np.float64)
        passed = np.add.reduceat(weights[rows[: ends[-1] + 1]], starts, axis=0).cumsum(axis=0)
        # Where no image has passed, none is gained either, and weights are whole numbers: 1 stands for any divisor.
        sums = (gained * right / np.maximum(passed, 1)).sum(axis=0)
        is_defined = (right[-1] > 0) & (right[-1] < num_images)
        np.divide(sums, right[-1], out=average_precision[k], where=is_defined)
    return average_precision


def _resample(
    num_conditions: int, num_replicates: int, resampled: str, random: np.random.Generator
) -> np.ndarray | None:
    """Draws how often the images of a list count in each resample.

    One unit fewer is drawn than there are, since with as many the scores of n units vary less than they should by a
    factor of (n - 1) / n (*Resampling Inference With Complex Survey Data*, Rao and Wu, 1988), half for two replicates.

    Returns:
        Whole numbers as float32 (num_conditions, num_replicates, num_resamples), the second axis of length 1 where all
        replicates of a condition count alike; None for a single unit.
    """
    num_units = num_replicates if resampled == "replicates" else num_conditions
    if num_units < 2:
        return None
    num_resamples, shares = INTERVAL["num_resamples"], np.full(num_units, 1 / num_units)
    if resampled == "conditions":
        return random.multinomial(num_units - 1, shares, num_resamples).T[:, None].astype(np.float32)
    weights = np.empty((num_conditions, num_replicates, num_resamples), dtype=np.float32)
    for counts in weights:
        counts[:] = random.multinomial(num_units - 1, shares, num_resamples).T
    return weights


def _estimate(name: str, value: float, resampled: np.ndarray | None) -> dict[str, float | None]:
    """Puts a score and its interval together; resamples (num_resamples,) in which it is undefined are left out.

    An image that is drawn twice ranks beside itself, which raises the average precision of every resample: an interval
    of such scores would lie above the score. Moved by the difference of the means, the bootstrap's estimate of this
    bias, it keeps its width and its share of truths.
    """
    estimate = {"value": None if np.isnan(value) else float(value), "low": None, "high": None}
    if resampled is None or estimate["value"] is None:
        return estimate
    defined = resampled[~np.isnan(resampled)]
    if len(defined) >= (1 - MAX_UNDEFINED) * len(resampled):
        tail = (1 - INTERVAL["level"]) / 2
        ends = np.quantile(defined.astype(np.float64), [tail, 1 - tail])
        if name in RANKING_METRICS:
            ends = np.clip(ends + (value - defined.mean()), 0.0, 1.0)
        estimate |= {"low": float(ends[0]), "high": float(ends[1])}
    return estimate


def _values(reading: _Reading) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Computes the scores of images that count alike: of all, and of each label (num_classes,)."""
    in_all, by_label = _measure(reading, np.ones((len(reading.asked), 1)))
    return {name: of[0] for name, of in in_all.items()}, {name: of[:, 0] for name, of in by_label.items()}


def score_conditions(
    logits: Tensor,
    class_labels: Tensor,
    *,
    label_names: Sequence[str],
    threshold: float = 0.0,
    resampled: Literal["replicates", "conditions"],
    seen: BoolTensor | None = None,
    ceiling: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
    """Scores the images drawn for a list of conditions: in all, by number of objects, by label, by seen or unseen.

    The 95 % intervals are percentile bootstraps (*An Introduction to the Bootstrap*, Efron and Tibshirani, 1993). With
    `"replicates"` those of each condition are drawn again: the conditions are the task's own, and the interval says
    how far other noise would have moved the score. With `"conditions"` they are drawn again with all their replicates:
    the interval also says how far other conditions of their kind would have. Where all units that are drawn again
    agree, an interval has no width, which few units do not prove. Those of average precision are corrected for the
    bias of resampling, see `INTERVAL`.

    Args:
        logits: A judge's outputs (num_conditions, num_replicates, num_classes) before the sigmoid.
        class_labels: Labels asked for (num_conditions, num_classes); an entry above 0 asks for that object.
        label_names: Name of each class.
        threshold: A logit above it means that the judge sees the object.
        resampled: What the intervals draw again.
        seen: Whether the generator was trained on a condition (num_conditions,), where that is known.
        ceiling: What the judge itself scores on real images with as many objects, from `ceiling`, where known.

    Returns:
        Scores in all, with `num_images`, by number of objects, by label asked for, by seen or unseen if known; the
        smallest, median and largest top-k of one replicate of all conditions; the ceiling. Each score is a mapping of
        `value`, `low` and `high`; the last two are None for a list that `is_quick`, for a single unit to draw again,
        and for a score that is undefined in more than one in a thousand resamples.
    """
    reading = _read_list(logits, class_labels, threshold)
    num_conditions, num_replicates, num_classes = logits.shape
    if len(label_names) != num_classes:
        raise ValueError(
            f"`label_names` must name each of the {num_classes} classes of `logits`, got {len(label_names)}."
        )
    _check_resampled(resampled)
    if seen is not None and (seen.shape != (num_conditions,) or seen.dtype != torch.bool):
        raise ValueError(
            f"`seen` must be bool of shape ({num_conditions},), one entry a condition, got {seen.dtype} of shape"
            f" {tuple(seen.shape)}."
        )
    weights = None
    if not is_quick(num_conditions, num_replicates):
        weights = _resample(num_conditions, num_replicates, resampled, np.random.default_rng(INTERVAL["seed"]))

    def score(part: _Reading, part_weights: np.ndarray | None) -> tuple[dict[str, Any], dict[str, Any]]:
        values, values_by_label = _values(part)
        draws, draws_by_label = (
            ({}, {}) if part_weights is None else _measure(part, part_weights.reshape(-1, part_weights.shape[-1]))
        )
        in_all = {"num_images": len(part.asked)}
        in_all |= {name: _estimate(name, value, draws.get(name)) for name, value in values.items()}
        by_label = {}
        for k in np.flatnonzero(part.asked.any(axis=0)).tolist():
            by_label[label_names[k]] = {"num_images": int(part.asked[:, k].sum())} | {
                name: _estimate(name, of[k], draws_by_label[name][k] if draws_by_label else None)
                for name, of in values_by_label.items()
            }
        return in_all, by_label

    def score_part(conditions: np.ndarray) -> dict[str, Any]:
        part = reading.of(conditions.repeat(num_replicates))
        return score(part, None if weights is None else weights[conditions])[0]

    in_all, by_label = score(reading, weights)
    num_objects = reading.asked[::num_replicates].sum(axis=1)
    hits, asked = (
        marks.reshape(num_conditions, num_replicates, -1).sum(axis=(0, 2)) for marks in (reading.found, reading.asked)
    )
    one_seed = _ratio(hits, asked)
    scores = {
        "all": in_all,
        "by_num_objects": {str(k): score_part(num_objects == k) for k in np.unique(num_objects).tolist()},
        "by_label": by_label,
    }
    if seen is not None:
        parts = {"seen": seen.cpu().numpy(), "unseen": ~seen.cpu().numpy()}
        scores["by_seen"] = {name: score_part(conditions) for name, conditions in parts.items() if conditions.any()}
    scores["one_seed_top_k"] = {
        name: _estimate("top_k", pick(one_seed), None)["value"]
        for name, pick in {"min": np.min, "median": np.median, "max": np.max}.items()
    }
    if ceiling is not None:
        scores["ceiling"] = dict(ceiling)
    return scores


def score_mean(parts: Sequence[tuple[Tensor, Tensor]], *, threshold: float = 0.0) -> dict[str, Any]:
    """Scores the mean over lists, each of the same weight however many labels it asks for.

    Args:
        parts: For each list a judge's outputs (num_conditions, num_replicates, num_classes) and the labels asked for
            (num_conditions, num_classes).
        threshold: A logit above it means that the judge sees the object.

    Returns:
        Mean scores with intervals as from `score_conditions`, whose replicates are drawn again in each list; no
        interval if one of the lists has none.
    """
    if not parts:
        raise ValueError("`parts` must hold at least one list, got none.")
    random = np.random.default_rng(INTERVAL["seed"])
    values, draws = [], []
    for logits, class_labels in parts:
        reading = _read_list(logits, class_labels, threshold)
        values.append(_values(reading)[0])
        size = logits.shape[:2]
        weights = None if is_quick(*size) else _resample(*size, "replicates", random)
        draws.append(None if weights is None else _measure(reading, weights.reshape(len(reading.asked), -1))[0])
    has_interval = None not in draws
    return {
        name: _estimate(
            name,
            np.mean([value[name] for value in values]),
            np.mean([draw[name] for draw in draws], axis=0) if has_interval else None,
        )
        for name in values[0]
    }


def score_difference(
    logits: Tensor,
    other_logits: Tensor,
    class_labels: Tensor,
    *,
    threshold: float = 0.0,
    resampled: Literal["replicates", "conditions"],
) -> dict[str, dict[str, float | None]]:
    """Scores how much better one system draws a list of conditions than another from the same seeds.

    Both are resampled alike, so that what makes a condition hard, or a seed lucky, for both drops out of the interval.

    Args:
        logits: A judge's outputs for the one system (num_conditions, num_replicates, num_classes) before the sigmoid.
        other_logits: Those for the other, condition by condition and seed by seed.
        class_labels: Labels asked for (num_conditions, num_classes); an entry above 0 asks for that object.
        threshold: A logit above it means that the judge sees the object.
        resampled: What the intervals draw again, see `score_conditions`.

    Returns:
        For each score that ranks no images a mapping of `value`, the first system's less the second's, `low` and
        `high`; the last two are None where those of `score_conditions` are.
    """
    if logits.shape != other_logits.shape:
        raise ValueError(
            f"`other_logits` must have the shape of `logits`, got {tuple(other_logits.shape)} and {tuple(logits.shape)}."
        )
    _check_resampled(resampled)
    readings = [_read_list(part, class_labels, threshold) for part in (logits, other_logits)]
    values = [_values(reading)[0] for reading in readings]
    weights = None
    if not is_quick(*logits.shape[:2]):
        weights = _resample(*logits.shape[:2], resampled, np.random.default_rng(INTERVAL["seed"]))
    draws = [
        {} if weights is None else _measure(reading, weights.reshape(-1, weights.shape[-1]))[0] for reading in readings
    ]
    return {
        name: _estimate(name, value - values[1][name], draws[0][name] - draws[1][name] if draws[0] else None)
        for name, value in values[0].items()
        if name not in RANKING_METRICS
    }


def score_negation(
    logits: Tensor,
    class_labels: Tensor,
    negated_labels: Tensor,
    *,
    threshold: float = 0.0,
    resampled: Literal["replicates", "conditions"],
) -> dict[str, Any]:
    """Scores images that were to show some labels and not to show others.

    Args:
        logits: A judge's outputs (num_conditions, num_replicates, num_classes) before the sigmoid.
        class_labels: Labels asked for (num_conditions, num_classes); an entry above 0 asks for that object.
        negated_labels: Labels that must not be there (num_conditions, num_classes).
        threshold: A logit above it means that the judge sees the object.
        resampled: What the intervals draw again, see `score_conditions`.

    Returns:
        `num_images`, and the shares of images in which all labels asked for are seen (`present`), none of the negated
        ones is (`absent`), and both, each with `value`, `low` and `high` as from `score_conditions`.
    """
    _check_resampled(resampled)
    _, asked, _, seen = _read_list(logits, class_labels, threshold)
    negated = _read_list(logits, negated_labels, threshold).asked
    present, absent = (seen | ~asked).all(axis=1), ~(seen & negated).any(axis=1)
    marks = {"present": present, "absent": absent, "both": present & absent}
    size, weights = logits.shape[:2], None
    if not is_quick(*size):
        weights = _resample(*size, resampled, np.random.default_rng(INTERVAL["seed"]))
    scores: dict[str, Any] = {"num_images": len(present)}
    for name, mark in marks.items():
        draws = None
        if weights is not None:
            counts = weights.reshape(-1, weights.shape[-1])  # each row for as many images in succession
            draws = mark.reshape(len(counts), -1).mean(axis=1) @ counts / counts.sum(axis=0)
        scores[name] = _estimate(name, mark.mean(), draws)
    return scores


def negation_ceiling(held_out: Mapping[str, Any], num_objects: np.ndarray) -> float | None:
    """Says what a judge scores as `both` on real images with as many objects, where each label not shown is negated.

    Args:
        held_out: The judge's scores on real images, as from `score_images`.
        num_objects: How many objects each condition asks for (num_conditions,).

    Returns:
        The mean over the conditions; None if there is no real image with as many objects as some condition asks for.
    """
    of_real = [held_out["by_num_objects"].get(str(k), {}).get("negation") for k in np.asarray(num_objects).tolist()]
    return None if None in of_real else sum(of_real) / len(of_real)


def score_images(logits: Tensor, class_labels: Tensor, *, threshold: float = 0.0) -> dict[str, Any]:
    """Scores a judge on images whose labels are known, in all and by number of objects.

    Args:
        logits: A judge's outputs (N, num_classes) before the sigmoid.
        class_labels: What the images show (N, num_classes); an entry above 0 is an object.
        threshold: A logit above it means that the judge sees the object.

    Returns:
        The number of images and their scores, None where undefined: `top_k` and `recall` where nothing is shown. Beside
        them `negation`, the share of pairs of an image and a label it does not show, each image weighed alike, in which
        all that it shows is seen and that label is not.
    """

    def score(part: _Reading) -> dict[str, Any]:
        scores = {name: _estimate(name, value, None)["value"] for name, value in _values(part)[0].items()}
        is_whole, others = (part.seen | ~part.asked).all(axis=1), ~part.asked
        negation = (is_whole * _ratio((others & ~part.seen).sum(axis=1), others.sum(axis=1))).mean()
        return {"num_images": len(part.asked)} | scores | {"negation": _estimate("negation", negation, None)["value"]}

    reading = _read(logits, class_labels, threshold)
    num_objects = reading.asked.sum(axis=1)
    by_num_objects = {str(k): score(reading.of(num_objects == k)) for k in np.unique(num_objects).tolist()}
    return score(reading) | {"by_num_objects": by_num_objects}


def ceiling(held_out: Mapping[str, Any], num_objects: np.ndarray) -> dict[str, float | None] | None:
    """Says what a judge scores on real images that show as many objects as the conditions of a list ask for.

    A generator whose images are read as well as real ones scores as much; more is the judge's weakness, not a better
    image.

    Args:
        held_out: The judge's scores on real images, as from `score_images`.
        num_objects: How many objects each condition asks for (num_conditions,).

    Returns:
        `top_k`, each condition weighed by its labels and None if there are none, and `exact_match`, each weighed alike;
        None if there is no real image with as many objects as some condition asks for.
    """
    numbers, of_real = np.asarray(num_objects).tolist(), held_out["by_num_objects"]
    if any(str(k) not in of_real for k in numbers):
        return None
    num_hits = sum(k * of_real[str(k)]["top_k"] for k in numbers if k > 0)  # of nothing, top-k is undefined
    return {
        "top_k": num_hits / sum(numbers) if any(numbers) else None,
        "exact_match": sum(of_real[str(k)]["exact_match"] for k in numbers) / len(numbers),
    }

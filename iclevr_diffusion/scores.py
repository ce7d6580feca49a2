"""The course's pooled top-k score and exact match, with intervals over seeds: pure functions of a judge's outputs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import BoolTensor, LongTensor, Tensor

QUICK_BELOW = 10  # seeds; a score from fewer is marked: its interval is not to be relied on

INTERVAL = {
    "level": 0.95,
    "method": "percentile bootstrap over seeds, replicates resampled within each condition",
    "num_resamples": 10_000,
    "seed": 0,
}


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


def bootstrap_estimate(values: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float | None]:
    """Weighs the mean values of conditions and says how far other seeds would have moved the sum.

    The interval is a percentile bootstrap (*An Introduction to the Bootstrap*, Efron and Tibshirani, 1993) whose
    replicates are drawn again within each condition: the conditions are the task's own and are not resampled. Where
    all replicates of every condition agree, it has no width, which few replicates do not prove.

    Args:
        values: Small whole numbers (num_conditions, num_replicates), such as the hits of each image.
        weights: Weight (num_conditions,) of each condition's mean; None weighs them alike, to a sum of 1.

    Returns:
        `value`, and `low` and `high` of the 95 % interval, which one replicate cannot give (None).
    """
    values = np.asarray(values, dtype=np.int64)
    num_conditions, num_replicates = values.shape
    weights = np.full(num_conditions, 1 / num_conditions) if weights is None else weights
    value = float(weights @ values.mean(axis=1))
    if num_replicates < 2:
        return {"value": value, "low": None, "high": None}
    # Drawing replicates again only changes how often each value occurs, and those counts are multinomial.
    levels = np.arange(values.max() + 1)
    shares = (values[:, :, None] == levels).mean(axis=1)
    random = np.random.default_rng(INTERVAL["seed"])
    resampled = np.zeros(INTERVAL["num_resamples"])
    for weight, share in zip(weights, shares, strict=True):
        resampled += (
            weight * (random.multinomial(num_replicates, share, INTERVAL["num_resamples"]) @ levels) / num_replicates
        )
    low, high = np.quantile(resampled, [(1 - INTERVAL["level"]) / 2, (1 + INTERVAL["level"]) / 2])
    return {"value": value, "low": float(low), "high": float(high)}


class Marks(NamedTuple):
    """What a judge saw in the images of a list, as bool arrays.

    Args:
        asked: Labels asked for (num_conditions, num_classes).
        found: Of these, the labels found (num_conditions, num_seeds, num_classes).
        exact: Exact matches (num_conditions, num_seeds).
    """

    asked: np.ndarray
    found: np.ndarray
    exact: np.ndarray


def mark_images(logits: Tensor, class_labels: Tensor) -> Marks:
    """Marks the images of a list.

    Args:
        logits: A judge's outputs (num_conditions, num_seeds, num_classes).
        class_labels: Labels asked for (num_conditions, num_classes).
    """
    flat, repeated = logits.flatten(0, 1), class_labels.repeat_interleave(logits.shape[1], dim=0)
    found = found_labels(flat, repeated).unflatten(0, logits.shape[:2])
    exact = exact_match(flat, repeated).unflatten(0, logits.shape[:2])
    return Marks((class_labels > 0).numpy(), found.numpy(), exact.numpy())


def score_list(marks: Marks, label_names: Sequence[str], held_out: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Scores a list of conditions in all, by number of objects and by label.

    Args:
        marks: What the judge saw.
        label_names: Name of each class.
        held_out: The judge's own score on real images, as `score_images` gives it, if known.
    """
    asked, found, exact = marks
    num_conditions, num_seeds = exact.shape
    num_objects, hits = asked.sum(axis=1), found.sum(axis=2)

    by_num_objects = {}
    for k in np.unique(num_objects).tolist():
        rows = num_objects == k
        by_num_objects[str(k)] = {
            "num_images": int(rows.sum()) * num_seeds,
            "top_k": bootstrap_estimate(hits[rows], np.full(rows.sum(), 1 / (k * rows.sum()))),
            "exact_match": bootstrap_estimate(exact[rows]),
        }
    by_label = {}
    for index, name in enumerate(label_names):
        rows = asked[:, index]
        if rows.any():
            by_label[name] = {
                "num_images": int(rows.sum()) * num_seeds,
                "top_k": bootstrap_estimate(found[rows, :, index]),
            }
    one_seed = hits.sum(axis=0) / num_objects.sum()
    score = {
        "num_conditions": num_conditions,
        "num_images": num_conditions * num_seeds,
        "num_labels": int(num_objects.sum()) * num_seeds,
        "top_k": bootstrap_estimate(hits, np.full(num_conditions, 1 / num_objects.sum())),
        "one_seed_top_k": {
            "min": float(one_seed.min()),
            "median": float(np.median(one_seed)),
            "max": float(one_seed.max()),
        },
        "exact_match": bootstrap_estimate(exact),
        "by_num_objects": by_num_objects,
        "by_label": by_label,
    }
    if held_out is not None and all(k in held_out["by_num_objects"] for k in by_num_objects):
        # What the judge makes of real images with the list's numbers of objects: the ceiling of `top_k`.
        of_real = np.array([held_out["by_num_objects"][str(k)]["top_k"] for k in num_objects])
        score["held_out_top_k_same_num_objects"] = float((of_real * num_objects).sum() / num_objects.sum())
    return score


def score_mean_of_lists(marks: Sequence[Marks]) -> dict[str, Any]:
    """Scores the mean over lists, each of the same weight however many labels it asks for."""
    asked, found, exact = zip(*marks, strict=True)
    hit_weights = [np.full(len(rows), 1 / (len(marks) * rows.sum())) for rows in asked]
    exact_weights = [np.full(len(rows), 1 / (len(marks) * len(rows))) for rows in asked]
    return {
        "top_k": bootstrap_estimate(np.concatenate(found).sum(axis=2), np.concatenate(hit_weights)),
        "exact_match": bootstrap_estimate(np.concatenate(exact), np.concatenate(exact_weights)),
    }


def score_images(logits: Tensor, class_labels: Tensor) -> dict[str, Any]:
    """Scores images whose labels are known, in all and by number of objects.

    Args:
        logits: A judge's outputs (N, num_classes).
        class_labels: What the images show (N, num_classes); an entry above 0 is an object.
    """

    def score(rows: Tensor) -> dict[str, Any]:
        num_hits, num_labels = top_k_hits(logits[rows], class_labels[rows]).sum(), num_objects[rows].sum()
        return {
            "num_images": int(rows.sum()),
            "top_k": float(num_hits / num_labels) if num_labels > 0 else None,  # no label, no score
            "exact_match": float(exact_match(logits[rows], class_labels[rows]).float().mean()),
        }

    num_objects = (class_labels > 0).sum(dim=1)
    by_num_objects = {str(k): score(num_objects == k) for k in num_objects.unique().tolist()}
    return score(num_objects >= 0) | {"by_num_objects": by_num_objects}


def format_results(results: Mapping[str, Any]) -> str:
    """Lays the main numbers of `results.json` out as a table for the terminal."""
    lines = []
    for judge_name, scores in results["scores"].items():
        held_out = results["held_out_images"].get(judge_name)
        taught = (
            " (also taught the pipeline: not independent)" if judge_name in results["judges_used_in_training"] else ""
        )
        lines += [
            f"judge {judge_name}{taught}",
            f"{'list':<24}{'objects':>8}{'top-k':>8}{'95 % interval':>16}{'one seed: min median max':>27}"
            f"{'exact':>8}{'held-out':>12}",
        ]
        rows = scores["lists"] | {key: scores[key] for key in ("all_lists", "mean_of_lists") if key in scores}
        for list_name, score in rows.items():
            real = score.get("held_out_top_k_same_num_objects")
            lines.append(_table_row(list_name, "all", score, real))
            for k, part in score.get("by_num_objects", {}).items():
                real = held_out["by_num_objects"].get(k, {}).get("top_k") if held_out else None
                lines.append(_table_row("", k, part, real))
        lines.append("")
    if "missing" in results["held_out_images"]:
        lines.append(f"No score of the judges on held-out images: {results['held_out_images']['missing']}.")
    if results["quick"]:
        lines.append(f"Quick (num_seeds is {results['num_seeds']}): numbers to report need {QUICK_BELOW}, better 30.")
    return "\n".join(lines)


def _table_row(list_name: str, objects: str, score: Mapping[str, Any], real: float | None) -> str:
    top_k, spread = score["top_k"], score.get("one_seed_top_k")
    interval = "-" if top_k["low"] is None else f"{top_k['low']:.3f} to {top_k['high']:.3f}"
    one_seed = "" if spread is None else f"{spread['min']:.3f}  {spread['median']:.3f}  {spread['max']:.3f}"
    return (
        f"{list_name:<24}{objects:>8}{top_k['value']:>8.3f}{interval:>16}{one_seed:>27}"
        f"{score['exact_match']['value']:>8.3f}{'-' if real is None else f'{real:.3f}':>12}"
    )

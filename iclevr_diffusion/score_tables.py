from collections.abc import Mapping
from typing import Any

from iclevr_diffusion.scores import MIN_CONDITIONS, MIN_REPLICATES

_HEADER = (
    f"{'':<24}{'objects':>8}{'top-k':>7}{'95 % interval':>15}{'exact':>7}{'precision':>11}{'recall':>8}{'count':>7}"
    f"{'mAP':>7}{'real top-k':>12}{'real exact':>12}"
)


def format_results(results: Mapping[str, Any]) -> str:
    """Lays the main numbers of `results.json` out as tables for the terminal, at most 120 columns wide."""
    held_out, distribution = (results.get(name, {}) for name in ("held_out_images", "distribution"))
    lines = []
    if results["protocols"]:
        for judge in results["settings"]["judges"]:
            lines += _table_of_judge(results, judge)
        lines += [
            "real: what the judge itself scores on held-out real images with as many objects, its ceiling.",
            *(["* This judge also taught the pipeline."] if results["judges_used_in_training"] else []),
            *(_lines_of_best(best) if (best := results["settings"].get("best_of")) else []),
        ]
        if quick := [name for name, protocol in results["protocols"].items() if protocol["quick"]]:
            lines += [
                f"Quick, thus without intervals and not for the leaderboard: {', '.join(quick)}.",
                f"An interval needs {MIN_REPLICATES} images of each condition, or {MIN_CONDITIONS} conditions.",
            ]
        if "missing" in held_out:
            lines.append(f"No score of the judges on real images: {held_out['missing']}.")
        lines.append("")
    if "missing" in distribution:
        lines += [f"No comparison with real images: {distribution['missing']}.", ""]
    elif distribution:
        lines += [*_lines_of_distribution(distribution), ""]
    if cost := results.get("cost"):
        lines += [
            f"Cost: {cost['images_per_second']:.4g} images/s in batches of {cost['batch_size']},"
            f" {cost['seconds_for_one_image']:.3g} s for one image ({cost['device']}, {cost['dtype']},"
            f" {cost['num_threads']} CPU threads);",
            f"{cost['num_parameters'] / 1e6:.4g} M parameters, {cost['network_calls_per_image']:.4g} network calls an"
            " image.",
        ]
    return "\n".join(lines).rstrip()


def _table_of_judge(results: Mapping[str, Any], judge: str) -> list[str]:
    is_teacher = judge in results["judges_used_in_training"]
    real = results.get("held_out_images", {}).get("judges", {}).get(judge)
    lines = [f"Judge {judge}{': taught the pipeline, not independent' if is_teacher else ''}", _HEADER]

    def add(name: str, part: str, scores: Mapping[str, Any], of_real: Mapping[str, Any] | None) -> None:
        lines.append(_table_row(f"{name} *" if name and is_teacher else name, part, scores, of_real))

    for protocol, entry in results["protocols"].items():
        scores = entry["judges"][judge]
        add(protocol, "all", scores["all"], scores.get("ceiling"))
        for k, part in scores["by_num_objects"].items():
            add("", k, part, real and real["by_num_objects"].get(k))
        for name, part in scores.get("by_seen", {}).items():
            add("", name, part, None)
    if mean := results.get("mean_of_test_and_new_test"):
        add("mean test, new_test", "all", mean[judge], mean[judge].get("ceiling"))
    if real:
        lines.append(_table_row("held-out real images", "all", real, None))
    for protocol, entry in results["protocols"].items():
        if negation := entry["judges"][judge].get("negation"):
            lines.append(_line_of_negation(protocol, negation))
    for protocol, entry in results["protocols"].items():
        if best := entry["judges"][judge].get("best_of"):
            add(protocol, f"best {best['num_candidates']} +", best["all"], None)
    return [*lines, ""]


def _lines_of_best(best: Mapping[str, Any]) -> list[str]:
    return [
        f"+ Of each {best['num_candidates']} images the one that the model itself finds to fit its labels best, by"
        f" {best['num_draws']} denoising",
        "losses with and without them: more work an image, and not comparable with one image drawn once.",
    ]


def _line_of_negation(protocol: str, negation: Mapping[str, Any]) -> str:
    present, absent, both = (_decimals(negation[name]["value"]) for name in ("present", "absent", "both"))
    low, high = negation["both"]["low"], negation["both"]["high"]
    interval = "" if low is None else f" ({low:.3f}-{high:.3f})"
    return (
        f"{protocol}: all asked for seen {present}, nothing negated seen {absent}, both {both}{interval};"
        f" real images {_decimals(negation.get('ceiling'))}"
    )


def _table_row(name: str, part: str, scores: Mapping[str, Any], of_real: Mapping[str, Any] | None) -> str:
    """Lays scores out as a row, be they mappings with an interval or, for real images, numbers."""
    names = ("top_k", "exact_match", "precision", "recall", "count_accuracy", "mean_average_precision")
    values = [scores[name]["value"] if isinstance(scores[name], Mapping) else scores[name] for name in names]
    top_k, exact, precision, recall, count, average_precision = map(_decimals, values)
    low, high = (scores["top_k"][end] if isinstance(scores["top_k"], Mapping) else None for end in ("low", "high"))
    interval = "-" if low is None else f"{low:.3f}-{high:.3f}"
    real_top_k, real_exact = (_decimals((of_real or {}).get(name)) for name in names[:2])
    return (
        f"{name:<24}{part:>8}{top_k:>7}{interval:>15}{exact:>7}{precision:>11}{recall:>8}{count:>7}"
        f"{average_precision:>7}{real_top_k:>12}{real_exact:>12}"
    )


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _lines_of_distribution(distribution: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{distribution['num_generated']} drawn against {distribution['num_real']} held-out real images; (real): other"
        " real images in the place of the drawn ones",
        f"{'in the features of':<36}{'Frechet':>10}{'kernel':>10}{'precision':>11}{'recall':>8}{'density':>9}"
        f"{'coverage':>10}{'diversity':>11}",
    ]
    diversity = distribution.get("diversity", {})
    for judge, parts in distribution["judges"].items():
        for source, measures in parts.items():
            name = judge if source == "generated" else f"{judge} (real)"
            relative = diversity.get("judges", {}).get(judge, {}).get("value") if source == "generated" else None
            lines.append(
                f"{name:<36}{measures['frechet_distance']:>10.4g}{measures['kernel_distance']:>10.3g}"
                f"{measures['precision']:>11.3f}{measures['recall']:>8.3f}{measures['density']:>9.3f}"
                f"{measures['coverage']:>10.3f}{_decimals(relative):>11}"
            )
    if inception := distribution.get("inception"):
        for source, measures in inception.items():
            name = "Inception" if source == "generated" else "Inception (real)"
            lines.append(f"{name:<36}{measures['fid']:>10.4g}{measures['kid']:>10.3g}  (the standard FID and KID)")
    if "pixels" in diversity:
        lines.append(f"{'pixels':<36}{_decimals(diversity['pixels']['value']):>69}")
    if copies := distribution.get("memorisation"):
        known = {
            True: "",
            False: "; but it was not trained on these",
            None: "; whether it was trained on these is unknown",
        }
        lines.append(
            f"Copies of training images: {copies['copies']:.2%} of the drawn, {copies['held_out']['copies']:.2%} of the"
            f" held-out real images{known[copies['trained_on_these']]}."
        )
    return lines

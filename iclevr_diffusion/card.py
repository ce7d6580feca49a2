import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from iclevr_diffusion.files import run_name


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a model card says that no script can know.

    Args:
        title: Heading of the card.
        summary: What the model is, in one paragraph.
        data: What it was trained on.
        intended_use: What it is for.
        limits: What it cannot do, and where its scores mislead.
        license: SPDX identifier of the licence of the weights.
        recipe: Where the recipe of the training lies.
        repo_id: The hub's name of the model, `owner/name`.
        papers: What the model follows, each with `title`, `authors`, `year` and `url`.
        tags: Words that a hub finds the model by.
        datasets: Identifiers of the training data on a hub.
    """

    title: str
    summary: str = ""
    data: str = ""
    intended_use: str = ""
    limits: str = ""
    license: str | None = None
    recipe: str | None = None
    repo_id: str | None = None
    papers: tuple[Mapping[str, Any], ...] = ()
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


def read_facts(facts: str | Path | Mapping[str, Any] | None, default_title: str) -> Facts:
    """Reads the words of a card from a YAML file or a mapping; without any, only the title is known.

    Raises:
        ValueError: If there is no such file, or it is not of the form of `Facts`.
    """
    where = "`facts`" if facts is None or isinstance(facts, Mapping) else str(facts)
    if facts is None:
        facts = {}
    elif not isinstance(facts, Mapping):
        try:
            facts = yaml.safe_load(Path(facts).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"`facts` must be a readable YAML file, got {where}: {error}") from error
    known = {field.name: field for field in dataclasses.fields(Facts)}
    if not isinstance(facts, Mapping) or not set(facts) <= set(known):
        strange = (
            ", ".join(map(str, sorted(set(facts) - set(known), key=str))) if isinstance(facts, Mapping) else facts
        )
        raise ValueError(f"{where} must map some of {', '.join(known)} to words, got {strange}.")
    values = {"title": default_title}
    for name, value in facts.items():
        is_list = known[name].default == ()
        kinds = (list, tuple) if is_list else (str, type(None))
        if not isinstance(value, kinds) or (name == "title" and not value):
            kind = "a list" if is_list else "text"
            raise ValueError(f"{where}: `{name}` must be {kind}, got {value!r}.")
        values[name] = tuple(value) if is_list else value
    for paper in values.get("papers", ()):
        if not isinstance(paper, Mapping) or set(paper) != {"title", "authors", "year", "url"}:
            raise ValueError(f"{where}: each of `papers` must have title, authors, year and url, got {paper!r}.")
    return Facts(**values)


def describe_training(output_dir: str | Path) -> dict[str, Any]:
    """Sums up what a training run wrote of itself: its recipe, its machine, its steps and seconds.

    Paths of the machine are cut to their last part, since the summary is published.

    Raises:
        ValueError: If `output_dir` is not the output folder of a training run.
    """
    output_dir = Path(output_dir)
    if missing := [name for name in ("config.yaml", "metrics.jsonl") if not (output_dir / name).is_file()]:
        raise ValueError(
            f"`training` must be the output folder of a training run, but {output_dir} lacks {' and '.join(missing)}."
        )
    config = yaml.safe_load((output_dir / "config.yaml").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    launches = _read(output_dir / "environment.json") or [{}]
    public = (
        "device",
        "num_processes",
        "cpu_count",
        "torch_threads",
        "mixed_precision",
        "python",
        "versions",
        "git_commit",
    )
    images = config["batch_size"] * config.get("gradient_accumulation_steps", 1) * launches[-1].get("num_processes", 1)
    steps = [0, *(line["step"] for line in lines)]
    return {
        "num_steps": steps[-1],
        "num_images": steps[-1] * images,
        "seconds": sum(
            (stop - start) * images / line["images_per_second"]
            for start, stop, line in zip(steps, steps[1:], lines, strict=False)
        ),
        "environment": {name: launches[-1][name] for name in public if name in launches[-1]},
        "config": {name: _without_folders(value) for name, value in config.items()},
    }


def render_card(
    folder: str | Path,
    facts: str | Path | Mapping[str, Any] | None,
    *,
    name: str | None = None,
    records: Mapping[str, Any] | None = None,
) -> str:
    """Writes out the model card of a published folder: the template, the words of `facts`, the numbers of the folder.

    Every number comes from the weights, the configurations, `results.json` or `training.json` in `folder`.

    Args:
        folder: The published folder.
        facts: The words, as a YAML file or a mapping of the form of `Facts`.
        name: Name of the model; the folder's if not given.
        records: Contents that take the place of those of `results.json` and `training.json` in the folder.

    Returns:
        The text of its `README.md`.
    """
    folder = Path(folder)
    name = name or folder.name
    facts = read_facts(facts, default_title=name)
    index = _read(folder / "model_index.json")
    results, training = (
        (records or {}).get(file) or _read(folder / file) for file in ("results.json", "training.json")
    )
    networks = _networks(folder, index)
    config = _read(networks[0] / "config.json")
    maps_images = "generator_a_to_b" in index
    if index:
        names = index.get("label_names") or {}
        label_names = [names[str(position)] for position in range(len(names))]
        task = "image-to-image" if maps_images else "image-generation"
        tags = ["diffusers", task, *(["multi-label"] if label_names else []), *facts.tags]
        image_size, class_name = config["sample_size"], index["_class_name"][1]
    else:
        label_names = list(config["label_names"] or [])
        tags = ["diffusers", "image-classification", "multi-label", *facts.tags]
        image_size, class_name = config["image_size"], config["_class_name"]
    rows = _rows(results, is_pipeline=bool(index))
    card_data = ModelCardData(
        model_name=name if rows else None,
        license=facts.license,
        library_name="diffusers",
        tags=list(dict.fromkeys(tags)),
        datasets=list(facts.datasets) or None,
        eval_results=[_eval_result(row, is_pipeline=bool(index)) for row in rows if row["value"] is not None] or None,
    )
    num_values, dtypes = _count_weights(networks)
    num_channels = config.get("out_channels", config.get("in_channels", 3))
    card = ModelCard.from_template(
        card_data,
        template_path=str(_template()),
        name=name,
        source=facts.repo_id or name,
        facts=facts,
        is_pipeline=bool(index),
        class_name=class_name,
        component_class=config["_class_name"],
        maps_images=maps_images,
        scheduler_class=index.get("scheduler", [None, None])[1],
        prediction_type=config.get("prediction_type"),
        has_guide="guide" in index,
        image_size=image_size,
        num_channels=num_channels,
        channels={1: "grey", 3: "RGB", 4: "RGBA"}.get(num_channels, f"{num_channels} channels"),
        label_names=label_names,
        num_values=num_values,
        dtypes=dtypes,
        training=training,
        recipe=yaml.safe_dump(training["config"], sort_keys=False) if training else None,
        duration=_duration(training["seconds"]) if training else None,
        results=results,
        rows=rows,
        negations=_negation_rows(results),
        picked=_picked_rows(results),
    )
    return f"{str(card).rstrip()}\n"


def render_index(root: str | Path) -> str:
    """Writes out a table of the published folders in `root` with their numbers, for the `README.md` beside them."""
    lines = [
        "# Models that come with the package",
        "",
        "Each folder is a published model as it would lie on a hub, written by `export_pipeline` or `export_judge`; its",
        "`README.md` is the model card. The numbers are those of the folders' `results.json`.",
        "",
        "| model | numbers in the weights | scored on | judge | top-k | 95 % interval | exact match | images |",
        "|---|---:|---|---|---:|---|---:|---:|",
    ]
    for folder in sorted(path.parent for path in Path(root).glob("*/README.md")):
        is_pipeline = (folder / "model_index.json").is_file()
        num_values, _ = _count_weights(_networks(folder, _read(folder / "model_index.json")))
        start = f"| [{folder.name}]({folder.name}) | {num_values / 1e6:.2f} M |"
        lines += [
            f"{start} {row['list']} | {row['judge']} | {row['top_k']} | {row['interval']} | {row['exact_match']} |"
            f" {row['num_images']} |"
            for row in _rows(_read(folder / "results.json"), is_pipeline=is_pipeline)
            if is_pipeline or row["list"].endswith("held out")  # the rest stands on the card
        ] or [f"{start} not scored yet | | | | | |"]
    return "\n".join(lines) + "\n"


def _rows(results: Mapping[str, Any], *, is_pipeline: bool) -> list[dict[str, Any]]:
    """Lists the scores that `iclevr-evaluate` wrote as text, and the `value` that a hub shows as a number."""
    if not results:
        return []
    if not is_pipeline:
        # A judge is scored on images whose labels are known, in all and by number of objects.
        parts = []
        for name, scores in results["data"].items():
            parts.append((f"{name}, held out", scores))
            parts += [
                (f"{name}, held out, {k} label{'' if k == '1' else 's'}", part)
                for k, part in scores["by_num_objects"].items()
            ]
        return [
            {
                "judge": "itself",
                "list": name,
                "top_k": _decimals(part["top_k"]),
                "interval": "-",
                "exact_match": _decimals(part["exact_match"]),
                "num_images": f"{part['num_images']:,}",
                "value": part["top_k"],
            }
            for name, part in parts
        ]
    rows = []
    for judge in results["settings"]["judges"]:
        parts = [
            (name, part["judges"][judge]["all"] | {"ceiling": part["judges"][judge].get("ceiling")})
            for name, part in results["protocols"].items()
        ]
        if mean := results.get("mean_of_test_and_new_test"):
            num_images = sum(results["protocols"][name]["num_images"] for name in ("test", "new_test"))
            parts.append(("mean of test and new_test", mean[judge] | {"num_images": num_images}))
        rows += [
            {
                "judge": judge,
                "list": name,
                "top_k": _decimals(part["top_k"]["value"]),
                "interval": _interval(part["top_k"]),
                "exact_match": _decimals(part["exact_match"]["value"]),
                "num_images": f"{part['num_images']:,}",
                "real_top_k": _decimals((part.get("ceiling") or {}).get("top_k")),
                "taught": judge in results["judges_used_in_training"],
                "value": part["top_k"]["value"],
            }
            for name, part in parts
        ]
    return rows


def _negation_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lists as text what was drawn of labels that were negated."""
    return [
        {"list": name, "judge": judge, "num_images": f"{part['num_images']:,}"}
        | {key: _decimals(scores["negation"][key]["value"]) for key in ("present", "absent", "both")}
        | {"interval": _interval(scores["negation"]["both"]), "real": _decimals(scores["negation"].get("ceiling"))}
        for name, part in results.get("protocols", {}).items()
        for judge, scores in part["judges"].items()
        if "negation" in scores
    ]


def _picked_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lists as text the scores of images that the model's own losses picked."""
    return [
        {"list": name, "judge": judge, "num_candidates": best["num_candidates"]}
        | {"num_images": f"{best['all']['num_images']:,}", "interval": _interval(best["all"]["top_k"])}
        | {key: _decimals(best["all"][key]["value"]) for key in ("top_k", "exact_match")}
        for name, part in results.get("protocols", {}).items()
        for judge, scores in part["judges"].items()
        if (best := scores.get("best_of"))
    ]


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(estimate: Mapping[str, float | None]) -> str:
    return "-" if estimate["low"] is None else f"{estimate['low']:.3f} to {estimate['high']:.3f}"


def _eval_result(row: Mapping[str, Any], *, is_pipeline: bool) -> EvalResult:
    return EvalResult(
        task_type="image-generation" if is_pipeline else "image-classification",
        dataset_type=row["list"].replace(" ", "-"),
        dataset_name=row["list"],
        metric_type="top_k",
        metric_name=f"pooled top-k accuracy, judged by {row['judge']}" if is_pipeline else "pooled top-k accuracy",
        metric_value=round(row["value"], 4),
    )


def _template() -> Path:
    """Finds the card's template, in a clone of the repository or in the installed package."""
    package = Path(__file__).parent
    in_clone = package.parent / "model_cards" / "template.md"
    return in_clone if in_clone.is_file() else package / "model_cards" / "template.md"


def _networks(folder: Path, index: Mapping[str, Any]) -> list[Path]:
    """Lists the folders of a published model's networks: those of a pipeline, its guide last, or the judge's own."""
    components = {name: value for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}
    names = [name for name, (library, _) in components.items() if library != "diffusers"]
    return [folder / name for name in sorted(names, key=lambda name: name == "guide")] or [folder]


def _count_weights(networks: Sequence[Path]) -> tuple[int, list[str]]:
    """Counts the numbers in networks' weights and lists the types they are stored as."""
    count, dtypes = 0, set()
    for path in [path for folder in networks for path in folder.glob("*.safetensors")]:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 -- the file itself cannot be iterated
                tensor = file.get_tensor(name)
                count += tensor.numel()
                dtypes |= {str(tensor.dtype).removeprefix("torch.")} if tensor.is_floating_point() else set()
    return count, sorted(dtypes)


def _read(file: Path) -> Any:  # noqa: ANN401 -- any JSON
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _without_folders(value: Any) -> Any:  # noqa: ANN401 -- any value of a recipe
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return run_name(value) if isinstance(value, str) else value


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"

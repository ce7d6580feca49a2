"""Systems beside what was reported of them: a table made of a list of rows and the records of those that were run."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from iclevr_diffusion.leaderboard import MEAN, TASK_LISTS, System, load_system
from iclevr_diffusion.leaderboard_tables import DAGGER, DIVERSITY, REAL, markdown_row, three_digits

Kind = Literal["reported recipe", "cured", "ablation"]
MARGIN = 0.03  # by which a cured system should be above the report
MIN_DIVERSITY = 0.8  # of the differences between real images of one condition
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """A system that was reported, or the cure of one, and how it is trained.

    Args:
        name: Its name in tables and folders.
        paper: What its paper calls it.
        kind: `reported recipe`: the settings of the report, as far as told; `cured`: what is known to go wrong
            mended; `ablation`: a part taken out, or a weight that was reported not to work.
        script: Script that trains it, in `train_scripts/`.
        recipe: Its recipe in `train_scripts/recipes/`, without the ending.
        overrides: Fields of the recipe that are set otherwise.
        reported: Scores by list, `test` and `new_test`; none was reported where it is empty.
        epochs: How long it was reported to be trained; None where that is not told.
        cures: The row whose reported scores a cured one is held against.
        remark: What else was reported.
    """

    name: str
    paper: str
    kind: Kind
    script: str
    recipe: str
    overrides: Mapping[str, Any]
    reported: Mapping[str, float]
    epochs: float | None = None
    cures: str | None = None
    remark: str = ""


@dataclass(frozen=True)
class Record:
    """What is known of a row that was trained and evaluated.

    Args:
        system: Its scores.
        run: How it was trained, as `make_run_record` put it down.
    """

    system: System
    run: Mapping[str, Any]


def read_rows(path: Path) -> dict[str, Row]:
    """Reads the list of rows, by their names.

    Raises:
        ValueError: If the file is not a YAML list of rows, or two share a name, or one cures what is not there.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be a YAML file: {error}") from None
    known = {field.name for field in fields(Row)}
    rows: dict[str, Row] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict) or not set(entry) <= known:
            raise ValueError(
                f"{path} must be a list of mappings with keys of {', '.join(sorted(known))}, got {entry!r}."
            )
        if missing := {"name", "paper", "kind", "script", "recipe"} - set(entry):
            raise ValueError(f"{path}: a row must have {', '.join(sorted(missing))}, got {entry!r}.")
        row = Row(**{"overrides": {}, "reported": {}} | entry)
        if row.name in rows:
            raise ValueError(f"{path}: rows must have distinct names, got {row.name!r} twice.")
        if row.kind not in get_args(Kind):
            raise ValueError(
                f"{path}, {row.name}: `kind` must be one of {', '.join(get_args(Kind))}, got {row.kind!r}."
            )
        if row.reported and set(row.reported) != set(TASK_LISTS):
            raise ValueError(
                f"{path}, {row.name}: `reported` must have scores of {' and '.join(TASK_LISTS)}, got"
                f" {dict(row.reported)!r}; what else was reported goes into `remark`."
            )
        rows[row.name] = row
    for row in rows.values():
        if row.cures not in ({None} if row.kind != "cured" else rows.keys() - {row.name}):
            raise ValueError(
                f"{path}, {row.name}: `cures` must name another row if it is a cured one, and nothing if it is not, got"
                f" {row.cures!r} for the kind {row.kind!r}."
            )
    return rows


def make_run_record(row: Row, output_dir: Path, *, weights: str, training: Mapping[str, Any]) -> dict[str, Any]:
    """Sums up how a row was trained.

    Args:
        row: The row.
        output_dir: Output folder of the training run.
        weights: Which of the run's pipelines was evaluated, `pipeline` or `best_pipeline`.
        training: What `training.json` of the exported pipeline says.
    """
    data = json.loads((output_dir / "data.json").read_text(encoding="utf-8"))
    config = training["config"]
    return {
        "schema_version": SCHEMA_VERSION,
        **_how_it_is_trained(row),
        "weights": weights,
        "num_steps": training["num_steps"],
        "max_steps": config["max_steps"],
        "max_minutes": config.get("max_minutes"),
        "num_epochs": training["num_images"] / data["num_images"],
        "seconds": training["seconds"],
        "device": training["environment"].get("device", "-"),
        "num_inference_steps": config.get("num_inference_steps"),
    }


def _how_it_is_trained(row: Row) -> dict[str, Any]:
    return {"script": row.script, "recipe": row.recipe, "overrides": dict(row.overrides)}


def load_records(rows: Mapping[str, Row], folder: Path) -> dict[str, Record]:
    """Opens the records of those rows that have one: `folder/<name>/results.json` and `run.json` beside it.

    Raises:
        ValueError: If a record is of a row that is not there or was trained otherwise, or is malformed.
    """
    again = "run benchmarks/baselines.py again for it, or delete that folder"
    records = {}
    for path in sorted(folder.glob("*/results.json")):
        name = path.parent.name
        if name not in rows:
            raise ValueError(f"{path} must be of a row of the list, which has none named {name!r}; {again}.")
        run = json.loads(path.with_name("run.json").read_text(encoding="utf-8"))
        if run.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"{path.with_name('run.json')} must have schema_version {SCHEMA_VERSION}; {again}.")
        for key, value in _how_it_is_trained(rows[name]).items():
            if run.get(key) != value:
                raise ValueError(
                    f"{path.parent} was trained with {key} {run.get(key)!r}, and its row has {value!r}; {again}."
                )
        system = load_system(path)
        if MEAN not in system.results:
            raise ValueError(f"{path} must hold the scores of {' and '.join(TASK_LISTS)}; {again}.")
        records[name] = Record(system, run)
    return records


def render_reports(rows: Mapping[str, Row], records: Mapping[str, Record], judge: str, summary: str = "") -> str:
    """Writes the table of what was reported and what was measured out, rows in the order of the list.

    Args:
        rows: All rows.
        records: Records of those that were run.
        judge: The judge that scores them all, which taught none.
        summary: Sentences to be put under the heading.

    Raises:
        ValueError: If the judge taught one of the systems, or did not score it, or two results do not compare.
    """
    _check_judge(records, judge)
    for what, keys in {
        "weights of the judge": ("settings", "judges", judge, "weights_sha256"),
        "conditions of test": ("protocols", "test", "sha256"),
        "conditions of new_test": ("protocols", "new_test", "sha256"),
    }.items():
        if len({record.system.find(*keys) for record in records.values()}) > 1:
            raise ValueError(f"Records in one table must agree in the {what}; evaluate them all alike.")
    titles = ["system", "kind", *(f"reported: {name}" for name in TASK_LISTS), *TASK_LISTS]
    titles += ["points above the report", "diversity", "training", "aim", "remark"]
    lines = [markdown_row(titles), "|---|---|" + "---:|" * (len(titles) - 5) + "---|---|---|"]
    ceiling = _ceiling(records.values(), judge)
    if ceiling is not None:
        scores = [_three_decimals(ceiling[name]) for name in TASK_LISTS]
        lines.append(markdown_row([f"*{REAL}*", "", "", "", *scores, "", "1", "", "", ""]))
    lines += [_line(rows, row, records.get(row.name), judge) for row in rows.values()]
    run = [record.run for record in records.values()]
    devices = ", ".join(sorted({part["device"] for part in run}))
    missing = [name for name in rows if name not in records]
    paragraphs = [
        "# Reported and measured",
        *filter(None, [summary]),
        f"**{', '.join(TASK_LISTS)}**: top-k, as {judge} sees it, which taught none of the systems, with 95 % intervals"
        f"{'' if ceiling is None else '; the first row is that judge on real images'}. **Points above the report**: mean"
        " of both lists, in hundredths; of a cured system above the report of the one that it cures. **Diversity**: how"
        " much images of one condition differ in their pixels, as a share of real ones. **Training**: epochs and duration; `of` stands before what"
        " the report had, or the recipe where that is not told. A row that had less compares with rows that had the same"
        " time, not with its report. **Aim**: a reported recipe reaches the reported mean within its interval; a cured"
        f" system is {100 * MARGIN:.0f} points above it, or at the judge's own ceiling, with a diversity of at least"
        f" {MIN_DIVERSITY}.",
        "\n".join(lines),
    ]
    if any(record.system.results["judges_used_in_training"] for record in records.values()):
        paragraphs.append(
            f"{DAGGER} Another judge taught this system. Reports scored such systems by the evaluator that taught them."
        )
    if run:
        chosen = sum(part["weights"] == "best_pipeline" for part in run)
        paragraphs.append(
            f"Trained on {devices}. Of {len(run)} systems, {chosen} are scored by the weights that did best on the way"
            " on validation conditions, as another judge saw them; the others by their last weights."
        )
    if shortened := _shortened(records):
        paragraphs.append(f"Drawn in fewer steps than their recipes': {', '.join(shortened)}.")
    if budgets := _budgets(rows, records):
        groups = "; ".join(f"{budget}: {', '.join(names)}" for budget, names in budgets.items())
        paragraphs.append(
            f"Less training than the report or the recipe had, and to be compared within a group: {groups}."
        )
    paragraphs.append(f"Not run yet: {', '.join(missing) or 'none'} ({len(missing)} of {len(rows)}).")
    return "\n\n".join(paragraphs) + "\n"


def _check_judge(records: Mapping[str, Record], judge: str) -> None:
    for name, record in records.items():
        if record.system.is_taught_by(judge) or judge not in record.system.results["settings"]["judges"]:
            raise ValueError(
                f"`judge` must be one that scored every system and taught none, got {judge!r}, which"
                f" {'taught' if record.system.is_taught_by(judge) else 'did not score'} {name}; choose another."
            )


def _ceiling(records: Iterable[Record], judge: str) -> dict[str, float] | None:
    for record in records:
        found = {name: record.system.ceiling((name,), judge).get("top_k") for name in TASK_LISTS}
        if None not in found.values():
            return found
    return None


def _line(rows: Mapping[str, Row], row: Row, record: Record | None, judge: str) -> str:
    held_against = rows[row.cures] if row.cures else row
    reported = [f"{row.reported[name]:.4f}" if row.reported else "-" for name in TASK_LISTS]
    kind = row.kind if row.cures is None else f"cure of {row.cures}"
    if record is None:
        return markdown_row([row.name, kind, *reported, *["-"] * 4, "not run yet", "-", row.remark])
    system = record.system
    mean = system.results[MEAN][judge]["top_k"]
    diversity = system.find(*DIVERSITY, "value")
    points = "-"
    if held_against.reported:
        target = sum(held_against.reported.values()) / len(TASK_LISTS)
        points = _points(*(100 * (mean[end] - target) if mean[end] is not None else None for end in _ENDS))
    cells = [
        row.name + DAGGER * bool(system.results["judges_used_in_training"]),
        kind,
        *reported,
        *(_estimate(system.scores((name,), judge)["top_k"]) for name in TASK_LISTS),
        points,
        "-" if diversity is None else f"{diversity:.2f}",
        _training(row, record.run),
        _aim(row, held_against, record, judge),
        row.remark,
    ]
    return markdown_row(cells)


_ENDS = ("value", "low", "high")


def _three_decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _estimate(estimate: Mapping[str, float | None]) -> str:
    value, low, high = (_three_decimals(estimate[end]) for end in _ENDS)
    return value if estimate["low"] is None else f"{value} [{low}, {high}]"


def _points(value: float | None, low: float | None, high: float | None) -> str:
    return f"{value:+.1f}" if low is None else f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _had_less(row: Row, run: Mapping[str, Any]) -> bool:
    """Says whether a run had less training than the report, or than the recipe where the report does not tell."""
    if row.epochs is not None:
        return run["num_epochs"] < 0.99 * row.epochs  # recipes count steps, which round epochs
    return run["num_steps"] < run["max_steps"]


def _shortened(records: Mapping[str, Record]) -> list[str]:
    """Lists the systems that were scored with fewer sampling steps than their recipes have."""
    names = []
    for name, record in records.items():
        own, taken = (
            record.run["num_inference_steps"],
            record.system.find("settings", "options", "num_inference_steps"),
        )
        if own is not None and taken is not None and taken < own:
            names.append(f"{name} ({taken} of {own})")
    return names


def _budgets(rows: Mapping[str, Row], records: Mapping[str, Record]) -> dict[str, list[str]]:
    """Groups the rows that had less training by what they had."""
    groups: dict[str, list[str]] = {}
    for name, row in rows.items():
        if name in records and _had_less(row, run := records[name].run):
            minutes = run["max_minutes"]
            time = "the recipe's steps" if minutes is None else f"at most {minutes:g} min"
            groups.setdefault(f"{time} on {run['device']}", []).append(name)
    return groups


def _training(row: Row, run: Mapping[str, Any]) -> str:
    whole = row.epochs if row.epochs is not None else run["num_epochs"] * run["max_steps"] / run["num_steps"]
    of = f" of {three_digits(whole)}" if _had_less(row, run) else ""
    return f"{three_digits(run['num_epochs'])}{of} epochs, {run['seconds'] / 60:.1f} min"


def _aim(row: Row, held_against: Row, record: Record, judge: str) -> str:
    """Says whether what the row is there for is reached; an ablation shows what a part is good for and has no aim."""
    if row.kind == "ablation" or not held_against.reported:
        return "-"
    system = record.system
    mean = system.results[MEAN][judge]["top_k"]
    target = sum(held_against.reported.values()) / len(TASK_LISTS)
    if row.kind == "cured":
        ceiling = _ceiling([record], judge)
        highest = 1.0 if ceiling is None else sum(ceiling.values()) / len(TASK_LISTS)
        diversity = system.find(*DIVERSITY, "value")
        reached = mean["value"] >= min(target + MARGIN, highest) and (diversity or 0) >= MIN_DIVERSITY
    else:
        reached = (mean["value"] if mean["high"] is None else mean["high"]) >= target
    return "reached" if reached else "less training" if _had_less(row, record.run) else "missed"

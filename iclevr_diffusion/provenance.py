import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from iclevr_diffusion.files import judge_name, parse_json, read_json
from iclevr_diffusion.loading import PIPELINE_CLASSES, find_folder, models_inside

_FACTS = ("conditions", "data_sha256", "split", "judges")  # that `training_facts` tells


def training_facts(
    path_or_repo: str | Path | None = None, *, revision: str | None = None, guide: str | Path | None = None
) -> dict[str, Any]:
    """Tells what a pipeline was trained on, where the folder says so.

    A published folder holds that itself (`conditions.json`, `training.json`, `guide.json`); for a folder that a training
    run wrote, such as `output_dir/pipeline`, it lies in `output_dir` (`conditions.json`, `data.json`). What weights have
    seen that the run began with (`init_from`, see `first_weights_facts`), or the guide has, counts as seen by the pipeline.

    Args:
        path_or_repo: Folder, hub's `owner/name` or name of a pipeline, as `load_pipeline` takes it.
        revision: Branch, tag or commit of a hub's model.
        guide: The pipeline that guides it, as `load_pipeline` takes it; a folder's own guide if not given.

    Returns:
        `conditions`, the distinct label sets of the training images as a list of tuples of names, as far as the
        pipeline knows these names; `data_sha256`, the fingerprint of the data set that the run's images are a part of
        (`ImageStore.sha256`); `split`, which part, where `all` held nothing out, be it before this run or in the
        guide's; and `judges`, the names of those that scored these runs on their way or taught them. None for what is
        not known.

    Raises:
        ValueError: If there is no such pipeline, or one of the files is not of the right form.
    """
    folder = find_folder(path_or_repo, revision)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ValueError(
            f"{folder} must be a pipeline's folder with a model_index.json, and there is none"
            f"{models_inside(folder, 'model_index.json', PIPELINE_CLASSES)}."
        )
    index, own_guide = read_json(index_file), folder / "guide.json"
    if guide is not None:
        guide_facts = training_facts(guide)
    elif "guide" in index and own_guide.is_file():
        guide_facts = read_json(own_guide)
        if guide_facts.get("conditions") is not None:
            guide_facts["conditions"] = _check_conditions(guide_facts["conditions"], own_guide)
    else:
        guide_facts = {}
    if isinstance(index.get("_class_name"), list):
        record = folder / "training.json"
        training = read_json(record) if record.is_file() else {}
        conditions = _read_conditions(folder / "conditions.json")
    else:
        folder = folder.resolve().parent
        record, training, conditions = folder / "data.json", {}, None
        if (folder / "config.yaml").is_file():  # else whatever lies there is not a run's
            training = data_of_run(folder) | {"config": _config_of_run(folder)}
            conditions = conditions_of_run(folder, index.get("label_names"))
    data_sha256 = training.get("data_sha256")
    is_hash = isinstance(data_sha256, str) and re.fullmatch("[0-9a-f]{64}", data_sha256)
    if data_sha256 is not None and not is_hash:
        raise ValueError(f"{record} must name the images by a SHA-256 of 64 digits, got {data_sha256!r:.100}.")
    config = training.get("config")
    config = config if isinstance(config, dict) else {}
    if config.get("streaming"):  # its fingerprint is one of files, which that of decoded images says nothing about
        data_sha256 = None
    first = training.get("first_weights")
    first = first if isinstance(first, dict) else {}
    judges = [judge_name(config[key]) for key in ("judge", "evaluator") if isinstance(config.get(key), str)]
    for others in (
        training.get("judges"),
        training.get("teacher_judges"),
        first.get("judges"),
        guide_facts.get("judges"),
    ):
        judges += [judge for judge in others if isinstance(judge, str)] if isinstance(others, list) else []
    return {
        "conditions": _with_further(conditions, guide_facts.get("conditions") or []),
        "data_sha256": data_sha256,
        "split": "all" if "all" in (first.get("split"), guide_facts.get("split")) else training.get("split"),
        "judges": sorted(set(judges)) or None,
    }


def first_weights_facts(source: str | Path) -> dict[str, Any]:
    """Tells of the weights that a run begins with what `training_facts` tells of a pipeline.

    Args:
        source: What the option `init_from` takes: a pipeline, or the folder of a network, which may lie in a pipeline's.
    """
    folder = find_folder(source)
    if not (folder / "model_index.json").is_file():
        folder = folder.resolve().parent
    return training_facts(folder) if (folder / "model_index.json").is_file() else dict.fromkeys(_FACTS)


def data_of_run(output_dir: str | Path) -> dict[str, Any]:
    """Reads which images a run was trained on, in the words of `training.json`; a judge's run does not say it."""
    file = Path(output_dir) / "data.json"
    if not file.is_file():
        return {}
    data = read_json(file)
    facts = {"data_sha256": data.get("data"), "split": data.get("split")}
    facts |= {key: data[key] for key in ("teacher_judges",) if key in data}  # of a student's teacher
    judges = Path(output_dir) / "judges.json"
    facts |= {"judges": parse_json(judges)} if judges.is_file() else {}
    first = _first_weights_of_run(Path(output_dir))
    return facts | ({"first_weights": {key: first.get(key) for key in _FACTS if key != "conditions"}} if first else {})


def _config_of_run(output_dir: Path) -> Any:  # noqa: ANN401 -- any YAML
    return yaml.safe_load((output_dir / "config.yaml").read_text(encoding="utf-8"))


def _first_weights_of_run(output_dir: Path) -> dict[str, Any]:
    """Reads what `first_weights_facts` said when the run began; nothing of a run that began with none."""
    file, config = output_dir / "first_weights.json", _config_of_run(output_dir)
    # The file may be an earlier run's that had no checkpoint yet.
    begins_with_some = isinstance(config, dict) and config.get("init_from") is not None
    return read_json(file) if begins_with_some and file.is_file() else {}


def conditions_of_run(output_dir: Path, label_names: Mapping[str, str] | None) -> list[tuple[str, ...]] | None:
    """Reads the label sets of a run's images, and behind them those that its first weights have seen besides.

    Args:
        output_dir: The run's folder.
        label_names: The labels of the run; sets with another label, which it cannot ask for, are left out.
    """
    conditions = _read_conditions(output_dir / "conditions.json")
    if conditions is None:
        return None
    known = set((label_names or {}).values())
    earlier = map(tuple, _first_weights_of_run(output_dir).get("conditions") or [])
    return _with_further(conditions, [labels for labels in earlier if known.issuperset(labels)])


def _with_further(
    conditions: list[tuple[str, ...]] | None, others: Iterable[tuple[str, ...]]
) -> list[tuple[str, ...]] | None:
    """Puts behind label sets those of others that are not among them, in whatever order; what is not known stays so."""
    if conditions is None:
        return None
    own = {frozenset(labels) for labels in conditions}
    return conditions + [labels for labels in others if frozenset(labels) not in own]


def write_guide_facts(file: Path, came_from: str | Path) -> None:
    """Writes down what the network of a guide was trained on, as far as the folder that it came from says so."""
    if not Path(came_from).is_dir():
        warnings.warn(
            f"What the guide was trained on is not published with it, as the folder it came from, {came_from}, is gone.",
            stacklevel=3,
        )
        return
    facts = first_weights_facts(came_from)
    if any(fact is not None for fact in facts.values()):
        file.write_text(json.dumps(facts) + "\n", encoding="utf-8")


def _read_conditions(file: Path) -> list[tuple[str, ...]] | None:
    """Reads the label sets of the training images."""
    return _check_conditions(parse_json(file), file) if file.is_file() else None


def _check_conditions(conditions: Any, file: Path) -> list[tuple[str, ...]]:  # noqa: ANN401 -- any JSON
    """Refuses what a file that may come from a stranger holds in the place of label sets."""
    form = 'a list of lists of distinct labels, as in [["red cube"], ["red cube", "gray sphere"]]'
    if not isinstance(conditions, list):
        raise ValueError(f"{file} must hold {form}, got {type(conditions).__name__}.")
    for position, labels in enumerate(conditions):
        is_list = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
        if not is_list or len(set(labels)) < len(labels):
            raise ValueError(f"{file} must hold {form}, got {labels!r:.100} in number {position}.")
    return [tuple(labels) for labels in conditions]

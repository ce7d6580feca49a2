import copy
import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from iclevr_diffusion.card import describe_training, render_card
from iclevr_diffusion.files import read_json, write_text
from iclevr_diffusion.loading import (
    JUDGE_CLASSES,
    MODEL_CLASSES,
    PIPELINE_CLASSES,
    list_classes,
    load_pipeline,
    scheduler_class,
    weight_files,
)
from iclevr_diffusion.models.classifier import LabelClassifier
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier
from iclevr_diffusion.pipelines.labelled_pipeline import LabelledPipeline
from iclevr_diffusion.provenance import conditions_of_run, data_of_run, write_guide_facts

EXPORT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# What the numbers of a published folder's card come from, the label sets of the training images, and what its guide was
# trained on; it may lack any.
RECORDS = ("conditions.json", "guide.json", "results.json", "training.json")


def export_pipeline(
    pipeline: LabelledPipeline,
    folder: str | Path,
    *,
    facts: str | Path | Mapping[str, Any] | None = None,
    training: str | Path | None = None,
    dtype: torch.dtype = torch.float16,
    max_shard_size: str | int = "16MB",
) -> Path:
    """Writes a pipeline as it would lie on a hub: weights, configurations, the source of its classes and a model card.

    People who have this package open the folder with `load_pipeline`, which does not run the source; others with
    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`. The folder is written whole or not at all.
    Scores are those of the published weights, so they come after: evaluate the folder, then call
    `write_card(folder, facts, results=...)`.

    Args:
        pipeline: A pipeline of this package's classes; it stays as it is.
        folder: Where to write; an earlier export there is replaced, anything else refused.
        facts: The words of the card, as `write_card` takes them.
        training: Output folder of the training run, as `write_card` takes it; its conditions.json is published too.
        dtype: What to store the weights as.
        max_shard_size: Weights larger than this are split, so that each file stays below it.

    Returns:
        The folder.

    Raises:
        ValueError: If the pipeline or a component is not of this package's classes, a weight does not fit `dtype`, or
            `folder` holds something else.
    """
    if type(pipeline) not in PIPELINE_CLASSES:
        raise ValueError(
            f"`pipeline` must be a {list_classes(PIPELINE_CLASSES)} of this package, got {_full_name(pipeline)}; open the"
            " folder it came from with `load_pipeline`."
        )
    folder = Path(folder).expanduser().absolute()
    with _replacing(folder) as staging:
        pipeline.save_config(staging)
        index_file = staging / "model_index.json"
        index = read_json(index_file)
        source = Path(inspect.getfile(type(pipeline)))
        index["_class_name"] = ["pipeline", type(pipeline).__name__]
        index.pop("_name_or_path", None)  # where the author had it is not published
        shutil.copyfile(source, staging / "pipeline.py")
        for sibling in get_relative_imports(source):
            shutil.copyfile(source.with_name(f"{sibling}.py"), staging / f"{sibling}.py")

        for name, component in pipeline.components.items():
            if component is None:  # an optional one
                del index[name]
                continue
            component = getattr(component, "_orig_mod", component)  # what torch.compile has wrapped
            if name == "guide" and (came_from := component.config.get("_name_or_path")):
                write_guide_facts(staging / "guide.json", came_from)
            if type(component) in MODEL_CLASSES:
                source = Path(inspect.getfile(type(component)))
                index[name] = [source.stem, type(component).__name__]
                _save_model(component, staging / name, dtype, max_shard_size)
                shutil.copyfile(source, staging / name / source.name)
            elif type(component) is scheduler_class(type(component).__name__):
                index[name] = ["diffusers", type(component).__name__]
                component.save_pretrained(staging / name)
            else:
                raise ValueError(
                    f"`pipeline.{name}` must be a {list_classes(MODEL_CLASSES)} of this package or a scheduler of diffusers,"
                    f" got {_full_name(component)}; unwrap it, or open the folder it came from with `load_pipeline`."
                )
        write_text(index_file, json.dumps(index, indent=2) + "\n")
        _write_card(staging, folder.name, facts, training)
    return folder


def export_judge(
    judge: LabelClassifier | SmallLabelClassifier,
    folder: str | Path,
    *,
    facts: str | Path | Mapping[str, Any] | None = None,
    training: str | Path | None = None,
    dtype: torch.dtype = torch.float16,
    max_shard_size: str | int = "16MB",
) -> Path:
    """Writes a judge as it would lie on a hub: weights, configuration and a model card; `load_judge` opens it.

    Arguments, result and refusals are those of `export_pipeline`.
    """
    judge = getattr(judge, "_orig_mod", judge)
    if type(judge) not in JUDGE_CLASSES:
        raise ValueError(f"`judge` must be a {list_classes(JUDGE_CLASSES)} of this package, got {_full_name(judge)}.")
    folder = Path(folder).expanduser().absolute()
    with _replacing(folder) as staging:
        _save_model(judge, staging, dtype, max_shard_size)
        _write_card(staging, folder.name, facts, training)
    return folder


def published_files(folder: str | Path) -> list[str]:
    """Lists the files that make up a published folder, relative to it: these and no others are uploaded.

    The list follows from the configurations, so that a stray file, even one among the weights, is not on it.

    Raises:
        ValueError: If `folder` is no published folder, or one of its files is missing or lies outside of it.
    """
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        if not isinstance(index.get("_class_name"), list):
            raise ValueError(
                f"{folder} must be a folder that `export_pipeline` wrote, got a training folder; open it with"
                " `load_pipeline` and export the pipeline."
            )
        files = ["model_index.json", "pipeline.py"]
        if (folder / "pipeline.py").is_file():
            files += [f"{sibling}.py" for sibling in get_relative_imports(folder / "pipeline.py")]
        for name, value in index.items():
            if name.startswith("_") or not isinstance(value, list):
                continue
            if value[0] == "diffusers":
                files.append(f"{name}/scheduler_config.json")
            else:
                files += [f"{name}/{file}" for file in (f"{value[0]}.py", "config.json", *weight_files(folder / name))]
    elif (folder / "config.json").is_file():
        files = ["config.json", *weight_files(folder)]
    else:
        raise ValueError(f"{folder} must be a folder that `export_pipeline` or `export_judge` wrote, and is none.")
    files += ["README.md", *(file for file in RECORDS if (folder / file).is_file())]
    root = folder.resolve()
    if outside := [
        file
        for file in files
        if not re.fullmatch(r"(\w[\w-]*/)?\w[\w.-]*", file)
        or not (folder / file).parent.resolve().is_relative_to(root)
    ]:
        raise ValueError(
            f"{folder} must hold its files itself, but {', '.join(outside)} leads out of it; export the model again."
        )
    if missing := [file for file in files if not (folder / file).is_file() or (folder / file).is_symlink()]:
        raise ValueError(f"{folder} must be whole, but lacks {', '.join(missing)}; export the model again.")
    return sorted(files)


def write_card(
    folder: str | Path,
    facts: str | Path | Mapping[str, Any] | None = None,
    *,
    results: str | Path | None = None,
    training: str | Path | None = None,
) -> Path:
    """Writes the model card of a published folder anew, with the scores and the training run it is given.

    All numbers come from files that are published beside the card: the weights, `results.json` and `training.json`. A
    training run also gives `conditions.json`, which `training_facts` reads.

    Args:
        folder: A folder that `export_pipeline` or `export_judge` wrote.
        facts: The words of the card: a YAML file or mapping with the fields of `iclevr_diffusion.card.Facts`.
        results: The `results.json` of `iclevr-evaluate` on this folder, for a judge the `judges.json` of
            benchmarks/judges.py; an earlier one stays if not given.
        training: Output folder of the training run, of which recipe, machine, duration and label sets are kept; an
            earlier record stays if not given.

    Returns:
        The card.

    Raises:
        ValueError: If the results are of other weights, or a file is not of the right form.
    """
    folder = Path(folder).expanduser().absolute()
    published_files(folder)
    _write_card(folder, folder.name, facts, training, None if results is None else _scores_of(folder, Path(results)))
    return folder / "README.md"


def push_to_hub(
    pipeline: LabelledPipeline | LabelClassifier | SmallLabelClassifier | str | Path,
    repo_id: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo | dict[str, int]:
    """Uploads a published folder to a hub in one commit: exactly the files of `published_files`.

    Weights and records of an earlier upload that the model no longer has are removed from the repository by the same
    commit; other files there stay. `HF_ENDPOINT` says which hub it is.

    Args:
        pipeline: The folder that `export_pipeline` or `export_judge` wrote, with its scores on the card; or a pipeline
            or judge, which is exported first, with a card without scores.
        repo_id: The repository, `owner/name`; it is made if it does not exist.
        private: Whether a repository that is made is private. One that exists stays as it is; if it is public, it takes
            the files only with `private=False`.
        dry_run: Whether to list the files and their sizes instead, without any connection.
        token: Access token; the one of `hf auth login` if not given.
        revision: Branch to commit to, made if it does not exist; `main` if not given.
        commit_message: First line of the commit.

    Returns:
        The commit, or for a dry run the sizes of the files in bytes by name, which it also prints.

    Raises:
        ValueError: If the model cannot be exported, the folder is no published folder, or the repository is public and
            `private` is true.
    """
    if not isinstance(pipeline, (str, Path)):
        with tempfile.TemporaryDirectory() as temporary:
            export = export_judge if type(pipeline) in JUDGE_CLASSES else export_pipeline
            folder = export(pipeline, Path(temporary) / repo_id.split("/")[-1])
            return push_to_hub(
                folder,
                repo_id,
                private=private,
                dry_run=dry_run,
                token=token,
                revision=revision,
                commit_message=commit_message,
            )
    folder = Path(pipeline).expanduser().absolute()
    sizes = {file: (folder / file).stat().st_size for file in published_files(folder)}
    if dry_run:
        print(f"To {repo_id}, {sum(sizes.values()):,} bytes in {len(sizes)} files:")
        for file, size in sizes.items():
            print(f"{size:>12,}  {file}")
        return sizes

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise ValueError(
            f"`private` must be False to upload into {repo_id}, which exists and is public, got True; give"
            " private=False, or choose another repository."
        )
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    weights = re.compile(r"(\w+/)?diffusion_pytorch_model[\w.-]*\.(safetensors|json)")
    present = api.list_repo_files(repo_id, revision=revision)
    stale = [file for file in present if file not in sizes and (weights.fullmatch(file) or file in RECORDS)]
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(file, folder / file) for file in sizes] + [CommitOperationDelete(file) for file in stale],
        commit_message=commit_message or f"Upload {folder.name}",
        revision=revision,
    )


def _save_model(model: ModelMixin, folder: Path, dtype: torch.dtype, max_shard_size: str | int) -> None:
    if dtype not in EXPORT_DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, EXPORT_DTYPES))}, got {dtype}.")
    model = torch.nn.Module.to(copy.deepcopy(model), "cpu", dtype)
    for name, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"{name!r} holds values that {dtype} cannot; export with dtype=torch.bfloat16 or float32."
            )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    config = read_json(folder / "config.json")
    config.pop("_name_or_path", None)  # where the author had it is not published
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _write_card(
    folder: Path,
    name: str,
    facts: str | Path | Mapping[str, Any] | None,
    training: str | Path | None,
    results: Mapping[str, Any] | None = None,
) -> None:
    """Writes the records that are given and then the card, once all of them have turned out well."""
    texts = {}
    if results is not None:
        texts["results.json"] = json.dumps(results, indent=2) + "\n"
    if training is not None:
        texts["training.json"] = json.dumps(describe_training(training) | data_of_run(training), indent=2) + "\n"
        index_file = folder / "model_index.json"
        label_names = read_json(index_file).get("label_names") if index_file.is_file() else None
        conditions = conditions_of_run(Path(training), label_names)
        if conditions is not None:
            texts["conditions.json"] = json.dumps(conditions) + "\n"
    records = {file: json.loads(text) for file, text in texts.items()}  # as the card will find them later
    texts["README.md"] = render_card(folder, facts, name=name, records=records)
    for file, text in texts.items():
        write_text(folder / file, text)
    if training is not None and "conditions.json" not in texts:
        (folder / "conditions.json").unlink(missing_ok=True)  # those of another run


def _scores_of(folder: Path, file: Path) -> dict[str, Any]:
    """Reads the scores of a published model, and refuses those of other weights, such as those its own round."""
    from iclevr_diffusion.judging import load_judge, weights_sha256  # here, as it is slow to import

    results = read_json(file)
    is_pipeline = (folder / "model_index.json").is_file()
    command = "iclevr-evaluate" if is_pipeline else "benchmarks/judges.py"
    try:
        if is_pipeline:
            pipeline = load_pipeline(folder, dtype=getattr(torch, results["settings"]["dtype"]))
            networks = [
                model for _, model in sorted(pipeline.components.items()) if isinstance(model, torch.nn.Module)
            ]
            if results["pipeline"]["weights_sha256"] == weights_sha256(*networks):
                return {**results, "pipeline": {**results["pipeline"], "name": folder.name}}  # may have been a path
        else:
            weights = weights_sha256(load_judge(folder).float())
            for name, judge in results["judges"].items():
                if judge["weights_sha256"] == weights:
                    return {
                        "judge": judge,
                        "data": {
                            data_name: {"data_sha256": data["data_sha256"], **data["judges"][name]}
                            for data_name, data in results["data"].items()
                        },
                        "environment": results["environment"],
                    }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} must be a file that `{command}` wrote, got none of its form: {error}.") from error
    raise ValueError(
        f"{file} must hold scores of the weights in {folder}, got scores of others; run `{command}` with this folder."
    )


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Gives a folder to write to, which takes the place of `folder` once the block has ended well."""
    if folder.is_symlink() or folder.is_file():
        raise ValueError(f"`folder` must be a folder or nothing yet, got the file or link {folder}.")
    if folder.is_dir() and any(folder.iterdir()):
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        try:
            strange = present - set(published_files(folder))
        except ValueError as error:
            raise ValueError(f"`folder` must be empty or an earlier export: {error} Choose another folder.") from error
        if strange:
            raise ValueError(
                f"`folder` must be empty or an earlier export, but {folder} also holds"
                f" {', '.join(sorted(strange)[:5])}; move this away or choose another folder."
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        staging, previous = Path(temporary) / "new", Path(temporary) / "previous"
        staging.mkdir()
        yield staging
        if folder.exists():
            os.replace(folder, previous)
        try:
            os.replace(staging, folder)
        except OSError:
            if previous.exists():
                os.replace(previous, folder)
            raise


def _full_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"

import copy
import difflib
import inspect
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import yaml
from diffusers import ModelMixin, SchedulerMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from iclevr_diffusion.card import describe_training, render_card
from iclevr_diffusion.files import judge_name
from iclevr_diffusion.models.cgan import CGANEmbeddingGenerator, CGANGenerator
from iclevr_diffusion.models.classifier import LabelClassifier
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier
from iclevr_diffusion.models.cyclegan import CycleGANGenerator
from iclevr_diffusion.models.dcgan import DCGANGenerator
from iclevr_diffusion.models.sagan import SAGANGenerator
from iclevr_diffusion.models.unet_multilabel import MultiLabelUNet2DModel
from iclevr_diffusion.models.unet_small import SmallMultiLabelUNet
from iclevr_diffusion.models.vae_multilabel import MultiLabelVAE
from iclevr_diffusion.pipelines.labelled_pipeline import LabelledPipeline
from iclevr_diffusion.pipelines.pipeline_conditional_ddpm import ConditionalDDPMPipeline
from iclevr_diffusion.pipelines.pipeline_conditional_gan import ConditionalGANPipeline
from iclevr_diffusion.pipelines.pipeline_conditional_vae import ConditionalVAEPipeline
from iclevr_diffusion.pipelines.pipeline_cyclegan import CycleGANPipeline

DEFAULT_PIPELINE = "conditional-ddpm-tiny-rendered-4-steps"
DEFAULT_JUDGES = ("judge-small", "judge-resnet18-half")

# What a folder may ask for by name; beside these only diffusers' own schedulers.
PIPELINE_CLASSES = (ConditionalDDPMPipeline, ConditionalGANPipeline, ConditionalVAEPipeline, CycleGANPipeline)
MODEL_CLASSES = (
    MultiLabelUNet2DModel,
    SmallMultiLabelUNet,
    DCGANGenerator,
    SAGANGenerator,
    CGANGenerator,
    CGANEmbeddingGenerator,
    MultiLabelVAE,
    CycleGANGenerator,
)
JUDGE_CLASSES = (LabelClassifier, SmallLabelClassifier)

BACKENDS = ("torch", "compiled", "onnx")

_FACTS = ("conditions", "data_sha256", "split", "judges")  # that `training_facts` tells

EXPORT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# What the numbers of a published folder's card come from, the label sets of the training images, and what its guide was
# trained on; it may lack any.
RECORDS = ("conditions.json", "guide.json", "results.json", "training.json")


def shipped_folder(name: str) -> Path:
    """Finds a model that comes with the package, in the installed package or in a clone of the repository.

    Raises:
        ValueError: If no model of this name comes with the package.
    """
    package = Path(__file__).parent
    roots = [package / "shipped", package.parent / "pipelines"]
    shipped = {path.parent.name: path.parent for root in roots for path in sorted(root.glob("*/README.md"))}
    if name not in shipped:
        raise ValueError(
            f"No model named {name!r} comes with this package; there are {', '.join(sorted(shipped)) or 'none'}. A model"
            " of your own is given by its folder, a model of a hub by `owner/name`."
        )
    return shipped[name]


def find_folder(path_or_repo: str | Path | None = None, revision: str | None = None) -> Path:
    """Finds the folder of a model, which a hub gives without source code and pickled weights.

    Args:
        path_or_repo: A folder, a hub's `owner/name`, or the name of a model that comes with the package; the package's
            default model if not given.
        revision: Branch, tag or commit of a hub's model.

    Raises:
        ValueError: If there is no such model, or `revision` is given for one on this machine.
    """
    local = None if path_or_repo is None else Path(path_or_repo).expanduser()
    is_repo = isinstance(path_or_repo, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path_or_repo) is not None
    if revision is not None and (not is_repo or local.is_dir()):
        raise ValueError(f"`revision` must be left out for a model on this machine, got {revision!r}.")
    if local is None:
        return shipped_folder(DEFAULT_PIPELINE)
    if local.is_dir():
        return local
    if not is_repo and isinstance(path_or_repo, str) and re.fullmatch(r"\w[\w.-]*", path_or_repo):
        return shipped_folder(path_or_repo)
    nearest = [] if revision is not None else _similar_models(local)
    if nearest or not is_repo:
        hint = f"; did you mean {nearest[0]}?" if nearest else "."
        asked = " A hub is asked for a model so named if its `revision` is given, such as main." if is_repo else ""
        raise ValueError(
            f"`path_or_repo` must be a folder or a hub's `owner/name`; there is no folder {local}{hint}{asked}"
        )
    try:  # the patterns keep source code and pickled weights from being fetched at all
        return Path(snapshot_download(path_or_repo, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"`path_or_repo` must be a folder or a hub's `owner/name`; there is no folder {path_or_repo}, and the hub"
            f" does not give a model of this name{f' at revision {revision}' if revision else ''}: {error}"
        ) from error


def _similar_models(folder: Path) -> list[Path]:
    """Finds models beside a folder that is missing, of names that it may have been meant to have, the nearest first."""
    models = {
        file.parent.name for name in ("model_index.json", "config.json") for file in folder.parent.glob(f"*/{name}")
    }
    return [folder.with_name(name) for name in difflib.get_close_matches(folder.name, sorted(models), cutoff=0.8)]


def _models_inside(folder: Path, file_name: str, classes: Iterable[type]) -> str:
    """Names the models that a folder, such as a training run's, holds instead of being one."""
    known = {item.__name__ for item in classes}
    inside = [file.parent for file in folder.glob(f"*/{file_name}") if known & set(_class_names(file))]
    # A run's own model comes before its best_pipeline and its averages.
    inside.sort(key=lambda path: (path.name not in ("pipeline", "judge"), path.name))
    return f"; {' and '.join(map(str, inside[:3]))} {'is one' if len(inside) == 1 else 'are'}" if inside else ""


def _class_names(file: Path) -> list[str]:
    """Reads the class in a configuration, which a published one has in a list behind its module; none if broken."""
    try:
        entry = json.loads(file.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return []
    return [part for part in (entry if isinstance(entry, list) else [entry]) if isinstance(part, str)]


def load_pipeline(
    path_or_repo: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    backend: Literal["torch", "compiled", "onnx"] = "torch",
    guide: str | Path | None = None,
) -> LabelledPipeline:
    """Opens a pipeline from a training folder, a published folder or a hub, without running any code that lies there.

    The pipeline is built from this package's own classes; the folder only gives their configurations and safetensors.

    Args:
        path_or_repo: A folder, a hub's `owner/name`, or the name of a model that comes with the package; the package's
            default model if not given.
        revision: Branch, tag or commit of a hub's model.
        device: Where to put the weights; the CPU if not given.
        dtype: What to turn the weights into; float32 if not given, whatever they are stored as.
        backend: What runs a diffusion model's network: `torch`; `compiled` for `torch.compile`, on a GPU with CUDA graphs,
            for few images at a time, where starting operations takes longer than the operations: a minute or more goes
            into the first drawing of each batch size; or `onnx` for ONNX Runtime, which takes all steps in one graph on
            the CPU, see `OnnxDDPMPipeline`.
        guide: Another diffusion model, as `path_or_repo`, from whose predictions guidance leads away, see
            `ConditionalDDPMPipeline`; a folder's own guide if not given. `export_pipeline` publishes it with the rest.

    Raises:
        ValueError: If there is no such model, or the folder is not whole, holds pickled weights, asks for a class that
            is not this package's, or for what the backend cannot do.
        ImportError: If a package that the backend takes is missing.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    folder = find_folder(path_or_repo, revision)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ValueError(
            f"{folder} must be a pipeline's folder with a model_index.json, and there is none"
            f"{'; a judge is opened by `load_judge`' if (folder / 'config.json').is_file() else ''}"
            f"{_models_inside(folder, 'model_index.json', PIPELINE_CLASSES)}."
        )
    index = _read_json(index_file)
    pipeline_class = _class_named(_class_name(index.get("_class_name")), PIPELINE_CLASSES, index_file)
    parameters = inspect.signature(pipeline_class).parameters
    arguments = {name: value for name, value in index.items() if not name.startswith("_")}
    if unknown := sorted(set(arguments) - set(parameters)):
        raise ValueError(
            f"{index_file} must hold arguments of {pipeline_class.__name__} ({', '.join(parameters)}), got"
            f" {', '.join(unknown)} besides; if a newer version of this package wrote it, upgrade."
        )
    for name in [name for name, parameter in parameters.items() if parameter.default is parameter.empty]:
        if name not in arguments:
            raise ValueError(f"{index_file} must say of which class {name!r} is, and does not name it.")
        class_name = _class_name(arguments[name])
        arguments[name] = _load_component(folder / name, class_name, index_file, dtype or torch.float32)
    for name in pipeline_class._optional_components:
        entry = arguments.pop(name, None)
        if guide is None and isinstance(entry, list) and entry and entry[-1] is not None:
            arguments[name] = _load_component(folder / name, _class_name(entry), index_file, dtype or torch.float32)
    if guide is not None:
        arguments["guide"] = _load_guide(guide, pipeline_class, arguments.get("label_names"), dtype)
    pipeline = pipeline_class(**arguments)
    pipeline.register_to_config(_name_or_path=str(path_or_repo or DEFAULT_PIPELINE))
    if device is not None:
        pipeline.to(device)
    if backend == "compiled":
        compile_networks(pipeline)
    if backend == "onnx":
        from iclevr_diffusion.onnx_backend import OnnxDDPMPipeline  # here, as it is slow to import

        return OnnxDDPMPipeline.from_torch(pipeline)
    return pipeline


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
            f"{_models_inside(folder, 'model_index.json', PIPELINE_CLASSES)}."
        )
    index, own_guide = _read_json(index_file), folder / "guide.json"
    if guide is not None:
        guide_facts = training_facts(guide)
    elif "guide" in index and own_guide.is_file():
        guide_facts = _read_json(own_guide)
        if guide_facts.get("conditions") is not None:
            guide_facts["conditions"] = _check_conditions(guide_facts["conditions"], own_guide)
    else:
        guide_facts = {}
    if isinstance(index.get("_class_name"), list):
        record = folder / "training.json"
        training = _read_json(record) if record.is_file() else {}
        conditions = _read_conditions(folder / "conditions.json")
    else:
        folder = folder.resolve().parent
        record, training, conditions = folder / "data.json", {}, None
        if (folder / "config.yaml").is_file():  # else whatever lies there is not a run's
            training = _data_of_run(folder) | {"config": _config_of_run(folder)}
            conditions = _conditions_of_run(folder, index.get("label_names"))
    data_sha256 = training.get("data_sha256")
    is_hash = isinstance(data_sha256, str) and re.fullmatch("[0-9a-f]{64}", data_sha256)
    if data_sha256 is not None and not is_hash:
        raise ValueError(f"{record} must name the images by a SHA-256 of 64 digits, got {data_sha256!r:.100}.")
    config = training.get("config")
    config = config if isinstance(config, dict) else {}
    first = training.get("first_weights")
    first = first if isinstance(first, dict) else {}
    judges = [judge_name(config[key]) for key in ("judge", "evaluator") if isinstance(config.get(key), str)]
    for others in (training.get("teacher_judges"), first.get("judges"), guide_facts.get("judges")):
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


def open_judge(path_or_repo: str | Path) -> LabelClassifier | SmallLabelClassifier:
    """Opens a judge from a folder, a hub or the package, as `load_pipeline` does a pipeline; `load_judge` also checks it.

    Raises:
        ValueError: If there is no such judge, or the folder is not whole or holds another model.
    """
    folder = find_folder(path_or_repo)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(
            f"{folder} must be a judge's folder with a config.json, and there is none"
            f"{_models_inside(folder, 'config.json', JUDGE_CLASSES)}."
        )
    judge_class = _class_named(_class_name(_read_json(config_file).get("_class_name")), JUDGE_CLASSES, config_file)
    return _load_model(judge_class, folder, torch.float32)


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
            f"`pipeline` must be a {_names(PIPELINE_CLASSES)} of this package, got {_full_name(pipeline)}; open the"
            " folder it came from with `load_pipeline`."
        )
    folder = Path(folder).expanduser().absolute()
    with _replacing(folder) as staging:
        pipeline.save_config(staging)
        index_file = staging / "model_index.json"
        index = _read_json(index_file)
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
                _write_guide_facts(staging / "guide.json", came_from)
            if type(component) in MODEL_CLASSES:
                source = Path(inspect.getfile(type(component)))
                index[name] = [source.stem, type(component).__name__]
                _save_model(component, staging / name, dtype, max_shard_size)
                shutil.copyfile(source, staging / name / source.name)
            elif type(component) is _scheduler_class(type(component).__name__):
                index[name] = ["diffusers", type(component).__name__]
                component.save_pretrained(staging / name)
            else:
                raise ValueError(
                    f"`pipeline.{name}` must be a {_names(MODEL_CLASSES)} of this package or a scheduler of diffusers,"
                    f" got {_full_name(component)}; unwrap it, or open the folder it came from with `load_pipeline`."
                )
        _write_json(index_file, index)
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
        raise ValueError(f"`judge` must be a {_names(JUDGE_CLASSES)} of this package, got {_full_name(judge)}.")
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
        index = _read_json(folder / "model_index.json")
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
                files += [f"{name}/{file}" for file in (f"{value[0]}.py", "config.json", *_weights(folder / name))]
    elif (folder / "config.json").is_file():
        files = ["config.json", *_weights(folder)]
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


def _load_guide(
    path_or_repo: str | Path, pipeline_class: type, label_names: Mapping[str, str] | None, dtype: torch.dtype | None
) -> torch.nn.Module:
    """Opens the network of another pipeline of the same labels."""
    if pipeline_class is not ConditionalDDPMPipeline:
        raise ValueError(f"`guide` must be left out for a {pipeline_class.__name__}, got {path_or_repo}.")
    try:
        other = load_pipeline(path_or_repo, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"`guide`: {error}") from None
    if type(other) is not ConditionalDDPMPipeline or other.config.label_names != label_names:
        raise ValueError(
            f"`guide` must be a ConditionalDDPMPipeline of the same labels in the same order, got {path_or_repo}, a"
            f" {type(other).__name__} of {', '.join((other.config.label_names or {}).values()) or 'none'}."
        )
    return other.unet


def compile_networks(pipeline: LabelledPipeline) -> None:
    """Has the networks of a diffusion model compiled when they are first called, and again for every other shape.

    Raises:
        ValueError: If the pipeline is of another kind.
    """
    if type(pipeline) is not ConditionalDDPMPipeline:
        raise ValueError(
            f'`backend` must be "torch" for a {type(pipeline).__name__}, which is called once, got "compiled".'
        )
    # Of many small operations a GPU waits for the next one; a CUDA graph starts all of them at once.
    mode = "reduce-overhead" if pipeline.device.type == "cuda" else "default"
    for network in pipeline.components.values():
        if isinstance(network, torch.nn.Module):
            network.compile(mode=mode, dynamic=False)


def _load_component(
    folder: Path, class_name: str, index_file: Path, dtype: torch.dtype
) -> MultiLabelUNet2DModel | SchedulerMixin:
    scheduler_class = _scheduler_class(class_name)
    if scheduler_class is not None:
        return scheduler_class.from_pretrained(folder)
    return _load_model(_class_named(class_name, MODEL_CLASSES, index_file, "a scheduler of diffusers"), folder, dtype)


def _load_model(model_class: type[ModelMixin], folder: Path, dtype: torch.dtype) -> Any:  # noqa: ANN401 -- that class
    _weights(folder)
    model, loading = model_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    if wrong := sorted([*loading["missing_keys"], *loading["unexpected_keys"]]):
        raise ValueError(
            f"The weights in {folder} must be those of its config.json, but {len(wrong)} tensors are missing or too"
            f" many: {', '.join(wrong[:5])}."
        )
    return torch.nn.Module.to(model, dtype)  # that of diffusers warns of float32 modules, even if there are none


def _weights(folder: Path) -> list[str]:
    """Lists the weight files of a model's folder, with the index of those that are split."""
    index_file = folder / SAFE_WEIGHTS_INDEX_NAME
    if index_file.is_file():
        shards = sorted(set(_read_json(index_file)["weight_map"].values()))
        if foreign := [name for name in shards if not re.fullmatch(r"[\w.-]+\.safetensors", name)]:
            raise ValueError(f"{index_file} must name safetensors files beside it, got {', '.join(foreign)}.")
        files = [*shards, index_file.name]
    else:
        files = [SAFETENSORS_WEIGHTS_NAME]
    if missing := [name for name in files if not (folder / name).is_file()]:
        pickled = sorted(path.name for suffix in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{suffix}"))
        raise ValueError(
            f"{folder} must hold its weights as safetensors, but {', '.join(missing)} is missing"
            + (f"; pickled weights can run code and are not read: {', '.join(pickled)}." if pickled else ".")
        )
    return files


def _class_name(entry: Any) -> str:  # noqa: ANN401 -- whatever a model_index.json holds
    """Reads the name of a class, alone or after that of its module."""
    return str(entry[-1] if isinstance(entry, list) and entry else entry)


def _class_named(name: str, classes: tuple[type, ...], file: Path, besides: str = "") -> type:
    for known in classes:
        if known.__name__ == name:
            return known
    raise ValueError(
        f"{file} asks for the class {name!r}; this package builds {_names(classes)}{f' or {besides}' if besides else ''}."
    )


def _scheduler_class(name: str) -> type[SchedulerMixin] | None:
    return getattr(diffusers.schedulers, name, None) if name.endswith("Scheduler") else None


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
    config = _read_json(folder / "config.json")
    config.pop("_name_or_path", None)  # where the author had it is not published
    _write_json(folder / "config.json", config)


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
        texts["training.json"] = json.dumps(describe_training(training) | _data_of_run(training), indent=2) + "\n"
        index_file = folder / "model_index.json"
        label_names = _read_json(index_file).get("label_names") if index_file.is_file() else None
        conditions = _conditions_of_run(Path(training), label_names)
        if conditions is not None:
            texts["conditions.json"] = json.dumps(conditions) + "\n"
    records = {file: json.loads(text) for file, text in texts.items()}  # as the card will find them later
    texts["README.md"] = render_card(folder, facts, name=name, records=records)
    for file, text in texts.items():
        unfinished = folder / f".{file}.{os.getpid()}"
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, folder / file)
        finally:
            unfinished.unlink(missing_ok=True)
    if training is not None and "conditions.json" not in texts:
        (folder / "conditions.json").unlink(missing_ok=True)  # those of another run


def _data_of_run(output_dir: str | Path) -> dict[str, Any]:
    """Reads which images a run was trained on, in the words of `training.json`; a judge's run does not say it."""
    file = Path(output_dir) / "data.json"
    if not file.is_file():
        return {}
    data = _read_json(file)
    facts = {"data_sha256": data.get("data"), "split": data.get("split")}
    facts |= {key: data[key] for key in ("teacher_judges",) if key in data}  # of a student's teacher
    first = _first_weights_of_run(Path(output_dir))
    return facts | ({"first_weights": {key: first.get(key) for key in _FACTS if key != "conditions"}} if first else {})


def _config_of_run(output_dir: Path) -> Any:  # noqa: ANN401 -- any YAML
    return yaml.safe_load((output_dir / "config.yaml").read_text(encoding="utf-8"))


def _first_weights_of_run(output_dir: Path) -> dict[str, Any]:
    """Reads what `first_weights_facts` said when the run began; nothing of a run that began with none."""
    file, config = output_dir / "first_weights.json", _config_of_run(output_dir)
    # The file may be an earlier run's that had no checkpoint yet.
    begins_with_some = isinstance(config, dict) and config.get("init_from") is not None
    return _read_json(file) if begins_with_some and file.is_file() else {}


def _conditions_of_run(output_dir: Path, label_names: Mapping[str, str] | None) -> list[tuple[str, ...]] | None:
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


def _write_guide_facts(file: Path, came_from: str | Path) -> None:
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
    return _check_conditions(_parse_json(file), file) if file.is_file() else None


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


def _scores_of(folder: Path, file: Path) -> dict[str, Any]:
    """Reads the scores of a published model, and refuses those of other weights, such as those its own round."""
    from iclevr_diffusion.judging import load_judge, weights_sha256  # here, as it is slow to import

    results = _read_json(file)
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


def _parse_json(file: Path) -> Any:  # noqa: ANN401 -- any JSON
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of the JSON, its encoding or its depth
        raise ValueError(f"{file} must be JSON: {error}.") from error


def _read_json(file: Path) -> dict[str, Any]:
    content = _parse_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}.")
    return content


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _names(classes: tuple[type, ...]) -> str:
    return " or ".join(known.__name__ for known in classes)


def _full_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"

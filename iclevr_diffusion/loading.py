import difflib
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from iclevr_diffusion.files import read_json
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

DEFAULT_PIPELINE = "conditional-ddpm-tokens-rendered-4-steps"
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
            f"{models_inside(folder, 'model_index.json', PIPELINE_CLASSES)}."
        )
    index = read_json(index_file)
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
            f"{models_inside(folder, 'config.json', JUDGE_CLASSES)}."
        )
    judge_class = _class_named(_class_name(read_json(config_file).get("_class_name")), JUDGE_CLASSES, config_file)
    return load_model(judge_class, folder, torch.float32)


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


def _similar_models(folder: Path) -> list[Path]:
    """Finds models beside a folder that is missing, of names that it may have been meant to have, the nearest first."""
    models = {
        file.parent.name for name in ("model_index.json", "config.json") for file in folder.parent.glob(f"*/{name}")
    }
    return [folder.with_name(name) for name in difflib.get_close_matches(folder.name, sorted(models), cutoff=0.8)]


def models_inside(folder: Path, file_name: str, classes: Iterable[type]) -> str:
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


def _load_component(
    folder: Path, class_name: str, index_file: Path, dtype: torch.dtype
) -> MultiLabelUNet2DModel | SchedulerMixin:
    known_scheduler = scheduler_class(class_name)
    if known_scheduler is not None:
        return known_scheduler.from_pretrained(folder)
    return load_model(_class_named(class_name, MODEL_CLASSES, index_file, "a scheduler of diffusers"), folder, dtype)


def load_model(model_class: type[ModelMixin], folder: Path, dtype: torch.dtype) -> Any:  # noqa: ANN401 -- that class
    """Opens a network of a known class, if its folder holds just its weights, as safetensors.

    Raises:
        ValueError: If it does not.
    """
    weight_files(folder)
    model, loading = model_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    if wrong := sorted([*loading["missing_keys"], *loading["unexpected_keys"]]):
        raise ValueError(
            f"The weights in {folder} must be those of its config.json, but {len(wrong)} tensors are missing or too"
            f" many: {', '.join(wrong[:5])}."
        )
    return torch.nn.Module.to(model, dtype)  # that of diffusers warns of float32 modules, even if there are none


def weight_files(folder: Path) -> list[str]:
    """Lists the weight files of a model's folder, with the index of those that are split."""
    index_file = folder / SAFE_WEIGHTS_INDEX_NAME
    if index_file.is_file():
        shards = sorted(set(read_json(index_file)["weight_map"].values()))
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
        f"{file} asks for the class {name!r}; this package builds {list_classes(classes)}{f' or {besides}' if besides else ''}."
    )


def scheduler_class(name: str) -> type[SchedulerMixin] | None:
    """Finds a scheduler of diffusers by the name of its class; None if there is none."""
    return getattr(diffusers.schedulers, name, None) if name.endswith("Scheduler") else None


def list_classes(classes: tuple[type, ...]) -> str:
    """Lists classes for an error message."""
    return " or ".join(known.__name__ for known in classes)

"""Scoring of a pipeline: its images of every condition of some lists, over many seeds, as judges see them."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

import iclevr_diffusion
from iclevr_diffusion.conversion import convert_evaluator_checkpoint
from iclevr_diffusion.data import ImageStore, normalize
from iclevr_diffusion.images import file_stem, make_grid, make_strip, save_png
from iclevr_diffusion.models.classifier import LabelClassifier
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier
from iclevr_diffusion.scores import (
    INTERVAL,
    QUICK_BELOW,
    Marks,
    exact_match,
    mark_images,
    score_images,
    score_list,
    score_mean_of_lists,
    top_k_hits,
)

__all__ = [
    "Evaluator",
    "check_judge_labels",
    "exact_match",
    "image_seed",
    "load_judge",
    "top_k_hits",
    "weights_sha256",
]

SCHEMA_VERSION = 1


def load_judge(path: str | Path, label_names: Sequence[str] | None = None) -> LabelClassifier | SmallLabelClassifier:
    """Opens a judge in eval mode and float32, without running any code that lies beside its weights.

    Args:
        path: A folder with `config.json` and safetensors weights, a hub's `owner/name`, the name of a judge that comes
            with the package, or the course's `checkpoint.pth`.
        label_names: Names that the judge must know, in this order; None takes the judge as it is.

    Raises:
        ValueError: If there is no such judge, its weights are not those of its configuration, or it judges other labels.
    """
    from iclevr_diffusion.hub import open_judge  # here, as the hub's module opens judges too

    judge = convert_evaluator_checkpoint(path) if Path(path).suffix == ".pth" else open_judge(path)
    if label_names is not None:
        check_judge_labels(judge, label_names, name=str(path))
    return judge


def check_judge_labels(judge: nn.Module, label_names: Sequence[str], *, name: str = "The judge") -> None:
    """Refuses a judge whose outputs stand for other objects than `label_names`, in that order."""
    if label_names is None:
        raise ValueError("`label_names` must be the names that the judge must know, in their order, got None.")
    if judge.config.label_names is None:
        raise ValueError(f"{name} does not say which labels it judges; make it with `label_names` and save it again.")
    theirs, ours = list(judge.config.label_names), list(label_names)
    if theirs == ours:
        return
    if sorted(theirs) == sorted(ours):
        difference = "the same names in another order"
    else:
        difference = f"{len(theirs)} names, of which {sorted(set(theirs) ^ set(ours))} stand in one of the two only"
    raise ValueError(
        f"{name} judges other labels than the pipeline's {len(ours)}: it has {difference}."
        " Take a judge trained with the pipeline's `label_names`."
    )


def weights_sha256(*models: nn.Module) -> str:
    """Hashes the parameters and buffers of models by name, type, shape and value, however their files are cut."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def image_seed(list_name: str, position: int, replicate: int) -> int:
    """Gives the seed of one image of an evaluation: the same for any batch, order or number of processes."""
    text = json.dumps([list_name, position, replicate])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Unit(NamedTuple):
    """One image of an evaluation."""

    list_name: str
    position: int
    replicate: int


class Evaluator:
    """Draws every condition of some lists many times, lets judges look, and writes down what they see.

    A folder belongs to one setting. What has been drawn is kept in `records/`, a line for each batch, so that a
    stopped evaluation goes on where it was and more seeds can be added; an evaluation of other settings is refused.
    Several processes (`accelerate launch`) share the batches and must see the same folder. Images are judged as they
    are saved, with 8 bits a channel.

    Args:
        pipeline: The pipeline to be scored.
        judges: Networks with one logit a label, by the names they get in the results.
        lists: Lists of conditions by name; a condition is the labels of one image. Any spelling that the pipeline
            accepts will do, but tensors and arrays of weights other than 0 and 1.
        output_dir: Folder for records, images and results.
        num_seeds: How many images are drawn of each condition.
        num_inference_steps: Steps of the scheduler; None takes the pipeline's own.
        guidance_scale: Guidance scale, 1 is off; None takes the pipeline's own.
        micro_batch_size: Images that go through the network at once.
        pipeline_name: What the results call the pipeline.
        judges_used_in_training: Names of the judges that also taught the pipeline, whose scores are not independent.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        judges: Mapping[str, nn.Module],
        lists: Mapping[str, Sequence[Sequence[str | int]] | Tensor | np.ndarray],
        output_dir: str | Path,
        *,
        num_seeds: int = 30,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        micro_batch_size: int = 64,
        pipeline_name: str = "",
        judges_used_in_training: Sequence[str] = (),
    ) -> None:
        if num_inference_steps is None:
            num_inference_steps = pipeline.config.default_num_inference_steps
        counts = {
            "num_seeds": num_seeds,
            "num_inference_steps": num_inference_steps,
            "micro_batch_size": micro_batch_size,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"`{name}` must be at least 1, got {count}.")
        if not judges:
            raise ValueError("`judges` must hold at least one judge, got none.")
        if not lists:
            raise ValueError("`lists` must hold at least one list of conditions, got none.")
        strangers = sorted(set(judges_used_in_training) - set(judges))
        if strangers:
            raise ValueError(
                f"`judges_used_in_training` must name some of the judges {list(judges)}, got {strangers}."
            )
        self.class_labels, self.lists = {}, {}
        vocabulary = pipeline.vocabulary
        for name, conditions in lists.items():
            if len(conditions) == 0:
                raise ValueError(f"`lists[{name!r}]` must hold at least one condition, got an empty list.")
            try:
                class_labels = pipeline.encode_labels(conditions).cpu()
            except ValueError as error:
                raise ValueError(f"`lists[{name!r}]`: {error}") from None
            if (class_labels.sum(dim=1) == 0).any():
                raise ValueError(
                    f"`lists[{name!r}]` must name at least one label in every condition, got an empty one."
                )
            if not torch.isin(class_labels, torch.tensor([0.0, 1.0])).all():
                raise ValueError(f"`lists[{name!r}]` must hold zeros and ones, got {class_labels.max():g} at most.")
            self.class_labels[name] = class_labels
            if isinstance(conditions, (Tensor, np.ndarray)):
                self.lists[name] = vocabulary.decode(class_labels)
            else:  # in the caller's order
                self.lists[name] = [[vocabulary.names[vocabulary.index(label)] for label in row] for row in conditions]
        for name, judge in judges.items():
            check_judge_labels(judge, pipeline.vocabulary.names, name=f"`judges[{name!r}]`")
            if judge.config.image_size != pipeline.unet.config.sample_size:
                raise ValueError(
                    f"`judges[{name!r}]` must judge {pipeline.unet.config.sample_size}-pixel images like the pipeline's,"
                    f" but takes {judge.config.image_size}; train a judge at that size."
                )
        self.state = PartialState()
        self.pipeline = pipeline
        self.judges = {name: judge.to(pipeline.device).float().eval() for name, judge in judges.items()}
        self.output_dir = Path(output_dir)
        self.num_seeds = num_seeds
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = pipeline.config.default_guidance_scale if guidance_scale is None else guidance_scale
        self.micro_batch_size = micro_batch_size
        self.pipeline_name = pipeline_name or type(pipeline).__name__
        self.judges_used_in_training = list(judges_used_in_training)
        self.settings = self._settings()
        self._check_output_dir()

    def run(self, store: ImageStore | None = None, *, no_store_reason: str = "no images were given") -> dict[str, Any]:
        """Draws what is missing, scores everything, and writes `results.json`, grids and strips.

        Args:
            store: Real images whose held-out part shows how well the judges see; the same vocabulary is needed.
            no_store_reason: What the results say if there is no store.

        Returns:
            The contents of `results.json`; on other than the main process too.
        """
        held_out = {"missing": no_store_reason} if store is None else self.judge_held_out(store)
        self.draw()
        results = self.results(held_out)
        if self.state.is_main_process:
            _write_text(self.output_dir / "results.json", json.dumps(results, indent=2) + "\n")
            for list_name in self.lists:
                self._write_pictures(list_name)
        self.state.wait_for_everyone()
        return results

    def draw(self) -> None:
        """Draws and judges all images that the folder's records do not hold yet."""
        batches = self._pending_batches()
        if self.state.is_main_process:
            _write_text(self.output_dir / "records" / "settings.json", json.dumps(self.settings, indent=2) + "\n")
        self.state.wait_for_everyone()
        with self.state.split_between_processes(batches) as own_batches:
            for batch in tqdm(own_batches, desc="Evaluating", unit="batch", disable=not self.state.is_main_process):
                self._draw_batch(batch)
        self.state.wait_for_everyone()

    def results(self, held_out: dict[str, Any]) -> dict[str, Any]:
        """Scores the drawn images and says how, with what and on what they were made.

        `environment` is what the last of them were drawn on; if it changed meanwhile, `environments` lists all.
        """
        logits, seconds_per_image = self._read_logits()
        environments = self._drawn_on()
        names = self.pipeline.vocabulary.names
        scores: dict[str, Any] = {}
        for judge_name in self.judges:
            seen = held_out.get(judge_name)
            marks = {
                list_name: mark_images(logits[judge_name][list_name], asked)
                for list_name, asked in self.class_labels.items()
            }
            lists = {list_name: score_list(mark, names, seen) for list_name, mark in marks.items()}
            scores[judge_name] = {"lists": lists}
            if len(lists) > 1:
                together = Marks(*(np.concatenate(parts) for parts in zip(*marks.values(), strict=True)))
                scores[judge_name]["all_lists"] = score_list(together, names, seen)
                scores[judge_name]["mean_of_lists"] = mean = score_mean_of_lists([*marks.values()])
                ceilings = [score.get("held_out_top_k_same_num_objects") for score in lists.values()]
                if None not in ceilings:
                    mean["held_out_top_k_same_num_objects"] = sum(ceilings) / len(ceilings)
        return {
            "schema_version": SCHEMA_VERSION,
            "quick": self.num_seeds < QUICK_BELOW,
            "pipeline": self.pipeline_name,
            "num_seeds": self.num_seeds,
            "settings": self.settings,
            "judges_used_in_training": self.judges_used_in_training,
            "interval": INTERVAL,
            "scores": scores,
            "held_out_images": held_out,
            "images_per_second_per_process": 1 / seconds_per_image,
            "environment": environments[-1],
        } | ({"environments": environments} if len(environments) > 1 else {})

    def judge_held_out(self, store: ImageStore) -> dict[str, Any]:
        """Gives each judge's own score on the held-out images of `store`, in all and by number of objects."""
        if store.vocabulary != self.pipeline.vocabulary:
            raise ValueError("`store` must have the labels of the pipeline, in the same order; it has others.")
        indices = store.indices("held-out")
        if len(indices) == 0:
            return {"missing": "the data have no held-out scene"}
        logits = self._judge(store.pixel_values[indices])
        class_labels = torch.from_numpy(np.asarray(store.class_labels[indices])).float()
        scores = {name: score_images(judge_logits, class_labels) for name, judge_logits in logits.items()}
        return {"data_sha256": store.sha256} | scores

    def _settings(self) -> dict[str, Any]:
        networks = [model for _, model in sorted(self.pipeline.components.items()) if isinstance(model, nn.Module)]
        scheduler = json.loads(self.pipeline.scheduler.to_json_string())
        scheduler.pop("_diffusers_version", None)
        return {
            "pipeline": {"class": type(self.pipeline).__name__, "weights_sha256": weights_sha256(*networks)},
            "judges": {
                name: {"class": type(judge).__name__, "weights_sha256": weights_sha256(judge)}
                for name, judge in self.judges.items()
            },
            "lists": self.lists,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "scheduler": scheduler,
            "micro_batch_size": self.micro_batch_size,
            "dtype": str(self.pipeline.dtype).removeprefix("torch."),
            "device": self.pipeline.device.type,
            "image_seeds": "first 63 bits of SHA-256 of [list, position, replicate] as JSON",
        }

    def _check_output_dir(self) -> None:
        folder = self.output_dir / "records"
        if not any(folder.glob("process-*.jsonl")):
            return
        there = _flatten(json.loads((folder / "settings.json").read_text(encoding="utf-8")))
        here = _flatten(self.settings)
        different = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
        if different:
            key = different[0]
            was, now = (str(settings.get(key))[:60] for settings in (there, here))
            raise ValueError(
                f"`output_dir` {self.output_dir} holds an evaluation of other settings ({', '.join(different[:5])}):"
                f" {key} is {was} there and {now} here. Take another folder, or delete that one."
            )

    def _pending_batches(self) -> list[list[Unit]]:
        """Cuts what is still to be drawn into batches, the first replicate, whose images are kept, by itself."""
        recorded = {unit for record in self._read_records() for unit in record["units"]}
        pending: tuple[list[Unit], list[Unit]] = ([], [])
        for replicate in range(self.num_seeds):
            for list_name, conditions in self.lists.items():
                for position in range(len(conditions)):
                    unit = Unit(list_name, position, replicate)
                    is_drawn = unit in recorded and (
                        replicate > 0 or all(self._image_file(unit, kind).is_file() for kind in ("images", "strips"))
                    )
                    if not is_drawn:
                        pending[replicate > 0].append(unit)
        size = self.micro_batch_size
        return [part[start : start + size] for part in pending for start in range(0, len(part), size)]

    def _draw_batch(self, batch: list[Unit]) -> None:
        keeps_images = batch[0].replicate == 0
        begin = time.perf_counter()
        output = self.pipeline(
            [self.lists[unit.list_name][unit.position] for unit in batch],
            seeds=[image_seed(*unit) for unit in batch],
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            micro_batch_size=self.micro_batch_size,
            num_states=min(10, self.num_inference_steps) if keeps_images else 0,
            output_type="np",
        )
        seconds = time.perf_counter() - begin
        if not np.isfinite(output.images).all():
            raise ValueError("The pipeline drew images that are not finite; check its weights, or use dtype float32.")
        pixels = _to_uint8(output.images)
        logits = self._judge(pixels.transpose(0, 3, 1, 2))
        if keeps_images:
            states = [_to_uint8(state) for state in output.states] + [pixels]
            for row, unit in enumerate(batch):
                metadata = {
                    "labels": ", ".join(self.lists[unit.list_name][unit.position]),
                    "seed": image_seed(*unit),
                    "model": self.pipeline_name,
                    "num_inference_steps": self.num_inference_steps,
                    "guidance_scale": self.guidance_scale,
                    "Software": f"iclevr_diffusion {iclevr_diffusion.__version__}",
                }
                save_png(Image.fromarray(pixels[row]), self._image_file(unit, "images"), metadata)
                save_png(
                    make_strip([Image.fromarray(state[row]) for state in states]),
                    self._image_file(unit, "strips"),
                    metadata,
                )
        # float(str(x)) is the shortest decimal of a float32, so that the numbers come back to the bit.
        record = {
            "units": batch,
            "time": time.time(),
            "environment": self._environment,
            "seconds": seconds,
            "logits": {name: [[float(str(x)) for x in row] for row in rows.numpy()] for name, rows in logits.items()},
        }
        file = self.output_dir / "records" / f"process-{self.state.process_index:05d}.jsonl"
        _append_line(file, json.dumps(record))

    @torch.no_grad()
    def _judge(self, pixel_values: np.ndarray) -> dict[str, Tensor]:
        """Gives each judge's logits (N, num_classes) on the CPU for uint8 images (N, 3, H, W)."""
        logits: dict[str, list[Tensor]] = {name: [] for name in self.judges}
        size = self.micro_batch_size
        for start in range(0, len(pixel_values), size):
            images = torch.from_numpy(np.ascontiguousarray(pixel_values[start : start + size]))
            num_real = len(images)
            # Kernels round by batch shape: one shape for every batch makes the logits independent of the batches.
            images = torch.cat([images, images.new_zeros(size - num_real, *images.shape[1:])])
            images = normalize(images.to(self.pipeline.device))
            for name, judge in self.judges.items():
                logits[name].append(judge(images).logits[:num_real].float().cpu())
        return {name: torch.cat(parts) for name, parts in logits.items()}

    @cached_property
    def _environment(self) -> dict[str, Any]:
        """Names machine, versions and, where the package lies in a checkout, its commit and whether it was changed."""
        checkout = Path(__file__).resolve().parents[1]
        commit = None
        if (checkout / ".git").exists() and shutil.which("git"):
            describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
            command = ["git", "-C", str(checkout), *describe]
            commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
        device = self.pipeline.device
        packages = ("torch", "diffusers", "accelerate", "transformers", "numpy")
        return {
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
            "num_cpus": os.cpu_count(),
            "num_processes": self.state.num_processes,
            "python": platform.python_version(),
            "versions": {"iclevr_diffusion": iclevr_diffusion.__version__}
            | {name: importlib.metadata.version(name) for name in packages},
            "git_commit": commit,
        }

    def _drawn_on(self) -> list[dict[str, Any]]:
        """Lists what the images were drawn on, each environment once, the one used last at the end."""
        environments: list[dict[str, Any]] = []
        for record in sorted(self._read_records(), key=lambda record: record["time"]):
            if all(replicate >= self.num_seeds for _, _, replicate in record["units"]):
                continue  # the folder may hold more seeds than are asked for now
            environments = [known for known in environments if known != record["environment"]]
            environments.append(record["environment"])
        return environments

    def _read_records(self) -> Iterator[dict[str, Any]]:
        for file in sorted((self.output_dir / "records").glob("process-*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # cut off when the process was stopped; its images are drawn again
                yield record | {"units": [Unit(*unit) for unit in record["units"]]}

    def _read_logits(self) -> tuple[dict[str, dict[str, Tensor]], float]:
        """Gathers the records as logits (num_conditions, num_seeds, num_classes) by judge and list."""
        num_classes = len(self.pipeline.vocabulary)
        logits = {
            judge_name: {
                list_name: torch.full((len(conditions), self.num_seeds, num_classes), torch.nan)
                for list_name, conditions in self.lists.items()
            }
            for judge_name in self.judges
        }
        total_seconds, num_images = 0.0, 0
        for record in self._read_records():
            total_seconds, num_images = total_seconds + record["seconds"], num_images + len(record["units"])
            for row, (list_name, position, replicate) in enumerate(record["units"]):
                if replicate < self.num_seeds:  # the folder may hold more seeds than are asked for now
                    for judge_name, rows in record["logits"].items():
                        logits[judge_name][list_name][position, replicate] = torch.tensor(rows[row])
        return logits, total_seconds / max(num_images, 1)

    def _image_file(self, unit: Unit, kind: str) -> Path:
        stem = file_stem(unit.position, self.lists[unit.list_name][unit.position])
        return self.output_dir / kind / unit.list_name / f"{stem}.png"

    def _write_pictures(self, list_name: str) -> None:
        conditions = self.lists[list_name]
        units = [Unit(list_name, position, 0) for position in range(len(conditions))]
        metadata = {"labels": conditions, "model": self.pipeline_name}
        images = [_open_image(self._image_file(unit, "images")) for unit in units]
        grid = make_grid(images, ["\n".join(labels) for labels in conditions])
        save_png(grid, self.output_dir / f"{list_name}_grid.png", metadata)
        strips = [_open_image(self._image_file(unit, "strips")) for unit in units]
        grid = make_grid(strips, [", ".join(labels) for labels in conditions], columns=2)
        save_png(grid, self.output_dir / f"{list_name}_strips.png", metadata)


def _to_uint8(images: np.ndarray) -> np.ndarray:
    return (images * 255).round().astype(np.uint8)


def _open_image(file: Path) -> Image.Image:
    with Image.open(file) as image:  # a list may be longer than the number of files that can be open at once
        return image.convert("RGB")


def _processor() -> str:
    """Names the model of the CPU where Linux tells it, else its kind."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _write_text(path: Path, text: str) -> None:
    """Writes a file that is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _append_line(path: Path, line: str) -> None:
    """Adds a line to a file whose last line may have been cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())

"""Scoring of a pipeline: its images of every condition of some protocols, as judges see them."""

import copy
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

import iclevr_diffusion
from iclevr_diffusion.call_options import call_options, request_lines, request_text, takes
from iclevr_diffusion.cost import measure_cost
from iclevr_diffusion.data import ImageStore
from iclevr_diffusion.drawings import Drawings, Unit
from iclevr_diffusion.environment import describe_environment
from iclevr_diffusion.files import write_text
from iclevr_diffusion.images import file_stem, make_grid, make_strip, save_png, to_image
from iclevr_diffusion.inception import InceptionFeatures
from iclevr_diffusion.judging import Reading, check_judge_labels, read_images, weights_sha256
from iclevr_diffusion.lift import NUM_DRAWS, choose_best, measure_lift
from iclevr_diffusion.protocols import MATCHED, Protocol, matched_protocol
from iclevr_diffusion.reference import MIN_COMPARED, Reference
from iclevr_diffusion.scores import (
    INTERVAL,
    ceiling,
    is_quick,
    negation_ceiling,
    score_conditions,
    score_mean,
    score_negation,
)

SCHEMA_VERSION = 2

RESERVED_OPTIONS = frozenset(
    {"class_labels", "num_images", "seeds", "generator", "latents", "micro_batch_size", "output_type", "return_dict"}
)

NUM_PICTURED = 64  # conditions of a protocol, at most, that are shown in grids and strips
RANGE_TOLERANCE = 1e-3  # by which images may leave [0, 1]
NUM_SAMPLES = 8  # images in the row that stands for the pipeline beside others

# Images of each condition: of a fixed list, of a hundred conditions or more that stand for others, and of a thousand.
DEFAULT_NUM_SEEDS = {"replicates": 30, "conditions": 5, "many conditions": 1}


def image_seed(protocol: str, labels: Sequence[str], replicate: int, occurrence: int = 0) -> int:
    """Gives the seed of one image of an evaluation: the same for any batch, order or number of processes.

    Args:
        protocol: Name of the protocol, or of the one that it is seeded as.
        labels: The condition, in any order.
        replicate: Which image of the condition it is, from 0.
        occurrence: How often the protocol had this condition before, where it has conditions several times.
    """
    text = json.dumps([protocol, sorted(labels), replicate] + ([occurrence] if occurrence else []))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Evaluator:
    """Draws every condition of some protocols, lets judges look, and writes down what they see.

    A folder belongs to one pipeline and one way of drawing. What has been drawn is kept in `drawings/`, so that a
    stopped evaluation goes on where it was, and protocols, seeds and judges can be added without drawing anything
    twice; an evaluation of another pipeline or way is refused. Several processes (`accelerate launch`) share the
    drawing and must see the same folder. Images are judged as they are kept, with 8 bits a channel.

    A pipeline of any kind will do that is called as `pipe(class_labels, seeds=..., micro_batch_size=...,
    output_type="np")` and has a `vocabulary`. One without a vocabulary is called with `num_images` in the place of
    labels, and only compared with real images.

    Args:
        pipeline: The pipeline to be scored.
        judges: Networks with one logit a label, by the names they get in the results.
        protocols: What is drawn; for a pipeline without labels the protocol of the held-out images alone.
        output_dir: Folder for drawings, records, pictures and results.
        num_seeds: How many images are drawn of each condition; by default 30 where these are resampled, 5 where
            conditions are, and 1 of a thousand conditions or more. Of the held-out images' labels, which come as often
            as there, it is always 1.
        options: Further arguments of the pipeline's call, such as `num_inference_steps`; the pipeline's own defaults
            if not given.
        micro_batch_size: Images that go through the network at once.
        pipeline_name: What the results call the pipeline.
        judges_used_in_training: Names of the judges that also taught the pipeline, whose scores are not independent;
            there must be others. The judges that `training_facts` names are among them by themselves.
        training_facts: What the pipeline was trained on, as `iclevr_diffusion.provenance.training_facts` gives it.
        inception: `InceptionFeatures`, where FID and KID are wanted beside the distances in the judges' features.
        best_of: From how many images of a condition the pipeline's own losses pick one, see `measure_lift`; the picked
            ones are scored beside all of them. The number of images of each condition must be a multiple of it.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        judges: Mapping[str, nn.Module],
        protocols: Sequence[Protocol],
        output_dir: str | Path,
        *,
        num_seeds: int | None = None,
        options: Mapping[str, Any] | None = None,
        micro_batch_size: int = 64,
        pipeline_name: str = "",
        judges_used_in_training: Sequence[str] = (),
        training_facts: Mapping[str, Any] | None = None,
        inception: InceptionFeatures | None = None,
        best_of: int | None = None,
    ) -> None:
        for name, count in {"num_seeds": num_seeds, "micro_batch_size": micro_batch_size}.items():
            if count is not None and count < 1:
                raise ValueError(f"`{name}` must be at least 1, got {count}.")
        if not judges:
            raise ValueError("`judges` must hold at least one judge, got none.")
        if not protocols:
            raise ValueError("`protocols` must hold at least one protocol, got none.")
        if repeated := [name for name, n in Counter(protocol.name for protocol in protocols).items() if n > 1]:
            raise ValueError(f"`protocols` must have distinct names, got {repeated[0]!r} more than once.")
        facts = {"conditions": None, "data_sha256": None, "split": None, "judges": None} | dict(training_facts or {})
        if strangers := sorted(set(judges_used_in_training) - set(judges)):
            raise ValueError(
                f"`judges_used_in_training` must name some of the judges {list(judges)}, got {strangers}."
            )
        used = {*judges_used_in_training} | (set(facts["judges"] or ()) & judges.keys())
        if used == judges.keys():
            raise ValueError(
                f"`judges` must hold one that had no part in the training, got {sorted(used)} alone, which had; a judge"
                " that taught a pipeline never scores it alone. Name another one beside it."
            )
        self.state = PartialState()
        self.pipeline = pipeline
        self.vocabulary = getattr(pipeline, "vocabulary", None)
        if self.vocabulary is None and not takes(pipeline, "num_images"):
            raise ValueError(
                f"`pipeline` must draw images of labels or `num_images` of them, got a {type(pipeline).__name__}; one"
                " that maps images is looked at with iclevr-picture translation."
            )
        self.protocols = {protocol.name: protocol for protocol in protocols}
        self._check_protocols()
        self._check_judges(judges)
        self._check_training_conditions(facts["conditions"])
        self.judges = {name: copy.deepcopy(judge).to(pipeline.device).float().eval() for name, judge in judges.items()}
        self.output_dir = Path(output_dir)
        self.num_seeds = {
            name: 1 if name == MATCHED else num_seeds or _default_num_seeds(protocol)
            for name, protocol in self.protocols.items()
        }
        self.options = self._with_defaults(options or {})
        self.micro_batch_size = micro_batch_size
        self.pipeline_name = pipeline_name or type(pipeline).__name__
        self.judges_used_in_training = [name for name in judges if name in used]
        self.facts = facts
        self.inception = inception
        self.best_of = best_of
        self._check_best_of()
        self.drawings = Drawings(self.output_dir / "drawings")
        self.settings = self._settings()
        self._check_output_dir()

    def run(self, store: ImageStore | None = None, *, no_store_reason: str = "no images were given") -> dict[str, Any]:
        """Draws what is missing, scores everything, and writes `results.json`, `records.parquet` and pictures.

        Args:
            store: Real images, whose held-out part shows how well the judges see and what drawn images should be
                like; the same vocabulary is needed.
            no_store_reason: What the results say if there is no store.

        Returns:
            The contents of `results.json`; on other than the main process too.
        """
        self._check_store(store)
        path = self.output_dir / "results.json"
        with self._locked_folder():
            self.draw()
            if self.state.is_main_process:
                results, pictures = self._results(store, no_store_reason)
                write_text(path, json.dumps(results, indent=2) + "\n")
                for name, (picture, metadata) in (pictures | self._pictures()).items():
                    save_png(picture, self.output_dir / name, metadata)
            self.state.wait_for_everyone()
        return json.loads(path.read_text(encoding="utf-8"))

    def draw(self) -> None:
        """Draws all images that the folder does not hold yet."""
        batches = self._pending_batches()
        if self.state.is_main_process:
            write_text(self.output_dir / "settings.json", json.dumps(self.settings, indent=2) + "\n")
        self.state.wait_for_everyone()
        with self.state.split_between_processes(batches) as own_batches:
            for batch in tqdm(own_batches, desc="Drawing", unit="batch", disable=not self.state.is_main_process):
                self._draw_batch(batch)
        self.state.wait_for_everyone()
        if lost := self._pending_batches():
            raise ValueError(
                f"{self.drawings.folder} must hold every image that was drawn, but {sum(map(len, lost))} are not there;"
                " give all processes the same folder, leave its files alone, and call again."
            )

    def _results(self, store: ImageStore | None, no_store_reason: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Judges and scores the drawn images; returns the contents of `results.json`, and pictures by file name."""
        pixel_values, readings = self._judge()
        self._write_records(readings)
        lifts = self._lifts()
        held_out = distribution = {"missing": no_store_reason}
        pictures: dict[str, Any] = {}
        if store is not None and len(store.indices("held-out")) == 0:
            held_out = distribution = {"missing": "the data have no held-out scene"}
        elif store is not None:
            reference = Reference(store, self.judges, self.inception)
            held_out = reference.scores()
            distribution, pictures = self._compare_with(reference, pixel_values, readings)
        protocols: dict[str, Any] = {}
        if self.vocabulary is not None:
            protocols = {
                name: self._score(protocol, readings[name], held_out.get("judges", {}), lifts.get(name))
                for name, protocol in self.protocols.items()
            }
        results = {
            "schema_version": SCHEMA_VERSION,
            "pipeline": {
                "name": self.pipeline_name,
                "class": type(self.pipeline).__name__,
                "weights_sha256": self.settings["weights_sha256"],
                "num_parameters": self._num_parameters,
                "label_names": None if self.vocabulary is None else list(self.vocabulary.names),
                "data_sha256": self.facts["data_sha256"],
                "trained_on_held_out": None if self.facts["split"] is None else self.facts["split"] == "all",
            },
            "settings": {key: value for key, value in self.settings.items() if key not in ("protocols", "label_names")}
            | {
                "judges": {
                    name: {
                        "class": type(judge).__name__,
                        "weights_sha256": weights_sha256(judge),
                        "threshold": judge.config.threshold,
                    }
                    for name, judge in self.judges.items()
                }
            }
            | ({"best_of": {"num_candidates": self.best_of, "num_draws": NUM_DRAWS}} if self.best_of else {}),
            # The labels of held-out images come as often as there, however few these are.
            "quick": any(part["quick"] for name, part in protocols.items() if name != MATCHED),
            "judges_used_in_training": self.judges_used_in_training,
            "protocols": protocols,
        }
        if {"test", "new_test"} <= protocols.keys():
            results["mean_of_test_and_new_test"] = {
                judge: self._score_mean(judge, readings, protocols) for judge in self.judges
            }
        environments = self._drawn_on()
        results |= {
            "held_out_images": held_out,
            "distribution": distribution,
            "cost": self._cost(),
            "interval": INTERVAL,
            "environment": environments[-1],
        }
        return results | ({"environments": environments} if len(environments) > 1 else {}), pictures

    def _judge(self) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Reading]]]:
        """Reads all drawn images of the protocols.

        Returns:
            By protocol the images of those whose images are compared with each other, uint8
            (num_conditions * num_seeds, C, H, W), and what each judge makes of all of them, in the same order.
        """
        logits: dict[tuple[str, str], Tensor] = {}
        features: dict[tuple[str, str], Tensor] = {}
        pixel_values: dict[str, np.ndarray] = {}
        for units, images, _ in tqdm(self.drawings.batches(self._is_wanted), desc="Judging", unit="batch"):
            rows: dict[str, tuple[list[int], list[int]]] = {}
            for row, unit in enumerate(units):
                here, there = rows.setdefault(unit.protocol, ([], []))
                here.append(row)
                there.append(unit.position * self.num_seeds[unit.protocol] + unit.replicate)
            for judge_name, judge in self.judges.items():
                reading = read_images(judge, images, batch_size=self.micro_batch_size)
                for name, (here, there) in rows.items():
                    num_images = len(self.protocols[name]) * self.num_seeds[name]
                    for found, gathered in ((reading.logits, logits), (reading.features, features)):
                        if (name, judge_name) not in gathered:
                            gathered[name, judge_name] = torch.full((num_images, found.shape[1]), torch.nan)
                        gathered[name, judge_name][there] = found[here]
            for name, (here, there) in rows.items():
                if self.protocols[name].resampled == "replicates" or name == MATCHED:
                    shape = (len(self.protocols[name]) * self.num_seeds[name], *images.shape[1:])
                    pixel_values.setdefault(name, np.empty(shape, np.uint8))[there] = images[here]
        readings = {
            name: {judge: Reading(logits[name, judge], features[name, judge]) for judge in self.judges}
            for name in self.protocols
        }
        return pixel_values, readings

    def _lifts(self) -> dict[str, Tensor]:
        """Measures the lift of all images that are picked from (num_conditions, num_seeds), by protocol."""
        if self.best_of is None:
            return {}
        lifts = {
            name: torch.full((len(protocol), self.num_seeds[name]), torch.nan)
            for name, protocol in self.protocols.items()
            if name != MATCHED
        }
        wanted = self.drawings.batches(lambda unit: self._is_wanted(unit) and unit.protocol in lifts)
        for units, images, _ in tqdm(wanted, desc="Measuring lifts", unit="batch"):
            requests = [self.protocols[unit.protocol].request(unit.position) for unit in units]
            measured = measure_lift(self.pipeline, images, requests, batch_size=self.micro_batch_size)
            for unit, lift in zip(units, measured, strict=True):
                lifts[unit.protocol][unit.position, unit.replicate] = lift
        return lifts

    def _score(
        self,
        protocol: Protocol,
        readings: Mapping[str, Reading],
        held_out: Mapping[str, Any],
        lifts: Tensor | None,
    ) -> dict[str, Any]:
        class_labels = self.pipeline.encode_labels(protocol.conditions).cpu()
        num_seeds = self.num_seeds[protocol.name]
        seen = None
        if self.facts["conditions"] is not None:
            known = {frozenset(labels) for labels in self.facts["conditions"]}
            seen = torch.tensor([frozenset(labels) in known for labels in protocol.conditions])
        num_objects = class_labels.sum(dim=1).long().numpy()
        judges = {}
        for name, reading in readings.items():
            logits = reading.logits.unflatten(0, (len(protocol), num_seeds))
            how = {"threshold": self.judges[name].config.threshold, "resampled": protocol.resampled}
            judges[name] = score_conditions(
                logits,
                class_labels,
                label_names=self.vocabulary.names,
                seen=seen,
                ceiling=ceiling(held_out[name], num_objects) if name in held_out else None,
                **how,
            )
            if protocol.negated is not None:
                negated = self.vocabulary.encode(protocol.negated)
                real = negation_ceiling(held_out[name], num_objects) if name in held_out else None
                judges[name]["negation"] = score_negation(logits, class_labels, negated, **how) | {"ceiling": real}
            if lifts is not None:
                picked = logits[torch.arange(len(protocol))[:, None], choose_best(lifts, self.best_of)]
                best = score_conditions(picked, class_labels, label_names=self.vocabulary.names, **how)["all"]
                judges[name]["best_of"] = {"num_candidates": self.best_of, "all": best}
        return {
            "sha256": protocol.sha256,
            "num_conditions": len(protocol),
            "num_replicates": num_seeds,
            "num_images": len(protocol) * num_seeds,
            "quick": is_quick(len(protocol), num_seeds),
            "resampled": protocol.resampled,
            **({} if protocol.seeded_as is None else {"seeded_as": protocol.seeded_as}),
            "judges": judges,
        }

    def _score_mean(
        self, judge: str, readings: Mapping[str, Mapping[str, Reading]], protocols: Mapping[str, Any]
    ) -> dict[str, Any]:
        parts, ceilings = [], []
        for name in ("test", "new_test"):
            protocol = self.protocols[name]
            logits = readings[name][judge].logits.unflatten(0, (len(protocol), self.num_seeds[name]))
            parts.append((logits, self.pipeline.encode_labels(protocol.conditions).cpu()))
            ceilings.append(protocols[name]["judges"][judge].get("ceiling"))
        mean = score_mean(parts, threshold=self.judges[judge].config.threshold)
        if None not in ceilings:
            mean["ceiling"] = {key: sum(part[key] for part in ceilings) / len(ceilings) for key in ceilings[0]}
        return mean

    def _compare_with(
        self,
        reference: Reference,
        pixel_values: Mapping[str, np.ndarray],
        readings: Mapping[str, Mapping[str, Reading]],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        if MATCHED not in self.protocols:
            return {"missing": f"the protocol {MATCHED!r} was not drawn"}, {}
        if reference.num_compared < MIN_COMPARED:
            reason = f"{reference.num_compared} held-out images have labels that training images have too"
            return {"missing": f"only {reason}, and {MIN_COMPARED} are needed"}, {}
        trained_on = None
        if self.facts["data_sha256"] is not None:
            is_same = self.facts["data_sha256"] == reference.store.sha256
            trained_on = (self.facts["split"] or "train") if is_same else "others"
        distribution, nearest = reference.distribution(pixel_values[MATCHED], readings[MATCHED], trained_on=trained_on)
        if self.vocabulary is not None:
            names = sorted(pixel_values)  # so that sums do not depend on the order in which they were drawn
            conditions = [
                frozenset(labels)
                for name in names
                for labels in self.protocols[name].conditions
                for _ in range(self.num_seeds[name])
            ]
            distribution["diversity"] = reference.diversity(
                conditions,
                np.concatenate([pixel_values[name] for name in names]),
                {judge: torch.cat([readings[name][judge].features for name in names]) for judge in self.judges},
            )
        return distribution, {"nearest.png": (nearest, {"model": self.pipeline_name})}

    def _cost(self) -> dict[str, Any]:
        """Says how fast images are drawn and what one takes, measured on this machine in this run."""
        labels = list(next(iter(self.protocols.values())).conditions[0])  # one condition, whatever the protocol asks

        def draw(num_images: int) -> None:
            self._call([labels] * num_images, list(range(num_images)), micro_batch_size=num_images)

        cost = measure_cost(draw, self._networks, batch_size=self.micro_batch_size)
        # Calls in a graph are unseen by hooks.
        if (num_calls := getattr(self.pipeline, "network_calls_per_image", None)) is not None:
            cost["network_calls_per_image"] = num_calls
        return cost | {
            "machine": self._environment["machine"],
            "device": self.pipeline.device.type,
            "dtype": self.settings["dtype"],
            "num_threads": torch.get_num_threads(),
            "num_parameters": self._num_parameters,
        }

    @property
    def _networks(self) -> list[nn.Module]:
        return [model for _, model in sorted(self.pipeline.components.items()) if isinstance(model, nn.Module)]

    def _of_networks(self, argument: str) -> int | None:
        """Gives an argument of the first of the pipeline's networks that has one of this name."""
        configs = [getattr(model, "config", {}) for model in self._networks]
        return next((config[argument] for config in configs if config.get(argument) is not None), None)

    @property
    def _num_parameters(self) -> int:
        return sum(weight.numel() for model in self._networks for weight in model.parameters())

    def _settings(self) -> dict[str, Any]:
        scheduler = None
        if hasattr(self.pipeline, "scheduler"):
            # JSON has no infinity, though the scheduler writes one.
            scheduler = json.loads(self.pipeline.scheduler.to_json_string(), parse_constant=str)
            scheduler.pop("_diffusers_version", None)
        settings = {
            "class": type(self.pipeline).__name__,
            "weights_sha256": weights_sha256(*self._networks),
            "label_names": None if self.vocabulary is None else self.vocabulary.names,
            "options": self.options,
            "scheduler": scheduler,
            "micro_batch_size": self.micro_batch_size,
            "dtype": str(self.pipeline.dtype).removeprefix("torch."),
            "device": self.pipeline.device.type,
            "protocols": {name: protocol.sha256 for name, protocol in self.protocols.items()},
            "image_seeds": "first 63 bits of SHA-256 of [protocol, sorted labels, replicate] as JSON; noise drawn on the"
            " CPU in float32",
        }
        return json.loads(json.dumps(settings))  # as it is read again: tuples are lists

    def _with_defaults(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Checks the options of the pipeline's call, and adds those for which the pipeline has a default of its own."""
        if own_business := sorted(set(options) & RESERVED_OPTIONS):
            raise ValueError(
                f"`options` must leave out what the evaluation decides itself, got {', '.join(own_business)}."
            )
        completed = call_options(self.pipeline, options)
        if self.vocabulary is None and "guidance_scale" not in options:
            completed.pop("guidance_scale", None)  # there is nothing to guide towards
        return completed

    def _check_protocols(self) -> None:
        if self.vocabulary is None:
            if set(self.protocols) != {MATCHED}:
                raise ValueError(
                    f"`protocols` must be {MATCHED!r} alone for a pipeline without labels, got {list(self.protocols)}:"
                    " there is no condition that its images could be scored on."
                )
            return
        for name, protocol in self.protocols.items():
            if protocol.prompts is not None and not hasattr(self.pipeline, "encode_compositions"):
                raise ValueError(
                    f"`protocols`, {name}: a {type(self.pipeline).__name__} draws in one call of its network and cannot"
                    " sum conditions; leave this protocol out."
                )
            try:
                self.pipeline.encode_labels(protocol.conditions)
                if protocol.prompts is not None:
                    self.pipeline.encode_compositions(protocol.prompts)
            except ValueError as error:
                raise ValueError(f"`protocols`, {name}: {error}") from None

    def _check_best_of(self) -> None:
        if self.best_of is None:
            return
        if self.best_of < 2:
            raise ValueError(f"`best_of` must be at least 2, got {self.best_of}; leave it out to pick none.")
        if set(self.protocols) == {MATCHED}:
            raise ValueError(
                f"`best_of` must be left out where {MATCHED!r} is drawn alone, of which nothing is picked, got"
                f" {self.best_of}; add another protocol."
            )
        if not hasattr(self.pipeline, "encode_compositions") or not self.pipeline.unet.config.null_condition:
            raise ValueError(
                f"`best_of` must be left out, got {self.best_of}: it compares denoising losses with and without labels,"
                " so it needs a diffusion model that was trained with label dropout."
            )
        for name, number in self.num_seeds.items():
            if name != MATCHED and number % self.best_of:
                raise ValueError(
                    f"`num_seeds` must be a multiple of `best_of` = {self.best_of} to be picked from, got {number} for the"
                    f" protocol {name}."
                )

    def _check_judges(self, judges: Mapping[str, nn.Module]) -> None:
        size = self._of_networks("sample_size")
        num_channels = self._of_networks("out_channels") or self._of_networks("in_channels")
        for name, judge in judges.items():
            if self.vocabulary is not None:
                check_judge_labels(judge, self.vocabulary.names, name=f"`judges[{name!r}]`")
            if size is not None and judge.config.image_size != size:
                raise ValueError(
                    f"`judges[{name!r}]` must judge {size}-pixel images like the pipeline's, but takes"
                    f" {judge.config.image_size}; train a judge at that size."
                )
            if num_channels is not None and judge.config.in_channels != num_channels:
                raise ValueError(
                    f"`judges[{name!r}]` must judge images of {num_channels} channels like the pipeline's, but takes"
                    f" {judge.config.in_channels}; train a judge on the pipeline's images."
                )

    def _check_training_conditions(self, conditions: Sequence[Sequence[str]] | None) -> None:
        if conditions is not None and self.vocabulary is not None:
            try:
                self.vocabulary.encode(conditions)
            except ValueError as error:
                raise ValueError(f"`training_facts`, conditions: {error}") from None

    def _check_store(self, store: ImageStore | None) -> None:
        """Refuses real images that cannot be compared with, before anything is drawn."""
        matched = self.protocols.get(MATCHED)
        if self.inception is not None and (store is None or matched is None):
            raise ValueError(f"`inception` needs real images and the protocol {MATCHED!r}, whose images are compared.")
        if store is None:
            return
        if self.vocabulary is not None and store.vocabulary != self.vocabulary:
            raise ValueError("`store` must have the labels of the pipeline, in the same order; it has others.")
        for name, judge in self.judges.items():
            check_judge_labels(judge, store.vocabulary.names, name=f"`judges[{name!r}]`")
            size, num_channels = judge.config.image_size, judge.config.in_channels
            if store.pixel_values.shape[2:] != (size, size):
                raise ValueError(
                    f"`store` must hold images of {size}x{size} pixels, as judge {name!r} takes them, got"
                    f" {store.pixel_values.shape[2:]}; open it with `resolution={size}`."
                )
            if store.pixel_values.shape[1] != num_channels:
                raise ValueError(
                    f"`store` must hold images of {num_channels} channels, as judge {name!r} takes them, got"
                    f" {store.pixel_values.shape[1]}; give the data that the judge was trained on."
                )
        if self.inception is not None and store.pixel_values.shape[1] != 3:
            raise ValueError(
                f"`inception` must be left out for images of {store.pixel_values.shape[1]} channels: FID and KID are of"
                " RGB images."
            )
        if matched is not None and matched.sha256 != matched_protocol(store).sha256:
            raise ValueError(
                f"`store` must be the images that the protocol {MATCHED!r} was made from; make it anew with"
                " `matched_protocol(store)`."
            )

    def _check_images(self, images: Any, num_images: int) -> None:  # noqa: ANN401 -- whatever a pipeline returns
        """Refuses what judges could not read, or would read as something else, with the first batch that is drawn."""
        config = next(iter(self.judges.values())).config
        expected = (num_images, config.image_size, config.image_size, config.in_channels)
        if not isinstance(images, np.ndarray) or images.shape != expected or images.dtype.kind != "f":
            got = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
            raise ValueError(
                f"`pipeline` must give images as an array of floats {expected} for output_type 'np', got {got}."
            )
        if not np.isfinite(images).all():
            raise ValueError("The pipeline drew images that are not finite; check its weights, or use dtype float32.")
        low, high = images.min(), images.max()
        if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
            raise ValueError(f"`pipeline` must give images in [0, 1] for output_type 'np', got [{low:g}, {high:g}].")

    @contextmanager
    def _locked_folder(self) -> Iterator[None]:
        """Keeps other evaluations out of the folder as long as this one writes there."""
        if not self.state.is_main_process:
            yield
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.output_dir / ".lock", timeout=0):
                yield
        except Timeout:
            raise ValueError(
                f"`output_dir` {self.output_dir} is being written by another evaluation; wait for it, or take another."
            ) from None

    def _check_output_dir(self) -> None:
        """Refuses a folder of another way of drawing; one with other protocols will do, if none has the same name."""
        path = self.output_dir / "settings.json"
        if not any(self.drawings.folder.glob("*.parquet")):
            return
        settings = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
        self.settings["protocols"] = settings["protocols"] | self.settings["protocols"]
        there, here = _flatten(settings), _flatten(self.settings)
        different = sorted(
            key
            for key in there.keys() | here.keys()
            if there.get(key) != here.get(key) and (key in there or not key.startswith("protocols."))
        )
        if different:
            key = different[0]
            was, now = (str(settings.get(key))[:60] for settings in (there, here))
            raise ValueError(
                f"`output_dir` {self.output_dir} holds an evaluation of other settings ({', '.join(different[:5])}):"
                f" {key} is {was} there and {now} here. Take another folder, or delete that one."
            )

    def _pending_batches(self) -> list[list[Unit]]:
        """Cuts what is still to be drawn into batches, those whose way from noise is shown by themselves."""
        drawn = self.drawings.units()
        pending: tuple[list[Unit], list[Unit]] = ([], [])
        for name, protocol in self.protocols.items():
            for replicate in range(self.num_seeds[name]):
                for position in range(len(protocol)):
                    unit = Unit(name, position, replicate)
                    has_strip = self._has_strip(unit)
                    if unit not in drawn or (has_strip and not self._picture_file(unit, "strips").is_file()):
                        pending[not has_strip].append(unit)
        size = self.micro_batch_size
        return [part[start : start + size] for part in pending for start in range(0, len(part), size)]

    def _has_strip(self, unit: Unit) -> bool:
        # What is quick to tell comes first: this is asked of every image.
        return self._is_pictured(unit) and unit.protocol != MATCHED and takes(self.pipeline, "num_states")

    def _draw_batch(self, batch: list[Unit]) -> None:
        requests = [self.protocols[unit.protocol].request(unit.position) for unit in batch]
        seeds = [self._seed(unit) for unit in batch]
        keeps_states = self._has_strip(batch[0])
        # A strip of ten states and the image; few-step samplers have fewer.
        num_states = min(10, self.options.get("num_inference_steps", 10)) if keeps_states else 0
        states = {"num_states": num_states} if keeps_states else {}
        output = self._call(requests, seeds, micro_batch_size=self.micro_batch_size, **states)
        images = getattr(output, "images", output)
        self._check_images(images, len(batch))
        pixel_values = _to_uint8(images).transpose(0, 3, 1, 2)
        if keeps_states:
            for row, unit in enumerate(batch):
                way = [_to_uint8(state[row]).transpose(2, 0, 1) for state in output.states] + [pixel_values[row]]
                strip = make_strip([to_image(state) for state in way])
                save_png(strip, self._picture_file(unit, "strips"), self._metadata(unit))
        self.drawings.add(
            batch,
            pixel_values,
            labels=[self.protocols[unit.protocol].conditions[unit.position] for unit in batch],
            seeds=seeds,
            record={"time": time.time(), "environment": self._environment},
            process_index=self.state.process_index,
        )

    def _call(self, requests: list[str | list[str]], seeds: list[int], **arguments: Any) -> Any:  # noqa: ANN401
        """Calls the pipeline for images as float32 arrays (B, H, W, C) in [0, 1]."""
        arguments |= {"seeds": seeds, "output_type": "np", **self.options}
        if self.vocabulary is None:
            return self.pipeline(num_images=len(seeds), **arguments)
        return self.pipeline(requests, **arguments)

    def _seed(self, unit: Unit) -> int:
        protocol = self.protocols[unit.protocol]
        return image_seed(
            protocol.seeded_as or unit.protocol,
            protocol.conditions[unit.position],
            unit.replicate,
            self._occurrences[unit.protocol][unit.position],
        )

    @cached_property
    def _occurrences(self) -> dict[str, list[int]]:
        """For each condition of a protocol, how often the protocol had it before."""
        occurrences = {}
        for name, protocol in self.protocols.items():
            counts: Counter[frozenset[str]] = Counter()
            occurrences[name] = []
            for labels in protocol.conditions:
                occurrences[name].append(counts[frozenset(labels)])
                counts[frozenset(labels)] += 1
        return occurrences

    @cached_property
    def _environment(self) -> dict[str, Any]:
        return describe_environment(self.pipeline.device, self.state.num_processes)

    def _drawn_on(self) -> list[dict[str, Any]]:
        """Lists what the images were drawn on, each environment once, the one used last at the end."""
        records = [
            record
            for units, record in self.drawings.records()
            if any(self._is_wanted(unit) for unit in units)  # the folder may hold more than is asked for now
        ]
        environments: list[dict[str, Any]] = []
        for record in sorted(records, key=lambda record: record["time"]):
            environments = [known for known in environments if known != record["environment"]]
            environments.append(record["environment"])
        return environments

    def _is_wanted(self, unit: Unit) -> bool:
        return unit.protocol in self.protocols and unit.replicate < self.num_seeds[unit.protocol]

    def _is_pictured(self, unit: Unit) -> bool:
        return unit.protocol in self.protocols and unit.replicate == 0 and unit.position < NUM_PICTURED

    def _write_records(self, readings: Mapping[str, Mapping[str, Reading]]) -> None:
        """Writes `records.parquet`: a row an image with its condition, its seed and each judge's logits."""
        tables = []
        for name, protocol in self.protocols.items():
            units = [
                Unit(name, position, replicate)
                for position in range(len(protocol))
                for replicate in range(self.num_seeds[name])
            ]
            columns = {
                "protocol": pa.array([unit.protocol for unit in units], pa.string()),
                "position": pa.array([unit.position for unit in units], pa.int32()),
                "replicate": pa.array([unit.replicate for unit in units], pa.int32()),
                "labels": pa.array(
                    [list(protocol.conditions[unit.position]) for unit in units], pa.list_(pa.string())
                ),
                "seed": pa.array([self._seed(unit) for unit in units], pa.int64()),
            }
            for judge, reading in readings[name].items():
                columns[f"logits {judge}"] = pa.array(list(reading.logits.numpy()), pa.list_(pa.float32()))
            tables.append(pa.table(columns))
        path = self.output_dir / "records.parquet"
        unfinished = path.with_suffix(".unfinished")
        pq.write_table(pa.concat_tables(tables), unfinished)
        os.replace(unfinished, path)

    def _pictures(self) -> dict[str, tuple[Image.Image, dict[str, Any]]]:
        """Lays out grids and strips, and single images, of the first image of each protocol's first conditions."""
        images: dict[Unit, Image.Image] = {}
        for units, pixel_values, _ in self.drawings.batches(self._is_pictured):
            for unit, image in zip(units, pixel_values, strict=True):
                images[unit] = to_image(image)
        pictures: dict[str, tuple[Image.Image, dict[str, Any]]] = {}
        for name, protocol in self.protocols.items():
            requests = [protocol.request(position) for position in range(min(len(protocol), NUM_PICTURED))]
            units = [Unit(name, position, 0) for position in range(len(requests))]
            labels = [[request] if isinstance(request, str) else request for request in requests]
            metadata = {"labels": labels, "model": self.pipeline_name}
            grid = make_grid([images[unit] for unit in units], [request_lines(request) for request in requests])
            pictures[f"{name}_grid.png"] = grid, metadata
            if "samples.png" not in pictures:
                row = [images[unit] for unit in units[:NUM_SAMPLES]]
                pictures["samples.png"] = make_strip(row), metadata | {"labels": labels[:NUM_SAMPLES]}
            if self._has_strip(units[0]):
                strips = [_open_image(self._picture_file(unit, "strips")) for unit in units]
                grid = make_grid(strips, [request_text(request) for request in requests], columns=2)
                pictures[f"{name}_strips.png"] = grid, metadata
                for unit in units:
                    file = self._picture_file(unit, "images").relative_to(self.output_dir)
                    pictures[str(file)] = images[unit], self._metadata(unit)
        return pictures

    def _picture_file(self, unit: Unit, kind: str) -> Path:
        request = self.protocols[unit.protocol].request(unit.position)
        stem = file_stem(unit.position, request)
        return self.output_dir / kind / unit.protocol / f"{stem}.png"

    def _metadata(self, unit: Unit) -> dict[str, Any]:
        return {
            "labels": request_text(self.protocols[unit.protocol].request(unit.position)),
            "seed": self._seed(unit),
            "model": self.pipeline_name,
            **self.options,
            "Software": f"iclevr_diffusion {iclevr_diffusion.__version__}",
        }


def _default_num_seeds(protocol: Protocol) -> int:
    return DEFAULT_NUM_SEEDS["many conditions" if len(protocol) >= 1000 else protocol.resampled]


def _to_uint8(images: np.ndarray) -> np.ndarray:
    return (images.clip(0, 1) * 255).round().astype(np.uint8)


def _open_image(file: Path) -> Image.Image:
    with Image.open(file) as image:  # a list may be longer than the number of files that can be open at once
        return image.convert("RGB")


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

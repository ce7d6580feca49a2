import difflib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from iclevr_diffusion.config import TrainConfig, option
from iclevr_diffusion.data import (
    BatchLoader,
    ImageSet,
    LabelledImages,
    StreamedImages,
    normalize,
    open_source,
    open_store,
)
from iclevr_diffusion.protocols import COMBINATIONS, PROTOCOLS, Protocol, combinations_protocol, open_protocol
from iclevr_diffusion.rendering import render_dataset
from iclevr_diffusion.training import TrainingRun

_HOLD_OUT = (
    f"`hold_out` must be {COMBINATIONS} (chosen among the label sets of your images), held-out (i-CLEVR's labels only)"
    " or a file like test.json"
)


@dataclass(kw_only=True)
class BatchConfig(TrainConfig):
    """What a run is told about the batches of its images, whatever images they are."""

    resolution: int = option(64, "height and width of the images in pixels")
    resident: bool = option(True, "hold the images on the device, or read them from their file", may_change=True)
    num_workers: int = option(2, "threads that read batches ahead where images are not resident", may_change=True)
    repeat_threshold: float | None = option(
        None, "share of the images below which a label is rare, its images coming more often; none repeats none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_workers < 0:
            raise ValueError(f"`num_workers` must be at least 0, got {self.num_workers}.")
        if self.repeat_threshold is not None and not 0 < self.repeat_threshold <= 1:
            raise ValueError(
                f"`repeat_threshold` must lie in (0, 1], a share of the images, or be none, got {self.repeat_threshold}."
            )


@dataclass(kw_only=True)
class DataConfig(BatchConfig):
    """What a run on labelled images is told about them."""

    data: str | None = option(
        None,
        "folder of labelled images, hub:user/name, a YAML file of a set, ICLEVR_ROOT, digits or mnist; none renders",
        may_change=True,
    )
    num_scenes: int = option(3000, "scenes to render where no data are given, each of one to three images")
    split: Literal["train", "all"] = option("train", "`all` holds nothing out, and marks the outputs")
    hold_out: str | None = option(
        None,
        "label sets that no training image may show: `held-out`, `combinations` (chosen among those of your images), or"
        " a file like test.json",
        may_change=True,
    )
    streaming: bool = option(
        False, "read and decode images whenever a batch needs them, with no file of pixels made and none resident"
    )


def check_sizes(make_networks: Callable[[], object], device: str = "meta") -> None:
    """Makes networks, so that a size they cannot have is refused before any data are read.

    Args:
        make_networks: Makes them for images of the configuration's `resolution`.
        device: Where; `meta` takes no memory and no time, but for spectral norms, which are sooner made on `cpu`.

    Raises:
        ValueError: If they cannot be made.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            make_networks()
    except ValueError as error:
        raise ValueError(str(error).replace("`sample_size`", "`resolution`")) from None


def open_images(
    option: str, source: str | Path, resolution: int, *, progress: bool = True, streaming: bool = False
) -> tuple[str | Path, ImageSet]:
    """Opens what an option of a run is given, anything that `open_source` opens.

    Returns:
        The folder or the name, and its images.

    Raises:
        ValueError: If ICLEVR_ROOT is not set, or the folder is not what it should be.
        FileNotFoundError: If the folder, or a file in it, is missing.
    """
    if source == "ICLEVR_ROOT":
        source = os.environ.get("ICLEVR_ROOT")
        if not source:
            raise ValueError(f"`{option}` is ICLEVR_ROOT: set that variable to the folder that holds objects.json.")
    try:
        if streaming:
            images = open_source(source)
            if progress and isinstance(images, LabelledImages):
                print(images.describe(), file=sys.stderr)
            return source, StreamedImages(images, resolution)
        return source, open_store(source, resolution=resolution, progress=progress)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"`{option}`: {error}") from None
    except ValueError as error:
        raise ValueError(f"`{option}`: {error}") from None


class TrainingData:
    """The images that a run is trained on, its batches and the label sets that it draws on the way.

    Without `config.data` the main process renders scenes into `output_dir/data`, or those that are still missing. With
    `config.hold_out` an image is left out if it shows all labels of one of those sets, whatever else it shows. What the
    model will have seen is written beside the weights: `data.json` (fingerprint, split, number of images, what is held
    out) and `conditions.json` (the distinct label sets); sets that `combinations` chose are in `combinations.json`, a
    protocol for the evaluation. A resumed run must find the same images.

    Args:
        run: The run.
        config: Its configuration.

    Attributes:
        store: All images.
        indices: Positions of the images to train on.
        loader: The batches of this process.
        validation_indices: Positions of the validation images, without what is held out; a small data set can have none.
        validation_conditions: Distinct label sets of the validation images, without what is held out; those of the
            training images where a small data set has no validation images.

    Raises:
        ValueError: If `config.data` is nothing that `open_images` opens, `config.hold_out` does not fit the labels or leaves no image, or the images are not those that the checkpoints were trained on.
    """

    def __init__(self, run: TrainingRun, config: DataConfig) -> None:
        accelerator = run.accelerator
        root = config.data
        if root is None:
            root = run.output_dir / "data"
            if accelerator.is_main_process:
                render_dataset(root, config.num_scenes, size=config.resolution, seed=config.seed)
            accelerator.wait_for_everyone()
        root, self.store = open_images(
            "data", root, config.resolution, progress=accelerator.is_main_process, streaming=config.streaming
        )
        all_indices = self.store.indices(config.split)
        hold_out = None if config.hold_out is None else self._open_hold_out(config.hold_out)
        self.indices = self._without(hold_out, all_indices)
        num_left_out = len(all_indices) - len(self.indices)
        if num_left_out and len(self.indices) == 0:
            raise ValueError(
                f"`hold_out` must leave images to train on, but all {num_left_out:,} show a label set of"
                f" {config.hold_out}; hold out fewer."
            )
        self.loader = BatchLoader(
            self.store,
            self.indices,
            config.batch_size,
            seed=config.seed,
            device=accelerator.device,
            resident=config.resident and not config.streaming,
            num_workers=config.num_workers,
            repeat_threshold=config.repeat_threshold,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
        )
        seen = self.store.conditions(self.indices)
        self.validation_indices = self._without(hold_out, self.store.indices("validation"))
        self.validation_conditions = self.store.conditions(self.validation_indices) or seen
        facts = {"data": self.store.sha256, "split": config.split, "num_images": len(self.indices)}
        left_out = None
        if hold_out is not None:
            left_out = {"name": hold_out.name, "sha256": hold_out.sha256, "num_images_left_out": num_left_out}
        # The number of images, and with `combinations` also what is held out, follow from what is named before them.
        run.pin(data=self.store.sha256, hold_out=left_out["sha256"] if left_out else "none")
        run.pin(**facts)
        if left_out:
            run.print(
                f"{num_left_out:,} of {len(all_indices):,} images are left out: each shows one of the {len(hold_out)}"
                f" label sets of {config.hold_out}."
            )
        if config.split == "all":
            run.print("Training on all images: nothing is held out, so no score on these images is independent.")
        run.describe("data.json", json.dumps({"root": str(root), **facts, "hold_out": left_out}, indent=2) + "\n")
        run.describe("conditions.json", json.dumps(seen) + "\n")
        if hold_out is not None and hold_out.name == COMBINATIONS:
            run.describe(f"{COMBINATIONS}.json", json.dumps(hold_out.conditions) + "\n")

    def example(self, device: torch.device) -> Tensor:
        """Returns a training image (1, C, H, W) in [-1, 1]."""
        return normalize(torch.from_numpy(self.store.pixel_values[self.indices[:1]])).to(device)

    def choose_conditions(self, num_conditions: int) -> list[tuple[str, ...]]:
        """Returns up to that many of the validation label sets, mixed in number of labels, the same ones every time."""
        order = np.random.default_rng(0).permutation(len(self.validation_conditions))
        return [self.validation_conditions[i] for i in order[:num_conditions]]

    def _open_hold_out(self, name_or_path: str) -> Protocol:
        vocabulary = self.store.vocabulary
        if name_or_path not in (COMBINATIONS, *PROTOCOLS) and not Path(name_or_path).is_file():
            nearest = difflib.get_close_matches(name_or_path.lower(), (COMBINATIONS, "held-out"), n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ", and there is no file of this name."
            raise FileNotFoundError(f"{_HOLD_OUT}, got {name_or_path!r}{hint}")
        try:
            if name_or_path == COMBINATIONS:
                return combinations_protocol(self.store)
            return open_protocol(name_or_path, vocabulary)
        except ValueError as error:
            if name_or_path not in PROTOCOLS:
                raise ValueError(f"`hold_out`: {error}") from None
            raise ValueError(
                f"{_HOLD_OUT}, got {name_or_path!r}, which does not fit the {len(vocabulary)} labels of `data`"
                f" ({', '.join(vocabulary.names[:3])}{', ...' if len(vocabulary) > 3 else ''}); take {COMBINATIONS}."
            ) from None

    def _without(self, hold_out: Protocol | None, indices: np.ndarray) -> np.ndarray:
        """Leaves out the images that show all labels of one of the sets."""
        if hold_out is None:
            return indices
        sets = self.store.vocabulary.encode(hold_out.conditions).numpy()  # (num_conditions, num_classes)
        num_shown = self.store.class_labels[indices] @ sets.T
        return indices[(num_shown < sets.sum(axis=1)).all(axis=1)]

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from iclevr_diffusion.config import TrainConfig, option
from iclevr_diffusion.data import BatchLoader, ImageStore, normalize, open_store
from iclevr_diffusion.protocols import Protocol, open_protocol
from iclevr_diffusion.rendering import render_dataset
from iclevr_diffusion.training import TrainingRun


@dataclass(kw_only=True)
class DataConfig(TrainConfig):
    """What a run on labelled images is told about them."""

    data: str | None = option(
        None,
        "folder in the course's layout, ICLEVR_ROOT for that variable's, digits or mnist; none renders",
        may_change=True,
    )
    num_scenes: int = option(3000, "scenes to render where no data are given, each of one to three images")
    split: Literal["train", "all"] = option("train", "`all` holds nothing out, and marks the outputs")
    hold_out: str | None = option(
        None, "label sets that no training image may show: `held-out`, or a file like test.json", may_change=True
    )
    resolution: int = option(64, "height and width of the images in pixels")
    resident: bool = option(True, "hold the images on the device, or read them from their file", may_change=True)


def open_images(
    option: str, source: str | Path, resolution: int, *, progress: bool = True
) -> tuple[str | Path, ImageStore]:
    """Opens what an option of a run is given: a folder, ICLEVR_ROOT for that variable's, digits or mnist.

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
    out) and `conditions.json` (the distinct label sets). A resumed run must find the same images.

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
        root, self.store = open_images("data", root, config.resolution, progress=accelerator.is_main_process)
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
            resident=config.resident,
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
        # What is held out comes first, as the number of images follows from it.
        run.pin(hold_out=left_out["sha256"] if left_out else "none", **facts)
        if left_out:
            run.print(
                f"{num_left_out:,} of {len(all_indices):,} images are left out: each shows one of the {len(hold_out)}"
                f" label sets of {config.hold_out}."
            )
        if config.split == "all":
            run.print("Training on all images: nothing is held out, so no score on these images is independent.")
        run.describe("data.json", json.dumps({"root": str(root), **facts, "hold_out": left_out}, indent=2) + "\n")
        run.describe("conditions.json", json.dumps(seen) + "\n")

    def example(self, device: torch.device) -> Tensor:
        """Returns a training image (1, C, H, W) in [-1, 1]."""
        return normalize(torch.from_numpy(self.store.pixel_values[self.indices[:1]])).to(device)

    def choose_conditions(self, num_conditions: int) -> list[tuple[str, ...]]:
        """Returns up to that many of the validation label sets, mixed in number of labels, the same ones every time."""
        order = np.random.default_rng(0).permutation(len(self.validation_conditions))
        return [self.validation_conditions[i] for i in order[:num_conditions]]

    def _open_hold_out(self, name_or_path: str) -> Protocol:
        try:
            return open_protocol(name_or_path, self.store.vocabulary)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"`hold_out`: {error}") from None

    def _without(self, hold_out: Protocol | None, indices: np.ndarray) -> np.ndarray:
        """Leaves out the images that show all labels of one of the sets."""
        if hold_out is None:
            return indices
        sets = self.store.vocabulary.encode(hold_out.conditions).numpy()  # (num_conditions, num_classes)
        num_shown = self.store.class_labels[indices] @ sets.T
        return indices[(num_shown < sets.sum(axis=1)).all(axis=1)]

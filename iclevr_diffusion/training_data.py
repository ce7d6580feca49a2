import json
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np

from iclevr_diffusion.config import TrainConfig, option
from iclevr_diffusion.data import BatchLoader, ImageStore, open_store
from iclevr_diffusion.rendering import render_dataset
from iclevr_diffusion.training import TrainingRun


@dataclass(kw_only=True)
class DataConfig(TrainConfig):
    """What a run on labelled images is told about them."""

    data: str | None = option(
        None, "folder in the course's layout, or ICLEVR_ROOT for that variable's; none renders", may_change=True
    )
    num_scenes: int = option(3000, "scenes to render where no data are given, each of one to three images")
    split: Literal["train", "all"] = option("train", "`all` holds nothing out, and marks the outputs")
    resolution: int = option(64, "height and width of the images in pixels")
    resident: bool = option(True, "hold the images on the device, or read them from their file", may_change=True)


class TrainingData:
    """The images that a run is trained on, its batches and the label sets that it draws on the way.

    Without `config.data` the main process renders scenes into `output_dir/data`, or those that are still missing. What
    the model will have seen is written beside the weights: `data.json` (fingerprint, split, number of images) and
    `conditions.json` (the distinct label sets). A resumed run must find the same images.

    Args:
        run: The run.
        config: Its configuration.

    Attributes:
        store: All images.
        indices: Positions of the images to train on.
        loader: The batches of this process.
        validation_conditions: Distinct label sets of the validation images; those of the training images where a small
            data set has no validation images.

    Raises:
        ValueError: If `config.data` is ICLEVR_ROOT and that variable is not set, or the images are not those that the
            checkpoints were trained on.
    """

    def __init__(self, run: TrainingRun, config: DataConfig) -> None:
        accelerator = run.accelerator
        root = config.data
        if config.data == "ICLEVR_ROOT":
            root = os.environ.get("ICLEVR_ROOT")
            if not root:
                raise ValueError("`data` is ICLEVR_ROOT: set that variable to the folder that holds objects.json.")
        if root is None:
            root = run.output_dir / "data"
            if accelerator.is_main_process:
                render_dataset(root, config.num_scenes, size=config.resolution, seed=config.seed)
            accelerator.wait_for_everyone()
        self.store: ImageStore = open_store(root, resolution=config.resolution, progress=accelerator.is_main_process)
        self.indices = self.store.indices(config.split)
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
        self.validation_conditions = self.store.conditions(self.store.indices("validation")) or seen
        facts = {"data": self.store.sha256, "split": config.split, "num_images": len(self.indices)}
        run.pin(**facts)
        if config.split == "all":
            run.print("Training on all images: nothing is held out, so no score on these images is independent.")
        run.describe("data.json", json.dumps({"root": str(root), **facts}, indent=2) + "\n")
        run.describe("conditions.json", json.dumps(seen) + "\n")

    def choose_conditions(self, num_conditions: int) -> list[tuple[str, ...]]:
        """Returns up to that many of the validation label sets, mixed in number of labels, the same ones every time."""
        order = np.random.default_rng(0).permutation(len(self.validation_conditions))
        return [self.validation_conditions[i] for i in order[:num_conditions]]

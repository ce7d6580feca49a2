"""Trains a judge: a network that reads which objects an image shows.

accelerate launch train_scripts/train_classifier.py --data /data/iclevr --output_dir outputs/judge

The train split is trained on, and the validation split is scored after every pass over it. At the end the validation
images set the judge's threshold, and the held-out split is scored once, in `results.json`: it decides nothing.
`errors.png` shows the held-out images that the judge reads wrongly.
"""

import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from iclevr_diffusion.augmentation import augment
from iclevr_diffusion.config import LearningRateSchedule, option
from iclevr_diffusion.data import BatchLoader, ImageStore, normalize, open_store
from iclevr_diffusion.images import save_png
from iclevr_diffusion.judging import calibration_error, choose_threshold, draw_readings, load_judge, read_images
from iclevr_diffusion.labels import ICLEVR_LABELS
from iclevr_diffusion.models.classifier import LabelClassifier
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier
from iclevr_diffusion.scores import exact_match, score_images
from iclevr_diffusion.training import TrainingRun, run_script
from iclevr_diffusion.training_data import BatchConfig


@dataclass(kw_only=True)
class ClassifierConfig(BatchConfig):
    """Trains a judge: a network that reads which objects an image shows."""

    output_dir: str = option("outputs/judge", "folder of everything that the run writes", may_change=True)
    data: tuple[str, ...] = option(
        ("ICLEVR_ROOT",), "image sets, as `data` of the other scripts; ICLEVR_ROOT: that variable's"
    )
    evaluate_on: tuple[str, ...] = option((), "more image sets, whose held-out split is scored too", may_change=True)
    model: Literal["small", "resnet18", "resnet18_half", "resnet50"] = option(
        "small", "the network; the course's evaluator is resnet18"
    )
    flip: bool | None = option(
        None, "mirror half of the images; none does where the labels are i-CLEVR's, which a mirror leaves true"
    )
    init_from: str | None = option(None, "judge, also of other labels, whose weights are the first ones")
    max_steps: int = option(3500, "optimisation steps")
    learning_rate: float = option(2e-3, "learning rate after the warm-up")
    lr_schedule: LearningRateSchedule = option("cosine", "course of the learning rate after the warm-up")
    warmup_steps: int = option(500, "steps over which the learning rate rises")
    weight_decay: float = option(0.05, "decay of the weights towards 0, times the learning rate, a step")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError("`data` must name at least one folder, got none.")


class MixedBatches:
    """Batches of several folders, each with a share of every batch as large as its share of all images.

    With `repeat_threshold` a label is rare, or not, among the images of its folder.
    """

    def __init__(self, stores: list[ImageStore], run: TrainingRun) -> None:
        splits = [store.indices("train") for store in stores]
        self.num_images = sum(map(len, splits))
        ends = np.rint(np.cumsum([0, *map(len, splits)]) * run.config.batch_size / max(1, self.num_images))
        if not all(np.diff(ends)):
            shares = ", ".join(f"{folder} {len(split)}" for folder, split in zip(run.config.data, splits, strict=True))
            raise ValueError(
                f"`batch_size` must leave every folder of `data` an image of each batch, got {run.config.batch_size} for"
                f" these numbers of training images: {shares}; take larger batches, or leave the smallest folder out."
            )
        settings = {name: getattr(run.accelerator, name) for name in ("device", "num_processes", "process_index")}
        settings |= {
            name: getattr(run.config, name) for name in ("seed", "resident", "num_workers", "repeat_threshold")
        }
        self.loaders = [
            BatchLoader(store, indices, int(share), **settings)
            for store, indices, share in zip(stores, splits, np.diff(ends), strict=True)
        ]

    def batch(self, step: int) -> dict[str, Tensor]:
        """Returns batch `step` of every folder, one after the other."""
        parts = [loader.batch(step) for loader in self.loaders]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def images_of(stores: list[ImageStore], split: str) -> tuple[np.ndarray, Tensor]:
    """Returns a split's images of all stores, uint8 (N, C, H, W), and their labels (N, num_classes)."""
    rows = [store.indices(split) for store in stores]
    pixel_values = [store.pixel_values[split_rows] for store, split_rows in zip(stores, rows, strict=True)]
    class_labels = [store.class_labels[split_rows] for store, split_rows in zip(stores, rows, strict=True)]
    return np.concatenate(pixel_values), torch.from_numpy(np.concatenate(class_labels)).float()


def main(config: ClassifierConfig) -> None:
    run = TrainingRun(config)
    stores: dict[str, ImageStore] = {}
    for root in (*config.data, *config.evaluate_on):
        # The numbers that the first folder gives to the labels hold for all of them.
        vocabulary = stores[config.data[0]].vocabulary if stores else None
        stores[root] = open_store(root, resolution=config.resolution, vocabulary=vocabulary)
    num_channels = stores[config.data[0]].pixel_values.shape[1]
    for root, store in stores.items():
        if store.pixel_values.shape[1] != num_channels:
            raise ValueError(
                f"`data` and `evaluate_on` must hold images of as many channels as {config.data[0]}, {num_channels}, got"
                f" {store.pixel_values.shape[1]} in {root}."
            )
    train_stores = [stores[root] for root in config.data]
    vocabulary = train_stores[0].vocabulary
    validation_images, validation_labels = images_of(train_stores, "validation")
    run.pin(data=" ".join(store.sha256 for store in train_stores))
    loader = MixedBatches(train_stores, run)
    images_per_step = config.batch_size * config.gradient_accumulation_steps * run.accelerator.num_processes

    flip = vocabulary == ICLEVR_LABELS if config.flip is None else config.flip
    arguments = {"image_size": config.resolution, "label_names": list(vocabulary.names), "in_channels": num_channels}
    if config.model == "small":
        judge = SmallLabelClassifier(len(vocabulary), **arguments)
    else:
        judge = LabelClassifier.from_preset(config.model, num_classes=len(vocabulary), **arguments)
    run.start_from(config.init_from, judge, vocabulary.names)
    judge = judge.to(memory_format=torch.channels_last)  # trains the small one faster
    optimizer = torch.optim.AdamW(judge.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    judge, optimizer, lr_scheduler = run.prepare(judge, optimizer, run.lr_scheduler(optimizer))

    for batch in run.batches(loader):
        judge.train()
        pixel_values = augment(normalize(batch["pixel_values"]), flip=flip)
        loss = F.binary_cross_entropy_with_logits(judge(pixel_values).logits, batch["class_labels"])

        run.backward(loss)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        run.log(loss=loss)
        # A small data set can have no validation image.
        if run.every(max(1, loader.num_images // images_per_step)) and len(validation_images):
            scores = score_images(read_images(run.unwrap(judge), validation_images).logits, validation_labels)
            by_number = {
                f"{name}_{k}": x for k, part in scores.pop("by_num_objects").items() for name, x in part.items()
            }
            run.log(**{f"validation_{name}": x for name, x in {**scores, **by_number}.items() if x is not None})
            shown = {name: scores[name] for name in ("exact_match", "top_k", "precision", "recall")}
            listed = ", ".join(f"{name} {x:.4f}" for name, x in shown.items() if x is not None)
            run.print(f"Step {run.step}: on {scores['num_images']:,} validation images {listed}.")

    judge = run.unwrap(judge)
    if len(validation_images):
        threshold = choose_threshold(read_images(judge, validation_images).logits, validation_labels)
        judge.register_to_config(threshold=threshold)
    folder = run.save_pipeline(judge, "judge")
    judge = load_judge(folder).to(run.accelerator.device)  # what is scored is what was written
    threshold = judge.config.threshold
    results = {"model": config.model, "max_steps": config.max_steps, "num_train_images": loader.num_images}
    results |= {"num_validation_images": len(validation_images), "threshold": threshold, "held_out": {}}
    errors = []
    for root, store in stores.items():
        pixel_values, class_labels = images_of([store], "held-out")
        logits = read_images(judge, pixel_values).logits
        wrong = ~exact_match(logits, class_labels, threshold)
        errors.append((torch.from_numpy(pixel_values)[wrong], class_labels[wrong], logits[wrong] > threshold))
        if len(logits):
            scores = score_images(logits, class_labels, threshold=threshold)
            scores |= {"calibration_error": calibration_error(logits, class_labels), "data_sha256": store.sha256}
            results["held_out"][root] = scores
    if run.accelerator.is_main_process:
        (run.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (run.output_dir / "errors.png").unlink(missing_ok=True)
        pixel_values, class_labels, seen = map(torch.cat, zip(*errors, strict=True))
        if len(seen):
            sheet = draw_readings(pixel_values.numpy(), class_labels, {"judge": seen}, vocabulary.names)
            save_png(sheet, run.output_dir / "errors.png", {"model": config.model, "threshold": threshold})
    run.print(json.dumps(results, indent=2), f"\nThe judge is in {folder}.")
    run.finish()


if __name__ == "__main__":
    run_script(main, ClassifierConfig)

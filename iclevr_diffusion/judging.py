"""Judges at work: they are opened, read images, and are themselves measured on images whose labels are known."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from iclevr_diffusion.conversion import convert_evaluator_checkpoint
from iclevr_diffusion.data import normalize
from iclevr_diffusion.images import make_grid, to_image
from iclevr_diffusion.loading import open_judge
from iclevr_diffusion.models.classifier import LabelClassifier
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier
from iclevr_diffusion.scores import exact_match

HUNDREDTHS = range(-500, 501)  # thresholds that are tried: logits from -5 to 5, probabilities from 0.7 to 99.3 %

NUM_DRAWN = 64  # images on a sheet, at most


def load_judge(path: str | Path, label_names: Sequence[str] | None = None) -> LabelClassifier | SmallLabelClassifier:
    """Opens a judge in eval mode and float32, without running any code that lies beside its weights.

    Args:
        path: A folder with `config.json` and safetensors weights, a hub's `owner/name`, the name of a judge that comes
            with the package, or the course's `checkpoint.pth`.
        label_names: Names that the judge must know, in this order; None takes the judge as it is.

    Raises:
        ValueError: If there is no such judge, its weights are not those of its configuration, or it judges other labels.
    """
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
        lacking = [label for label in ours if label not in set(theirs)]
        num_known = len(ours) - len(lacking)
        difference = f"{len(theirs)} labels, {num_known or 'none'} of the pipeline's {len(ours)}"
        if lacking:
            some = ", ".join(lacking[:4]) + (", ..." if len(lacking) > 4 else "")
            difference += f" ({some} {'is' if len(lacking) == 1 else 'are'} missing)"
    raise ValueError(
        f"{name} judges other labels than the pipeline: it knows {difference}. Train one on images with these labels,"
        " train_scripts/train_classifier.py --data IMAGES --output_dir FOLDER, and give FOLDER/judge."
    )


def weights_sha256(*models: nn.Module) -> str:
    """Hashes models: their configurations, and parameters and buffers by name, type, shape and value.

    Two models of one hash give the same outputs, however their files are cut. An argument that a class got later, by its
    `_later_arguments`, is left out where it has the value that stands for what the class did before: weights keep their
    hash when their class learns something new.
    """
    digest = hashlib.sha256()
    for model in models:
        later = getattr(model, "_later_arguments", {})
        config = {
            key: value
            for key, value in getattr(model, "config", {}).items()
            if not key.startswith("_") and (key not in later or value != later[key])
        }
        digest.update(f"{json.dumps(config, sort_keys=True)}\n".encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Reading(NamedTuple):
    """What a judge makes of images, float32 on the CPU.

    Args:
        logits: Its outputs before the sigmoid (N, num_classes).
        features: What its last layer saw (N, D).
    """

    logits: Tensor
    features: Tensor


def read_images(judge: nn.Module, pixel_values: np.ndarray, *, batch_size: int = 64) -> Reading:
    """Lets a judge read images, and leaves it in eval mode.

    An image is read alike, to the bit, whatever other images it is read with, as long as `batch_size` and the machine
    are the same: every batch has the same shape, the last one is filled up with black images.

    Args:
        judge: A float32 network with `extract_features` and `classifier`, on any device.
        pixel_values: Images, uint8 (N, C, H, W) in [0, 255]; may be mapped from a file, which is read batch by batch.
        batch_size: Images that go through the network at once.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    judge.eval()
    logits = torch.empty(len(pixel_values), judge.classifier.out_features)
    features = torch.empty(len(pixel_values), judge.classifier.in_features)
    for start in range(0, len(pixel_values), batch_size):
        images = torch.from_numpy(
            np.array(pixel_values[start : start + batch_size])
        )  # a copy: a mapped file is read-only
        stop = start + len(images)
        images = torch.cat([images, images.new_zeros(batch_size - len(images), *images.shape[1:])])
        with torch.inference_mode():
            # Channels last: convolutions are up to twice as fast on the CPU.
            images = normalize(images.to(judge.device)).contiguous(memory_format=torch.channels_last)
            batch_features = judge.extract_features(images)
            logits[start:stop] = judge.classifier(batch_features)[: stop - start].cpu()
            features[start:stop] = batch_features[: stop - start].cpu()
    return Reading(logits, features)


def choose_threshold(logits: Tensor, class_labels: Tensor) -> float:
    """Returns the logit above which a judge should say that it sees an object: that of the best exact match.

    Hundredths from -5 to 5 are tried. Where several are equally good, it is the middle of the longest unbroken row of
    them; of rows of one length, of the one whose middle is nearest 0, then the lower one.

    Args:
        logits: A judge's outputs (N, num_classes) for images that it was not trained on.
        class_labels: What the images show (N, num_classes); an entry above 0 is an object.
    """
    if len(logits) == 0:
        raise ValueError("`logits` must be of at least one image, got none; keep the threshold 0.")
    num_matches = [int(exact_match(logits, class_labels, hundredth / 100).sum()) for hundredth in HUNDREDTHS]
    rows = []
    for num, row in groupby(HUNDREDTHS, key=lambda hundredth: num_matches[hundredth - HUNDREDTHS.start]):
        if num == max(num_matches):
            hundredths = list(row)
            rows.append((hundredths[0], hundredths[-1]))
    first, last = min(rows, key=lambda row: (row[0] - row[1], abs(row[0] + row[1]), row[0]))
    return (first + last) / 200


def calibration_error(logits: Tensor, class_labels: Tensor, *, num_bins: int = 15) -> float:
    """Returns how far the probabilities of labels are from how often the labels are true, 0 at best and 1 at worst.

    The expected calibration error of *On Calibration of Modern Neural Networks* (Guo et al., 2017,
    https://arxiv.org/abs/1706.04599, section 2), of every label of every image: the probabilities are sorted into bins of
    equal width, and the distances between mean probability and share of true labels are averaged, weighted by the
    number in each bin. Most labels are absent from an image and clearly so, hence the number is small.

    Args:
        logits: A judge's outputs (N, num_classes), N at least 1.
        class_labels: What the images show (N, num_classes); an entry above 0 is an object.
        num_bins: Number of bins.
    """
    if logits.numel() == 0 or logits.shape != class_labels.shape:
        raise ValueError(
            "`logits` and `class_labels` must both have shape (batch, num_classes) with at least one image, got"
            f" {tuple(logits.shape)} and {tuple(class_labels.shape)}."
        )
    probabilities = logits.double().sigmoid().flatten()
    gaps = (class_labels > 0).double().flatten() - probabilities
    bins = (probabilities * num_bins).long().clamp(max=num_bins - 1)
    return float(torch.zeros(num_bins, dtype=torch.double).index_add(0, bins, gaps).abs().sum() / len(gaps))


def draw_readings(
    pixel_values: np.ndarray, class_labels: Tensor, seen: Mapping[str, Tensor], label_names: Sequence[str]
) -> Image.Image:
    """Lays images out with what they show, and what each judge sees too much (+) or does not see (-).

    Of more than 64 images 64 are drawn, evenly spread over all.

    Args:
        pixel_values: Images, uint8 (N, C, H, W), N at least 1.
        class_labels: What they show (N, num_classes); an entry above 0 is an object.
        seen: What each judge sees, by its name, bool (N, num_classes).
        label_names: Name of each class.
    """
    images, captions = [], []
    for row in torch.linspace(0, len(pixel_values) - 1, min(len(pixel_values), NUM_DRAWN)).long().tolist():
        shown = class_labels[row] > 0
        lines = [name for name, is_shown in zip(label_names, shown, strict=True) if is_shown] or ["nothing"]
        for judge, judge_seen in seen.items():
            for name, is_shown, is_seen in zip(label_names, shown, judge_seen[row], strict=True):
                if is_shown != is_seen:
                    lines.append(f"{judge}: {'+' if is_seen else '-'} {name}")
        images.append(to_image(pixel_values[row]))
        captions.append("\n".join(lines))
    return make_grid(images, captions, min_width=192)

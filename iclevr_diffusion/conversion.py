"""Reads the course's evaluator, a pickled torchvision ResNet-18, into a `LabelClassifier`."""

import re
from pathlib import Path

import torch
from torch import Tensor

from iclevr_diffusion.labels import ICLEVR_LABELS
from iclevr_diffusion.models.classifier import LabelClassifier


def torchvision_key(key: str) -> str:
    """Gives torchvision's name of a tensor of `LabelClassifier`, its `fc` being `Sequential(Linear, Sigmoid)`."""
    key = key.replace("classifier.", "fc.0.")
    key = key.replace("resnet.embedder.embedder.convolution", "conv1")
    key = key.replace("resnet.embedder.embedder.normalization", "bn1")
    key = re.sub(r"resnet\.encoder\.stages\.(\d)\.layers\.", lambda match: f"layer{int(match[1]) + 1}.", key)
    key = re.sub(r"layer\.(\d)\.convolution", lambda match: f"conv{int(match[1]) + 1}", key)
    key = re.sub(r"layer\.(\d)\.normalization", lambda match: f"bn{int(match[1]) + 1}", key)
    return key.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")


def convert_evaluator_checkpoint(path: str | Path) -> LabelClassifier:
    """Makes a `LabelClassifier` from the course's `checkpoint.pth`; `save_pretrained` then writes it as safetensors.

    The file is a pickle, which could run any code when opened. It is read by `torch.load(weights_only=True)`, which
    builds tensors and plain containers and refuses everything else. Its last layer is followed by a sigmoid, which
    `LabelClassifier` leaves out: the logits are the evaluator's outputs before it.

    Args:
        path: The file, a dictionary whose entry "model" holds the weights of torchvision's ResNet-18 with
            `fc = Sequential(Linear(512, 24), Sigmoid())`.

    Returns:
        The evaluator in eval mode and float32, for images of 64x64, with the names of i-CLEVR's labels.
    """
    if not Path(path).is_file():
        raise ValueError(f"`path` must be the course's checkpoint.pth, got {path}, which is no file.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file makes the reader fail in a dozen ways
        raise ValueError(
            f"{path} cannot be read as tensors alone ({type(error).__name__}), and nothing in it was run;"
            " it is broken, or holds pickled objects, which may be harmful. Take the course's own checkpoint.pth."
        ) from error
    weights = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict):
        found = (
            f"the keys {sorted(map(str, checkpoint))}" if isinstance(checkpoint, dict) else type(checkpoint).__name__
        )
        raise ValueError(f'{path} must hold a dictionary whose entry "model" holds the weights, got {found}.')

    evaluator = LabelClassifier(num_classes=len(ICLEVR_LABELS), label_names=list(ICLEVR_LABELS.names))
    expected = {torchvision_key(key): tensor for key, tensor in evaluator.state_dict().items()}
    missing = sorted(expected.keys() - weights.keys())
    unexpected = sorted(map(str, weights.keys() - expected.keys()))
    if missing or unexpected:
        raise ValueError(
            f'{path} must hold torchvision\'s ResNet-18 with its last layer as "fc.0"; of its {len(expected)} tensors'
            f" {len(missing)} are missing {missing[:3]}, and {len(unexpected)} are not part of it {unexpected[:3]}."
        )
    for key, tensor in expected.items():
        if not isinstance(weights[key], Tensor) or weights[key].shape != tensor.shape:
            found = tuple(weights[key].shape) if isinstance(weights[key], Tensor) else type(weights[key]).__name__
            raise ValueError(f'{path}: "{key}" must have shape {tuple(tensor.shape)}, got {found}.')
    evaluator.load_state_dict({key: weights[torchvision_key(key)] for key in evaluator.state_dict()})
    return evaluator.eval()

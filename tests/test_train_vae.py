import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from iclevr_diffusion import load_pipeline
from iclevr_diffusion.config import parse_config

SCRIPTS = Path(__file__).resolve().parents[1] / "train_scripts"
SPEC = importlib.util.spec_from_file_location("train_vae", SCRIPTS / "train_vae.py")
train_vae = sys.modules["train_vae"] = importlib.util.module_from_spec(SPEC)  # where dataclasses look for their module
SPEC.loader.exec_module(train_vae)

SMALL = {"resolution": 16, "batch_size": 4, "latent_dim": 4, "hidden_widths": (4, 8), "max_steps": 2, "log_every": 1}


@pytest.fixture
def train(tiny_dataset, tmp_path, monkeypatch):
    """Runs train_vae.py in this process and returns the folder of its outputs."""
    monkeypatch.setenv("ICLEVR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(name="run", **arguments):
        config = SMALL | {"data": str(tiny_dataset), "sample_every": 2, "score_every": 2} | arguments
        train_vae.main(train_vae.VAEConfig(output_dir=str(tmp_path / name), **config))
        return tmp_path / name

    return run


def weights(folder, name="pipeline"):
    return load_file(folder / name / "vae" / "diffusion_pytorch_model.safetensors")


def last_metrics(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"conditional": False, "standardize": False},
        {"likelihood": "gaussian", "flip": True, "ema_decay": 0.9, "max_grad_norm": 1.0},
    ],
)
def test_every_kind_of_vae_trains_logs_and_is_opened(train, arguments):
    folder = train(**arguments)
    call = {"class_labels": [["red cube"]]} if arguments.get("conditional", True) else {"num_images": 1}
    image = load_pipeline(folder / "pipeline")(**call, seeds=[0], output_type="pt").images
    assert image.shape == (1, 3, 16, 16) and torch.isfinite(image).all()
    metrics = last_metrics(folder)
    assert metrics["loss"] == pytest.approx(metrics["reconstruction_loss"] + metrics["divergence_loss"], rel=1e-5)
    assert Image.open(folder / "samples" / "step-00000002.png").width == 8 * 132
    reconstructions = Image.open(folder / "reconstructions" / "step-00000002.png")
    assert reconstructions.size == (3 * 132, 2 * 136)  # three validation images, and below each what comes back


def test_digits_train_in_grey_and_the_best_weights_on_validation_images_are_kept(train):
    folder = train(
        data="digits", architecture="mlp", hidden_widths=(8,), batch_size=64, max_steps=4, learning_rate=0.01
    )
    pipeline = load_pipeline(folder / "best_pipeline")
    assert pipeline.vocabulary.names == tuple("0123456789") and pipeline.vae.config.in_channels == 1
    assert pipeline.vae.data_mean.abs().sum() > 0
    metrics = last_metrics(folder)
    losses = metrics["validation_reconstruction_loss"], metrics["validation_divergence_loss"]
    assert metrics["validation_score"] == pytest.approx(-sum(losses)) and min(losses) > 0
    assert json.loads((folder / "best_pipeline.json").read_text())["score"] >= metrics["validation_score"]


@pytest.mark.parametrize("standardize", [True, False])
def test_without_standardization_the_encoder_sees_the_images_as_they_are(train, standardize):
    saved = weights(train(standardize=standardize, max_steps=1))
    assert (saved["data_std"] == 1).item() is not standardize and saved["data_mean"].any().item() is standardize


def test_a_resumed_vae_ends_with_the_weights_of_an_unbroken_one(train):
    unbroken = weights(train("unbroken", max_steps=4, ema_decay=0.9))
    train("stopped", max_steps=2, ema_decay=0.9)
    resumed = weights(train("stopped", max_steps=4, ema_decay=0.9))
    assert all(value.equal(unbroken[name]) for name, value in resumed.items())


def test_looking_at_a_vae_does_not_change_its_training(train):
    watched = weights(train("watched", max_steps=3, sample_every=1, score_every=1))
    alone = weights(train("alone", max_steps=3, sample_every=0, score_every=0))
    assert all(value.equal(alone[name]) for name, value in watched.items())


def test_a_last_batch_of_one_validation_image_is_scored_too(train):
    assert "validation_score" in last_metrics(train(batch_size=2, max_steps=1, score_every=1))  # of three


def test_without_validation_images_the_run_says_that_nothing_is_scored(train, monkeypatch, capsys):
    make = train_vae.TrainingData.__init__

    def without_validation_images(self, *arguments):
        make(self, *arguments)
        self.validation_indices = self.validation_indices[:0]

    monkeypatch.setattr(train_vae.TrainingData, "__init__", without_validation_images)
    folder = train(max_steps=1, score_every=1)
    assert "There are no validation images: nothing is scored" in capsys.readouterr().err
    assert not (folder / "best_pipeline").exists()


def test_processes_agree_on_the_losses_of_the_validation_images(train, monkeypatch):
    class OneOfTwo(Accelerator):
        def reduce(self, tensor, reduction="sum", **options):
            # As if the other process had found twice as much in the validation images.
            return 1.5 * tensor if reduction == "mean" and tensor.shape == (2,) else tensor

    alone = last_metrics(train("alone", max_steps=1, score_every=1, ema_decay=0.5))
    monkeypatch.setattr("iclevr_diffusion.training.Accelerator", OneOfTwo)
    beside = last_metrics(train("beside", max_steps=1, score_every=1, ema_decay=0.5))
    for name in ("validation_reconstruction_loss", "validation_divergence_loss"):
        assert beside[name] == pytest.approx(1.5 * alone[name])
    assert beside["validation_score"] == pytest.approx(1.5 * alone["validation_score"])


def test_a_decay_of_one_is_refused(train):
    with pytest.raises(ValueError, match="`ema_decay` must lie in"):
        train(ema_decay=1.0)


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("recipes/vae_*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_are_configurations(path):
    config = parse_config(train_vae.VAEConfig, ["--config", str(path)])
    assert config.output_dir == f"outputs/{path.stem}"
    assert "Hardware:" in path.read_text() and set(yaml.safe_load(path.read_text())) <= set(vars(config))

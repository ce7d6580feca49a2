"""Trains a variational auto-encoder of images, with or without labels; without `--data` it renders its own scenes first.

accelerate launch train_scripts/train_vae.py --config train_scripts/recipes/vae_digits.yaml
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from iclevr_diffusion.augmentation import random_flip
from iclevr_diffusion.config import option
from iclevr_diffusion.data import normalize
from iclevr_diffusion.ema import ExponentialMovingAverage
from iclevr_diffusion.images import make_grid, save_png
from iclevr_diffusion.losses import vae_loss
from iclevr_diffusion.models.vae_multilabel import MultiLabelVAE, logits_to_images
from iclevr_diffusion.pipelines.pipeline_conditional_vae import ConditionalVAEPipeline
from iclevr_diffusion.training import TrainingRun, run_script
from iclevr_diffusion.training_data import DataConfig, TrainingData, check_sizes

COLUMNS = 8  # of the grids


@dataclass(kw_only=True)
class VAEConfig(DataConfig):
    """Trains a variational auto-encoder of images; without --data it renders its own scenes first."""

    flip: bool = option(False, "mirror half of the images")
    init_from: str | None = option(None, "pipeline or network, also of other labels, whose weights are the first ones")
    conditional: bool = option(True, "tell encoder and decoder the labels")
    architecture: Literal["mlp", "conv"] = option("conv", "fully connected layers, for digits, or convolutions")
    latent_dim: int = option(60, "numbers that an image is encoded as")
    hidden_widths: tuple[int, ...] | None = option(
        None, "units or channels of the hidden layers; none is 400, or 32..256"
    )
    standardize: bool = option(True, "show the encoder images less their mean, at unit variance")
    likelihood: Literal["gaussian", "bernoulli"] = option("bernoulli", "what the decoder gives the parameters of")
    learning_rate: float = option(1e-3, "learning rate after the warm-up")
    max_grad_norm: float | None = option(None, "gradients longer than this are scaled down to it; none leaves them")
    ema_decay: float = option(0.0, "decay of the averaged weights, the ones that are saved; 0 is off")

    sample_every: int = option(500, "steps between grids of samples and reconstructions; 0 is never", may_change=True)
    score_every: int = option(500, "steps between losses of the validation images; 0 is never", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must lie in [0, 1), got {self.ema_decay}.")
        check_sizes(lambda: make_vae(self, num_classes=1, in_channels=1))


def make_vae(config: VAEConfig, num_classes: int, in_channels: int) -> MultiLabelVAE:
    """Makes a freshly initialized network."""
    return MultiLabelVAE(
        config.latent_dim,
        num_classes,
        config.resolution,
        in_channels=in_channels,
        architecture=config.architecture,
        hidden_widths=config.hidden_widths,
    )


def negative_bound(
    config: VAEConfig, vae: torch.nn.Module, pixel_values: Tensor, class_labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the two losses, reconstruction and divergence, in nats an image."""
    logits, mean, log_variance = vae(pixel_values, class_labels if config.conditional else None)
    prediction = logits if config.likelihood == "bernoulli" else logits_to_images(logits)
    return vae_loss(prediction, pixel_values, mean, log_variance, likelihood=config.likelihood)


@torch.no_grad()
def score(run: TrainingRun, config: VAEConfig, pipeline: ConditionalVAEPipeline, data: TrainingData) -> None:
    """Logs the losses of the validation images, with the same noise every time, and keeps the best pipeline."""
    device = run.accelerator.device
    run.share_buffers(pipeline.vae)
    total = torch.zeros(2, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), run.accelerator.autocast():
        torch.manual_seed(0)
        for start in range(0, len(data.validation_indices), config.batch_size):
            rows = data.validation_indices[start : start + config.batch_size]
            pixel_values = normalize(torch.from_numpy(data.store.pixel_values[rows]).to(device))
            class_labels = torch.from_numpy(data.store.class_labels[rows]).to(device)
            total += len(rows) * torch.stack(negative_bound(config, pipeline.vae, pixel_values, class_labels))
    # The processes must agree on what is best to the last bit, or one waits for the other in vain.
    total = run.accelerator.reduce(total, "mean")
    reconstruction, divergence = (total / len(data.validation_indices)).tolist()
    run.log(validation_reconstruction_loss=reconstruction, validation_divergence_loss=divergence)
    run.keep_best(
        -reconstruction - divergence, pipeline, {"score": "bound on the log-likelihood of validation images"}
    )


def draw(run: TrainingRun, pipeline: ConditionalVAEPipeline, data: TrainingData) -> None:
    """Writes a grid of samples, a label set a row, and one of validation images, each row above its reconstructions."""
    if not run.accelerator.is_main_process:
        return
    name, num_images = f"step-{run.step:08d}.png", COLUMNS**2
    indices = data.validation_indices if len(data.validation_indices) else data.indices
    width = min(COLUMNS, len(indices))
    indices = indices[: min(4, len(indices) // width) * width]  # whole rows
    pixel_values = normalize(torch.from_numpy(data.store.pixel_values[indices])) / 2 + 0.5
    labels, captions, kwargs = None, None, {"num_images": num_images}
    if pipeline.vocabulary is not None:
        conditions = [names for names in sorted(data.choose_conditions(2 * COLUMNS)) for _ in range(COLUMNS)]
        captions, kwargs = ["\n".join(names) for names in conditions], {"class_labels": conditions}
        labels, num_images = torch.from_numpy(data.store.class_labels[indices]), len(conditions)
    with run.accelerator.autocast():
        samples = pipeline(**kwargs, seeds=list(range(num_images))).images
        mean, _ = pipeline.encode(pixel_values, labels)
        kwargs = {"num_images": len(mean)} if labels is None else {"class_labels": labels}
        decoded = pipeline(**kwargs, latents=mean).images
    save_png(make_grid(samples, captions, columns=COLUMNS), run.output_dir / "samples" / name, {"step": run.step})
    originals, rows = pipeline.image_processor.postprocess(2 * pixel_values - 1), []
    for start in range(0, len(originals), width):
        rows += originals[start : start + width] + decoded[start : start + width]
    save_png(make_grid(rows, columns=width), run.output_dir / "reconstructions" / name, {"step": run.step})


def main(config: VAEConfig) -> None:
    run = TrainingRun(config)
    data = TrainingData(run, config)

    names = data.store.vocabulary.names if config.conditional else ()
    vae = make_vae(config, len(names), data.store.pixel_values.shape[1])
    run.start_from(config.init_from, vae, names)
    # Without standardisation they are reset, since `init_from` brings those of its own data.
    unchanged = torch.zeros_like(vae.data_mean), 1.0
    vae.set_data_statistics(*(data.store.statistics(data.indices) if config.standardize else unchanged))
    ema = run.track(ExponentialMovingAverage(vae, config.ema_decay))
    optimizer = torch.optim.Adam(vae.parameters(), lr=config.learning_rate)
    model, optimizer, lr_scheduler = run.prepare(vae, optimizer, run.lr_scheduler(optimizer))
    pipeline = ConditionalVAEPipeline(ema.model, names or None)
    if not len(data.validation_indices):
        run.print("There are no validation images: nothing is scored on the way, and no `best_pipeline` is kept.")

    for batch in run.batches(data.loader):
        pixel_values = normalize(batch["pixel_values"])
        pixel_values = random_flip(pixel_values) if config.flip else pixel_values
        reconstruction, divergence = negative_bound(config, model, pixel_values, batch["class_labels"])
        loss = reconstruction + divergence

        run.backward(loss)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        run.log(loss=loss, reconstruction_loss=reconstruction, divergence_loss=divergence)
        if run.weights_moved:
            ema.step(vae)

        if run.every(config.sample_every):
            draw(run, pipeline, data)
        if run.every(config.score_every) and len(data.validation_indices):
            score(run, config, pipeline, data)
        if run.every(config.save_every) or run.stopping:
            run.save_pipeline(pipeline)

    run.save_pipeline(pipeline)
    run.finish()


if __name__ == "__main__":
    run_script(main, VAEConfig)

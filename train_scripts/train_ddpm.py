"""Trains a conditional diffusion model; without `--data` it renders its own scenes first.

accelerate launch train_scripts/train_ddpm.py --config train_scripts/recipes/tiny_rendered.yaml
"""

from dataclasses import dataclass
from typing import Literal

import torch

from iclevr_diffusion import ConditionalDDPMPipeline
from iclevr_diffusion.augmentation import random_flip
from iclevr_diffusion.config import LearningRateSchedule, option
from iclevr_diffusion.data import normalize
from iclevr_diffusion.denoiser import DenoiserConfig, choose_attention, make_denoiser, make_scheduler
from iclevr_diffusion.diffusion import add_noise, error_weight, noise_levels, path_of, sample_times, training_target
from iclevr_diffusion.ema import check_lengths, make_averages
from iclevr_diffusion.training import TrainingRun, run_script
from iclevr_diffusion.training_data import TrainingData
from iclevr_diffusion.validation import Validation


@dataclass(kw_only=True)
class DDPMConfig(DenoiserConfig):
    """Trains a conditional diffusion model; without --data it renders its own scenes first."""

    flip: bool = option(False, "mirror half of the images")
    init_from: str | None = option(None, "pipeline or network, also of other labels, whose weights are the first ones")
    compile: bool = option(False, "compile the network with torch.compile")
    min_snr_gamma: float | None = option(None, "gamma of min-SNR weighting, 5 in its paper; none weighs all alike")
    label_dropout: float = option(0.1, "share of images trained without labels, which guidance needs")
    standardize: bool = option(True, "show the network images less their mean, at unit variance")
    learning_rate: float = option(6e-4, "learning rate after the warm-up")
    warmup_steps: int = option(200, "steps over which the learning rate rises")
    lr_schedule: LearningRateSchedule = option("warmup-stable-decay", "course of the learning rate after the warm-up")
    weight_decay: float = option(0.01, "weight decay of AdamW")
    ema_decay: float = option(0.9995, "decay of the averaged weights, the ones that are saved")
    ema_lengths: tuple[float, ...] = option((), "more averages to choose from, as shares of the training: 0.05 0.1")

    sample_every: int = option(500, "steps or epochs between grids of samples; 0 is never", may_change=True)
    sample_unit: Literal["steps", "epochs"] = option("steps", "what `sample_every` counts", may_change=True)
    score_every: int = option(1000, "steps between scores on validation labels; 0 is never", may_change=True)
    judge: str | None = option(None, "judge folder that scores samples; none scores nothing", may_change=True)
    num_conditions: int = option(64, "validation label sets to score on; 16 are also drawn", may_change=True)
    num_inference_steps: int = option(20, "sampling steps, here and by the pipeline's default", may_change=True)
    guidance_scale: float = option(2.0, "guidance, here and by the pipeline's default; 1 is off", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("label_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")
        check_lengths("ema_lengths", self.ema_lengths)
        if self.prediction_type == "edm" and (self.time_sampling != "logit-normal" or not self.standardize):
            got = f"{self.time_sampling} and {self.standardize}"
            raise ValueError(f"`time_sampling` must be logit-normal and `standardize` true for edm, got {got}.")
        if self.min_snr_gamma is not None and not 0 < self.min_snr_gamma < float("inf"):
            raise ValueError(f"`min_snr_gamma` must be positive and finite, got {self.min_snr_gamma}.")
        if self.num_conditions < 1:
            raise ValueError(f"`num_conditions` must be at least 1, got {self.num_conditions}.")
        if not 1 <= self.num_inference_steps <= self.num_train_timesteps:
            raise ValueError(
                f"`num_inference_steps` must lie between 1 and the {self.num_train_timesteps} of `num_train_timesteps`,"
                f" got {self.num_inference_steps}."
            )
        if self.label_dropout and self.use_label_embedding is False:
            raise ValueError(f"`label_dropout` must be 0 without `use_label_embedding`, got {self.label_dropout}.")
        if self.label_dropout == 0 and self.guidance_scale != 1:
            raise ValueError(f"`guidance_scale` must be 1 without `label_dropout`, got {self.guidance_scale}.")


def main(config: DDPMConfig) -> None:
    run = TrainingRun(config)
    data = TrainingData(run, config)

    unet = make_denoiser(
        config,
        num_classes=len(data.store.vocabulary),
        in_channels=data.store.pixel_values.shape[1],
        null_condition=config.label_dropout > 0,
        empty_condition=not data.store.class_labels[data.indices].any(axis=1).all(),
    )
    run.start_from(config.init_from, unet, data.store.vocabulary.names)
    # Without standardisation they are reset, since `init_from` brings those of its own data.
    statistics = data.store.statistics(data.indices) if config.standardize else (torch.tensor(0.0), 1.0)
    unet.set_data_statistics(*statistics)
    averages = make_averages(unet, config.ema_decay, config.ema_lengths)
    averages = {key: run.track(average, f"ema{key}") for key, average in averages.items()}
    choose_attention(unet, run.accelerator.device, run.accelerator.mixed_precision)
    if config.compile:
        unet.compile()
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(unet.parameters(), **settings)
    model, optimizer, lr_scheduler = run.prepare(unet, optimizer, run.lr_scheduler(optimizer))

    scheduler = make_scheduler(config, bound=unet.bound)
    path = path_of(config.prediction_type, scheduler, run.accelerator.device)
    parts = (scheduler, data.store.vocabulary.names, config.num_inference_steps, config.guidance_scale)
    pipelines = {f"pipeline{key}": ConditionalDDPMPipeline(average.model, *parts) for key, average in averages.items()}
    conditions = data.choose_conditions(config.num_conditions)
    validation = Validation(run, pipelines["pipeline"], conditions, config.judge, data=data)
    images_a_step = config.batch_size * config.gradient_accumulation_steps * run.accelerator.num_processes
    steps_an_epoch = max(1, round(len(data.indices) / images_a_step))
    sample_every = config.sample_every * (steps_an_epoch if config.sample_unit == "epochs" else 1)

    for batch in run.batches(data.loader):
        pixel_values, class_labels = normalize(batch["pixel_values"]), batch["class_labels"]
        x_0 = unet.standardize(random_flip(pixel_values) if config.flip else pixel_values)
        noise = torch.randn_like(x_0)
        times = sample_times(len(x_0), config.time_sampling, shift=config.time_shift, device=x_0.device)
        timesteps, alpha, sigma = noise_levels(times, path)
        null_mask = torch.rand(len(x_0), device=x_0.device) < config.label_dropout if config.label_dropout else None
        x_t = add_noise(x_0, noise, alpha, sigma)
        prediction = model(x_t, timesteps, class_labels, null_mask).sample.float()
        error = (prediction - training_target(config.prediction_type, x_0, noise, alpha, sigma)).square()
        weight = error_weight(config.prediction_type, alpha, sigma, config.min_snr_gamma, config.puts_out_images)
        loss = (weight * error).mean()

        run.backward(loss)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        run.log(loss=loss)
        if run.weights_moved:
            for average in averages.values():
                average.step(unet)

        if run.every(sample_every):
            validation.draw()
        if run.every(config.score_every):
            validation.score()
        if run.every(config.save_every) or run.stopping:
            for name, pipeline in pipelines.items():
                run.save_pipeline(pipeline, name)

    for name, pipeline in pipelines.items():
        run.save_pipeline(pipeline, name)
    if config.ema_lengths:
        validation.choose(pipelines)
    run.finish()


if __name__ == "__main__":
    run_script(main, DDPMConfig)

"""Trains a GAN that draws images with given labels; without `--data` it renders its own scenes first.

accelerate launch train_scripts/train_gan.py --config train_scripts/recipes/sagan_evaluator_real.yaml
"""

from dataclasses import dataclass
from typing import Literal

import torch

from iclevr_diffusion.augmentation import DIFF_AUGMENT_POLICIES, discriminate, random_flip
from iclevr_diffusion.config import option
from iclevr_diffusion.data import normalize
from iclevr_diffusion.ema import ExponentialMovingAverage
from iclevr_diffusion.gan_networks import WITH_SPECTRAL_NORM, GANNetworksConfig, make_gan, refuse_ignored
from iclevr_diffusion.losses import (
    ADVERSARIAL_LOSSES,
    auxiliary_loss,
    evaluator_loss,
    gradient_penalty,
    r1_penalty,
    ramp_weight,
)
from iclevr_diffusion.pipelines.pipeline_conditional_gan import ConditionalGANPipeline
from iclevr_diffusion.training import TrainingRun, run_script
from iclevr_diffusion.training_data import TrainingData
from iclevr_diffusion.validation import Validation, open_reader


@dataclass(kw_only=True)
class GANConfig(GANNetworksConfig):
    """Trains a GAN that draws images with given labels; without --data it renders its own scenes first."""

    flip: bool = option(False, "mirror half of the images")
    init_from: str | None = option(
        None, "pipeline or generator, also of other labels, whose weights are the first; the discriminator starts anew"
    )
    loss: Literal["hinge", "nonsaturating", "wasserstein"] = option("hinge", "what the two networks minimize")
    learning_rate: float = option(2e-4, "learning rate after the warm-up; of the generator, if there are two")
    discriminator_learning_rate: float | None = option(None, "learning rate of the discriminator; none is the same")
    weight_decay: float = option(0.0, "weight decay of Adam")
    num_critic_steps: int = option(1, "steps of the discriminator for one of the generator")
    ramp_steps: int = option(0, "steps over which the auxiliary and the evaluator's weight rise from 0")
    evaluator: str | None = option(None, "judge that teaches the generator; it may not judge the result alone")
    evaluator_weight: float = option(1.0, "weight of what the evaluator reads in drawn images")
    diff_augment: tuple[str, ...] = option(
        (), "changes of the images that the discriminator tells apart: color translation cutout"
    )

    sample_every: int = option(500, "steps between grids of samples; 0 is never", may_change=True)
    score_every: int = option(1000, "steps between scores on validation labels; 0 is never", may_change=True)
    judge: str | None = option(None, "judge folder that scores samples; none scores nothing", may_change=True)
    num_conditions: int = option(64, "validation label sets to score on; 16 are also drawn", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("num_critic_steps", 1), ("num_conditions", 1), ("ramp_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if self.num_critic_steps > self.max_steps:
            raise ValueError(
                f"`num_critic_steps` must not exceed `max_steps` {self.max_steps}, or the generator takes no step, got"
                f" {self.num_critic_steps}."
            )
        if not 0 <= self.evaluator_weight < float("inf"):
            raise ValueError(f"`evaluator_weight` must be finite and at least 0, got {self.evaluator_weight}.")
        if self.evaluator is not None and not self.conditional:
            raise ValueError(f"`evaluator` must be none where `conditional` is false, got {self.evaluator}.")
        refuse_ignored(self, "evaluator_weight", "`evaluator`", self.evaluator)
        # An evaluator of weight 0 will do, so that a recipe can be tried without it by one flag.
        refuse_ignored(
            self, "ramp_steps", "`auxiliary_weight` or `evaluator`", self.auxiliary_weight or self.evaluator
        )
        if self.discriminator_learning_rate is not None and not self.discriminator_learning_rate > 0:
            raise ValueError(
                f"`discriminator_learning_rate` must be positive or none, got {self.discriminator_learning_rate}."
            )
        unknown = [name for name in self.diff_augment if name not in DIFF_AUGMENT_POLICIES]
        if unknown:
            raise ValueError(
                f"`diff_augment` must be some of {', '.join(DIFF_AUGMENT_POLICIES)}, got {', '.join(unknown)}."
            )
        is_bounded = self.clip_weights or self.gradient_penalty_weight or self.r1_weight
        if self.loss == "wasserstein" and not is_bounded and self.discriminator not in WITH_SPECTRAL_NORM:
            raise ValueError(
                "`loss` must not be wasserstein where nothing bounds the critic's slope; take `clip_weights` 0.01,"
                f" `gradient_penalty_weight` 10 or a discriminator with spectral norm, got {self.discriminator}."
            )


def main(config: GANConfig) -> None:
    run = TrainingRun(config)
    data = TrainingData(run, config)
    device = run.accelerator.device
    names = list(data.store.vocabulary.names) if config.conditional else []

    statistics = data.store.statistics(data.indices) if config.standardize else None
    generator, discriminator = make_gan(config, len(names), data.store.pixel_values.shape[1], statistics)
    run.start_from(config.init_from, generator, names)
    if statistics is not None:  # `init_from` brings those of its own data
        generator.set_data_statistics(torch.from_numpy(statistics[0]), statistics[1])
    discriminator_loss, generator_loss = ADVERSARIAL_LOSSES[config.loss]
    evaluator = None
    if config.evaluator is not None and config.evaluator_weight:
        evaluator = open_reader("evaluator", config.evaluator, names, data.example(device)).requires_grad_(False)
    ema = run.track(ExponentialMovingAverage(generator, config.ema_decay))
    options = {"betas": config.betas, "weight_decay": config.weight_decay}
    rates = config.learning_rate, config.discriminator_learning_rate or config.learning_rate
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=rates[0], **options)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=rates[1], **options)
    generator, discriminator, g_optimizer, d_optimizer, g_scheduler, d_scheduler = run.prepare(
        *(generator, discriminator, g_optimizer, d_optimizer),
        *(run.lr_scheduler(optimizer) for optimizer in (g_optimizer, d_optimizer)),
    )
    pipeline = ConditionalGANPipeline(ema.model, names)
    validation = Validation(run, pipeline, data.choose_conditions(config.num_conditions), config.judge, data=data)

    for batch in run.batches(data.loader):
        generator.train(), discriminator.train()
        real, class_labels = normalize(batch["pixel_values"]), batch["class_labels"][:, : len(names)]
        real = random_flip(real) if config.flip else real
        fake = generator(torch.randn(len(real), config.latent_dim, device=device), class_labels)
        auxiliary_weight, evaluator_weight = (
            ramp_weight(weight, run.step, start=0, stop=config.ramp_steps)
            for weight in (config.auxiliary_weight, config.evaluator_weight)
        )

        real_logits, real_classes = discriminate(discriminator, real, class_labels, config.diff_augment)
        fake_logits, fake_classes = discriminate(discriminator, fake.detach(), class_labels, config.diff_augment)
        loss = discriminator_loss(real_logits, fake_logits)
        run.log(discriminator_loss=loss, real_logits=real_logits.mean(), fake_logits=fake_logits.mean())
        if config.auxiliary_weight:
            reading = auxiliary_loss(real_classes, class_labels) + auxiliary_loss(fake_classes, class_labels)
            loss = loss + auxiliary_weight * reading
            run.log(auxiliary_loss=reading)
        if config.gradient_penalty_weight:
            penalty = gradient_penalty(lambda images: discriminator(images, class_labels)[0], real, fake)  # noqa: B023
            loss = loss + config.gradient_penalty_weight * penalty
            run.log(gradient_penalty=penalty)
        if config.r1_weight and run.step % config.r1_every == 0:
            penalty = r1_penalty(lambda images: discriminator(images, class_labels)[0], real)  # noqa: B023
            loss = loss + config.r1_weight * config.r1_every * penalty
            run.log(r1_penalty=penalty)
        run.backward(loss, discriminator, "discriminator")
        d_optimizer.step()
        if config.clip_weights is not None:
            for weight in discriminator.parameters():
                weight.data.clamp_(-config.clip_weights, config.clip_weights)

        if run.step % config.num_critic_steps == 0:
            # Not the prepared one, whose gradients processes would exchange: here it only passes them on.
            network = run.unwrap(discriminator).requires_grad_(False)
            with run.accelerator.autocast():
                fake_logits, fake_classes = discriminate(network, fake, class_labels, config.diff_augment)
            loss = generator_loss(fake_logits)
            run.log(generator_loss=loss)
            if config.auxiliary_weight:
                loss = loss + auxiliary_weight * auxiliary_loss(fake_classes, class_labels)
            if evaluator is not None:
                reading = evaluator_loss(evaluator(fake.float()).logits, class_labels)
                loss = loss + evaluator_weight * reading
                run.log(evaluator_loss=reading)
            run.backward(loss, generator, "generator")
            network.requires_grad_(True)
            g_optimizer.step()
            if run.weights_moved:
                ema.step(run.unwrap(generator))
        for item in (d_scheduler, g_scheduler):
            item.step()
        for item in (d_optimizer, g_optimizer):
            item.zero_grad()

        if run.every(config.sample_every):
            validation.draw()
        if run.every(config.score_every):
            validation.score()
        if run.every(config.save_every) or run.stopping:
            run.save_pipeline(pipeline)

    run.save_pipeline(pipeline)
    run.finish()


if __name__ == "__main__":
    run_script(main, GANConfig)

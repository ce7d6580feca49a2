"""Trains a CycleGAN, which maps images of domain A to domain B and back; without `--data` it renders its own scenes.

accelerate launch train_scripts/train_cyclegan.py --config train_scripts/recipes/cyclegan_noise_real.yaml
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iclevr_diffusion.config import LearningRateSchedule, option
from iclevr_diffusion.domains import UnpairedImages
from iclevr_diffusion.ema import ExponentialMovingAverage
from iclevr_diffusion.gan_networks import AdversarialConfig
from iclevr_diffusion.images import make_table, save_png
from iclevr_diffusion.losses import cycle_loss, identity_loss
from iclevr_diffusion.models.cyclegan import CycleGANDiscriminator, CycleGANGenerator, ImagePool
from iclevr_diffusion.pipelines.pipeline_cyclegan import CycleGANPipeline
from iclevr_diffusion.training import TrainingRun, run_script
from iclevr_diffusion.training_data import TrainingData


@dataclass(kw_only=True)
class CycleGANConfig(AdversarialConfig):
    """Trains a CycleGAN, which maps images of domain A to domain B and back; domain B is the images of --data."""

    domain_a: str = option(
        "images",
        "`images` (those of domain B, shuffled), `noise`, or whatever `data` may be",
        may_change=True,  # the run pins the images themselves
    )
    block_out_channels: tuple[int, ...] = option((64, 128, 256), "channels of the generators, finest first")
    num_residual_blocks: int = option(6, "residual blocks of the generators")
    discriminator_channels: tuple[int, ...] = option((64, 128, 256, 512), "channels of the discriminators")
    cycle_weight: float = option(10.0, "weight of the difference between images and what comes back")
    identity_weight: float = option(0.0, "weight of leaving images of the target domain alone, up to 5 in the paper")
    pool_size: int = option(50, "generated images of which a discriminator is shown older ones as well")
    batch_size: int = option(16, "images of each domain a process; 1 in the paper")
    learning_rate: float = option(2e-4, "learning rate of all networks, at first")
    lr_schedule: LearningRateSchedule = option("warmup-stable-decay", "course of the learning rate after the warm-up")
    decay_fraction: float = option(0.5, "last part of warmup-stable-decay, in which the learning rate falls to 0")

    sample_every: int = option(500, "steps between pictures of mapped images; 0 is never", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool_size < 1:
            raise ValueError(f"`pool_size` must be at least 1, got {self.pool_size}.")
        if self.hold_out is not None and self.domain_a not in ("images", "noise"):
            raise ValueError(
                f"`hold_out` must be none where `domain_a` has images of its own, of which it leaves none out, got"
                f" {self.hold_out} for {self.domain_a}."
            )
        for name in ("cycle_weight", "identity_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be finite and at least 0, got {getattr(self, name)}.")


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Least squares with the targets 1 and 0, halved, as in section 7.1 of Zhu et al., for logits of any shape."""
    return 0.5 * ((real_logits.float() - 1).square().mean() + fake_logits.float().square().mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Least squares with the target 1, for logits of any shape."""
    return (fake_logits.float() - 1).square().mean()


def recall(run: TrainingRun, pool: ImagePool, images: Tensor, draws: torch.Generator) -> Tensor:
    """Returns what the pool shows for new images (B, C, H, W); all processes keep the same pool of the images of all."""
    shown = pool.exchange(run.accelerator.gather(images.detach()), draws)
    return shown.chunk(run.accelerator.num_processes)[run.accelerator.process_index]


def draw(run: TrainingRun, pipeline: CycleGANPipeline, examples: dict[str, Tensor]) -> None:
    """Writes a picture to `output_dir/samples`: for each direction rows of images, what they are mapped to, and back."""
    if not run.accelerator.is_main_process:
        return
    rows = []
    for direction, back, domain in (("a_to_b", "b_to_a", "a"), ("b_to_a", "a_to_b", "b")):
        images = examples[domain] / 2 + 0.5
        mapped = pipeline(images, direction, output_type="pt").images
        rows += [images, mapped, pipeline(mapped, back, output_type="pt").images]
    captions, processor = ["A", "A to B", "A to B to A", "B", "B to A", "B to A to B"], pipeline.image_processor
    table = make_table([processor.numpy_to_pil(processor.pt_to_numpy(row)) for row in rows], captions)
    save_png(table, run.output_dir / "samples" / f"step-{run.step:08d}.png", {"step": run.step, "rows": captions})


def main(config: CycleGANConfig) -> None:
    run = TrainingRun(config)
    data = TrainingData(run, config)
    domains = UnpairedImages(run, data, config, config.domain_a)

    channels = domains.num_channels
    a_to_b, b_to_a = (
        CycleGANGenerator(
            *(config.resolution, channels, channels),
            block_out_channels=config.block_out_channels,
            num_residual_blocks=config.num_residual_blocks,
        )
        for _ in range(2)
    )
    discriminator_a, discriminator_b = (
        CycleGANDiscriminator(config.resolution, channels, config.discriminator_channels) for _ in range(2)
    )
    pool_a, pool_b = (run.track(ImagePool(config.pool_size), name) for name in ("pool_a", "pool_b"))
    ema_a_to_b = run.track(ExponentialMovingAverage(a_to_b, config.ema_decay), "ema_a_to_b")
    ema_b_to_a = run.track(ExponentialMovingAverage(b_to_a, config.ema_decay), "ema_b_to_a")
    g_optimizer, d_optimizer = (
        torch.optim.Adam(nn.ModuleList(pair).parameters(), lr=config.learning_rate, betas=config.betas)
        for pair in ((a_to_b, b_to_a), (discriminator_a, discriminator_b))
    )
    a_to_b, b_to_a, discriminator_a, discriminator_b = run.prepare(a_to_b, b_to_a, discriminator_a, discriminator_b)
    g_optimizer, d_optimizer, g_scheduler, d_scheduler = run.prepare(
        *(g_optimizer, d_optimizer),
        *(run.lr_scheduler(optimizer) for optimizer in (g_optimizer, d_optimizer)),
    )
    generators, discriminators = nn.ModuleList([a_to_b, b_to_a]), nn.ModuleList([discriminator_a, discriminator_b])
    pipeline = CycleGANPipeline(ema_a_to_b.model, ema_b_to_a.model)
    examples = domains.examples(8)

    for batch in run.batches(domains):
        a, b = batch["a"], batch["b"]
        fake_a, fake_b = b_to_a(b), a_to_b(a)

        draws = torch.Generator().manual_seed((config.seed << 32) + run.step)  # the same on all processes
        loss_a = discriminator_loss(discriminator_a(a), discriminator_a(recall(run, pool_a, fake_a, draws)))
        loss_b = discriminator_loss(discriminator_b(b), discriminator_b(recall(run, pool_b, fake_b, draws)))
        run.log(discriminator_loss_a=loss_a, discriminator_loss_b=loss_b)
        run.backward(loss_a + loss_b, discriminators, "discriminators")
        d_optimizer.step()

        # Not the prepared ones, whose gradients processes would exchange: here they only pass them on.
        discriminators.requires_grad_(False)
        with run.accelerator.autocast():
            loss_a = generator_loss(run.unwrap(discriminator_a)(fake_a))
            loss_b = generator_loss(run.unwrap(discriminator_b)(fake_b))
        cycle = cycle_loss(b_to_a(fake_b), a) + cycle_loss(a_to_b(fake_a), b)
        loss = loss_a + loss_b + config.cycle_weight * cycle
        run.log(generator_loss_a=loss_a, generator_loss_b=loss_b, cycle_loss=cycle)
        if config.identity_weight:
            identity = identity_loss(b_to_a(a), a) + identity_loss(a_to_b(b), b)
            loss = loss + config.identity_weight * identity
            run.log(identity_loss=identity)
        run.backward(loss, generators, "generators")
        discriminators.requires_grad_(True)
        g_optimizer.step()
        if run.weights_moved:
            ema_a_to_b.step(run.unwrap(a_to_b))
            ema_b_to_a.step(run.unwrap(b_to_a))
        for item in (d_scheduler, g_scheduler):
            item.step()
        for item in (d_optimizer, g_optimizer):
            item.zero_grad()

        if run.every(config.sample_every):
            draw(run, pipeline, examples)
        if run.every(config.save_every) or run.stopping:
            run.save_pipeline(pipeline)

    run.save_pipeline(pipeline)
    run.finish()


if __name__ == "__main__":
    run_script(main, CycleGANConfig)

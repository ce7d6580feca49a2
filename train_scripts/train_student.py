"""Trains a student that draws in few steps and without guidance what a diffusion model draws in many; needs no images.

accelerate launch train_scripts/train_student.py --config train_scripts/recipes/student_tokens_rendered.yaml
"""

import json
from dataclasses import dataclass

import numpy as np
import torch

from iclevr_diffusion import ConditionalDDPMPipeline, load_pipeline
from iclevr_diffusion.augmentation import augment
from iclevr_diffusion.config import LearningRateSchedule, TrainConfig, option
from iclevr_diffusion.denoiser import choose_attention
from iclevr_diffusion.distillation import Prompts, Teacher, make_student
from iclevr_diffusion.ema import ExponentialMovingAverage
from iclevr_diffusion.flow_solver import make_flow_solver
from iclevr_diffusion.gan_networks import refuse_ignored
from iclevr_diffusion.judging import weights_sha256
from iclevr_diffusion.losses import evaluator_loss
from iclevr_diffusion.provenance import training_facts
from iclevr_diffusion.training import TrainingRun, run_script
from iclevr_diffusion.validation import Validation, open_reader


@dataclass(kw_only=True)
class StudentConfig(TrainConfig):
    """Trains a student that draws in few steps and without guidance what a diffusion model draws in many."""

    teacher: str = option("conditional-ddpm-tokens-real", "pipeline that predicts a flow's velocity", may_change=True)
    teacher_steps: int = option(20, "steps of DPM-Solver++ that the teacher takes, a multiple of the student's")
    guidance_scale: float | None = option(
        None, "the teacher's guidance, which the student learns; none is its default"
    )
    guidance_start: float = option(0.0, "part of the teacher's steps after which it is guided, from 0 to 1")
    guidance_stop: float = option(1.0, "part of the teacher's steps after which it is no longer guided, from 0 to 1")
    num_student_steps: int = option(4, "network calls of the student")
    time_shift: float = option(5.0, "above 1, the steps of both move towards noise")
    init_from: str | None = option(
        None, "student with other steps whose weights are the first ones; none is the teacher"
    )
    batch_size: int = option(16, "images a process and micro-step; the student learns all its steps on each")
    learning_rate: float = option(3e-4, "learning rate after the warm-up")
    warmup_steps: int = option(50, "steps over which the learning rate rises")
    lr_schedule: LearningRateSchedule = option("warmup-stable-decay", "course of the learning rate after the warm-up")
    ema_decay: float = option(0.99, "decay of the averaged weights, the ones that are saved")
    evaluator: str | None = option(None, "judge that teaches too; it may not judge the result alone")
    evaluator_weight: float = option(0.1, "weight of what the evaluator reads in drawn images")

    sample_every: int = option(100, "steps between grids of samples; 0 is never", may_change=True)
    score_every: int = option(200, "steps between scores; 0 is never", may_change=True)
    judge: str | None = option(None, "judge folder that scores samples; none scores nothing", may_change=True)
    num_conditions: int = option(64, "label sets to score on; 16 are also drawn", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must lie in [0, 1), got {self.ema_decay}.")
        for name in ("teacher_steps", "num_student_steps", "num_conditions"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.guidance_start <= self.guidance_stop <= 1:
            raise ValueError(
                "`guidance_start` and `guidance_stop` must be fractions of the way with 0 <= start <= stop <= 1, got"
                f" {self.guidance_start} and {self.guidance_stop}."
            )
        if not 0 < self.time_shift < float("inf"):
            raise ValueError(f"`time_shift` must be positive and finite, got {self.time_shift}.")
        if not 0 <= self.evaluator_weight < float("inf"):
            raise ValueError(f"`evaluator_weight` must be finite and at least 0, got {self.evaluator_weight}.")
        refuse_ignored(self, "evaluator_weight", "`evaluator`", self.evaluator)


def main(config: StudentConfig) -> None:
    run = TrainingRun(config)
    device = run.accelerator.device
    try:
        pipeline, facts = load_pipeline(config.teacher, device=device), training_facts(config.teacher)
    except ValueError as error:
        raise ValueError(f"`teacher`: {error}") from None
    if not facts["conditions"]:
        raise ValueError(
            f"`teacher` must say which label sets it was trained on, in a file conditions.json, got {config.teacher}."
        )
    guidance_scale = config.guidance_scale
    if guidance_scale is None:
        guidance_scale = pipeline.config.get("default_guidance_scale", 1.0)  # a GAN, say, is refused below
    teacher = Teacher(
        pipeline,
        num_steps=config.teacher_steps,
        num_student_steps=config.num_student_steps,
        guidance_scale=guidance_scale,
        guidance_interval=(config.guidance_start, config.guidance_stop),
        time_shift=config.time_shift,
    )
    prompts = Prompts(
        *(facts["conditions"], pipeline.vocabulary, config.batch_size),
        seed=config.seed,
        device=device,
        num_processes=run.accelerator.num_processes,
        process_index=run.accelerator.process_index,
    )
    networks = (pipeline.unet,) if pipeline.guide is None else (pipeline.unet, pipeline.guide)
    run.pin(teacher=weights_sha256(*networks), guidance_scale=guidance_scale)
    images = {"data": facts["data_sha256"], "split": facts["split"], "teacher_judges": facts["judges"]}
    run.describe("data.json", json.dumps(images, indent=2) + "\n")
    run.describe("conditions.json", json.dumps(facts["conditions"]) + "\n")

    unet = make_student(pipeline.unet)
    run.start_from(config.init_from, unet, pipeline.vocabulary.names)
    unet.set_data_statistics(pipeline.unet.data_mean, pipeline.unet.data_std)  # not those of other first weights
    ema = run.track(ExponentialMovingAverage(unet, config.ema_decay))
    choose_attention(unet, device, run.accelerator.mixed_precision)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    model, optimizer, lr_scheduler = run.prepare(unet, optimizer, run.lr_scheduler(optimizer))
    scheduler = make_flow_solver(config.time_shift, solver_order=1)
    student = ConditionalDDPMPipeline(
        *(ema.model, scheduler, pipeline.vocabulary.names, config.num_student_steps, 1.0),
        student_num_inference_steps=config.num_student_steps,
    )
    order = np.random.default_rng(0).permutation(len(facts["conditions"]))[: config.num_conditions]
    validation = Validation(run, student, [facts["conditions"][i] for i in order], config.judge)

    evaluator = None
    if config.evaluator is not None and config.evaluator_weight:
        blank = torch.zeros(1, *unet.data_mean.shape, device=device)
        evaluator = open_reader("evaluator", config.evaluator, pipeline.vocabulary.names, blank).requires_grad_(False)

    lengths = (teacher.sigmas[:-1] - teacher.sigmas[1:]).to(device).view(-1, 1, 1, 1, 1)
    timesteps = teacher.timesteps.repeat_interleave(config.batch_size)
    for batch in run.batches(prompts):
        with run.accelerator.autocast():
            starts, ends = teacher.show(ema.model, batch["class_labels"], batch["seeds"])
        velocities = (starts - ends) / lengths  # (num_student_steps, B, C, H, W)
        class_labels = batch["class_labels"].repeat(config.num_student_steps, 1)
        prediction = model(starts.flatten(0, 1), timesteps, class_labels).sample.float()
        errors = (prediction - velocities.flatten(0, 1)).square().unflatten(0, (config.num_student_steps, -1))
        loss = errors.mean()
        if evaluator is not None:
            with run.accelerator.autocast():
                x_0 = teacher.walk(model, batch["class_labels"], batch["seeds"])[-1]
            drawn = augment(unet.unstandardize(x_0).clamp(-1, 1))
            reading = evaluator_loss(evaluator(drawn).logits, batch["class_labels"])
            loss = loss + config.evaluator_weight * reading
            run.log(evaluator_loss=reading)

        run.backward(loss)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        run.log(loss=loss, **{f"loss_step_{i}": error.mean() for i, error in enumerate(errors)})
        if run.weights_moved:
            ema.step(unet)

        if run.every(config.sample_every):
            validation.draw()
        if run.every(config.score_every):
            validation.score()
        if run.every(config.save_every) or run.stopping:
            run.save_pipeline(student)

    run.save_pipeline(student)
    run.finish()


if __name__ == "__main__":
    run_script(main, StudentConfig)

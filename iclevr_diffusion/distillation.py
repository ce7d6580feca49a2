"""What a student of few steps is taught: where its teacher, guidance and all, would have gone in many more."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iclevr_diffusion.flow_solver import make_flow_solver
from iclevr_diffusion.labels import LabelVocabulary
from iclevr_diffusion.models.unet_multilabel import MultiLabelUNet2DModel
from iclevr_diffusion.pipelines.pipeline_conditional_ddpm import ConditionalDDPMPipeline


def make_student(unet: MultiLabelUNet2DModel) -> MultiLabelUNet2DModel:
    """Returns a copy of a teacher's network without its row for "no condition", of which guidance leaves no need."""
    student = type(unet).from_config({**unet.config, "null_condition": False})
    student.load_state_dict({name: value for name, value in unet.state_dict().items() if name != "null_embedding"})
    return student


class Teacher:
    """A diffusion model whose way from noise to image is cut into as many pieces as its student takes steps.

    From the state at which a piece begins the student is to reach its end in one straight step, as in *Progressive
    Distillation for Fast Sampling of Diffusion Models* (Salimans and Ho, 2022, https://arxiv.org/abs/2202.00512) and
    *PeRFlow: Piecewise Rectified Flow as Universal Plug-and-Play Accelerator* (Yan et al., 2024,
    https://arxiv.org/abs/2405.07510). Guidance is part of the way, as in *On Distillation of Guided Diffusion Models*
    (Meng et al., 2023, https://arxiv.org/abs/2210.03142), so that the student needs no second call for it. Unlike in
    these, each piece begins where the student itself has come to, and the teacher shows the way from there: so it
    learns to mend its own errors, which else would add up, as in *A Reduction of Imitation Learning and Structured
    Prediction to No-Regret Online Learning* (Ross et al., 2011, https://arxiv.org/abs/1011.0686). No image is needed.

    Args:
        pipeline: A pipeline around the teacher; its scheduler is not used.
        num_steps: Steps of DPM-Solver++ that the teacher takes, a multiple of `num_student_steps`.
        num_student_steps: Steps that the student will take.
        guidance_scale: The teacher's guidance, see `ConditionalDDPMPipeline`.
        guidance_interval: Part of its steps in which it is guided.
        time_shift: How far the times of both are moved towards noise.

    Attributes:
        sigmas: Noise levels (num_student_steps + 1,) of the states, from the first one to 0.
        timesteps: What the network is told there (num_student_steps,).

    Raises:
        ValueError: If the teacher does not predict a flow's velocity or cannot be guided, or the numbers of steps do not
            fit.
    """

    def __init__(
        self,
        pipeline: ConditionalDDPMPipeline,
        *,
        num_steps: int,
        num_student_steps: int,
        guidance_scale: float,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        time_shift: float,
    ) -> None:
        is_diffusion = isinstance(pipeline, ConditionalDDPMPipeline)
        if not is_diffusion or pipeline.unet.config.prediction_type != "flow":
            predicted = f" that predicts {pipeline.unet.config.prediction_type}" if is_diffusion else ""
            raise ValueError(
                "`teacher` must be a ConditionalDDPMPipeline that predicts a flow's velocity, got a"
                f" {type(pipeline).__name__}{predicted}; train one with `prediction_type: flow`."
            )
        if not isinstance(pipeline.unet, MultiLabelUNet2DModel):
            raise ValueError(f"`teacher` must have a MultiLabelUNet2DModel, got a {type(pipeline.unet).__name__}.")
        if num_steps < num_student_steps or num_steps % num_student_steps:
            raise ValueError(
                f"`teacher_steps` must be a multiple of the {num_student_steps} student's steps, got {num_steps}."
            )
        if guidance_scale != 1 and pipeline.guide is None and not pipeline.unet.config.null_condition:
            raise ValueError(
                f"`guidance_scale` must be 1 for this `teacher`, got {guidance_scale}: it was trained without label"
                " dropout, so it has no unconditional prediction."
            )
        self._unet, self._guide = pipeline.unet, pipeline.guide
        self._num_steps, self._steps_a_piece = num_steps, num_steps // num_student_steps
        self._guidance_scale, self._guidance_interval = guidance_scale, guidance_interval
        self._time_shift = time_shift
        times = make_flow_solver(time_shift, solver_order=1)
        times.set_timesteps(num_student_steps, device=pipeline.device)
        self.sigmas: Tensor = times.sigmas
        self.timesteps: Tensor = times.timesteps

    def walk(self, student: nn.Module, class_labels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Has a student draw.

        Args:
            student: The student's network; gradients pass through all its steps.
            class_labels: Multi-hot rows (B, num_classes).
            seeds: The seed of each image's noise.

        Returns:
            The states that it comes to (num_student_steps + 1, B, C, H, W), standardized and in float32: the first is
            the noise that a pipeline draws from the seeds, the last one the image.
        """
        config, device = self._unet.config, class_labels.device
        shape = (config.in_channels, config.sample_size, config.sample_size)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        states = [torch.stack(noise).to(device)]
        for piece, t in enumerate(self.timesteps):
            velocity = student(states[-1], t, class_labels).sample.float()
            states.append(states[-1] + (self.sigmas[piece + 1] - self.sigmas[piece]) * velocity)
        return torch.stack(states)

    @torch.no_grad()
    def show(self, student: nn.Module, class_labels: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Has a student draw and shows from each state that it comes to where the piece would have led the teacher.

        Args:
            student: The student's network.
            class_labels: Multi-hot rows (B, num_classes).
            seeds: The seed of each image's noise.

        Returns:
            The beginnings and the ends of the pieces, standardized states (num_student_steps, B, C, H, W) in float32.
        """
        starts = self.walk(student, class_labels, seeds)[:-1]
        return starts, torch.stack([self.advance(start, class_labels, i) for i, start in enumerate(starts)])

    @torch.no_grad()
    def advance(self, sample: Tensor, class_labels: Tensor, piece: int) -> Tensor:
        """Takes the teacher's steps of one piece, counted from 0, from a state (B, C, H, W) at its beginning."""
        solver = make_flow_solver(self._time_shift, solver_order=2)
        solver.set_timesteps(self._num_steps, device=sample.device)
        first = piece * self._steps_a_piece
        solver.set_begin_index(first)
        start, stop = self._guidance_interval
        null_mask = torch.arange(2 * len(sample), device=sample.device) >= len(sample)
        both_labels = torch.cat([class_labels, class_labels])
        for step in range(first, first + self._steps_a_piece):
            t = solver.timesteps[step]
            is_guided = self._guidance_scale != 1 and start <= step / self._num_steps < stop
            if is_guided and self._guide is not None:
                weak, strong = (
                    network(sample, t, class_labels).sample.float() for network in (self._guide, self._unet)
                )
                velocity = torch.lerp(weak, strong, self._guidance_scale)
            elif is_guided:
                both = self._unet(torch.cat([sample, sample]), t, both_labels, null_mask).sample.float()
                conditional, unconditional = both.chunk(2)
                velocity = torch.lerp(unconditional, conditional, self._guidance_scale)
            else:
                velocity = self._unet(sample, t, class_labels).sample.float()
            sample = solver.step(velocity, t, sample).prev_sample
        return sample


class Prompts:
    """Batches of label sets and seeds to draw, without end; each batch is a pure function of its number.

    An image shows one label, two, and so on as often as any other number, though there are more sets of more labels.

    Args:
        conditions: Distinct label sets.
        vocabulary: The labels' names.
        batch_size: Number of images a process and batch.
        seed: With the step and the process it decides a batch.
        device: Where the labels are wanted.
        num_processes: Number of processes that train together.
        process_index: Number of this process, from 0.
    """

    def __init__(
        self,
        conditions: Sequence[Sequence[str]],
        vocabulary: LabelVocabulary,
        batch_size: int,
        *,
        seed: int,
        device: str | torch.device = "cpu",
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        class_labels = vocabulary.encode(list(conditions))
        sizes = class_labels.sum(dim=1)
        self._groups = [class_labels[sizes == size].to(device) for size in sizes.unique()]
        self.batch_size = batch_size
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index

    def batch(self, step: int) -> dict[str, Any]:
        """Returns `class_labels`, multi-hot float32 (batch_size, num_classes), and `seeds`, of batch `step` from 0."""
        number = step * self.num_processes + self.process_index
        # Raw Philox numbers are a stream that NumPy never changes.
        words = np.random.Philox(key=(number << 64) + self.seed).random_raw(3 * self.batch_size)
        groups, rows, seeds = words.reshape(3, self.batch_size).tolist()
        groups = [self._groups[word % len(self._groups)] for word in groups]
        class_labels = torch.stack([group[word % len(group)] for group, word in zip(groups, rows, strict=True)])
        return {"class_labels": class_labels, "seeds": [word >> 1 for word in seeds]}

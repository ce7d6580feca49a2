"""What a student of few steps is taught: the states that its teacher, guidance and all, passes in many more."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from iclevr_diffusion.labels import LabelVocabulary
from iclevr_diffusion.models.unet_multilabel import MultiLabelUNet2DModel
from iclevr_diffusion.pipelines.pipeline_conditional_ddpm import ConditionalDDPMPipeline


def make_flow_solver(time_shift: float, solver_order: int) -> DPMSolverMultistepScheduler:
    """Makes a DPM-Solver++ for networks that predict a flow's velocity.

    *DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models* (Lu et al., 2022,
    https://arxiv.org/abs/2211.01095). With order 1 it takes straight steps along the predicted velocity, as Euler's
    method does. Its times are such that those of n steps are among those of any multiple of n.

    Args:
        time_shift: How far the times are moved towards noise, see `diffusion.shift_times`.
        solver_order: 1 or 2.
    """
    return DPMSolverMultistepScheduler(
        solver_order=solver_order,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=time_shift,
        final_sigmas_type="zero",
    )


def make_student(unet: MultiLabelUNet2DModel) -> MultiLabelUNet2DModel:
    """Returns a copy of a teacher's network without its row for "no condition", of which guidance leaves no need."""
    student = type(unet).from_config({**unet.config, "null_condition": False})
    student.load_state_dict({name: value for name, value in unet.state_dict().items() if name != "null_embedding"})
    return student


class Teacher:
    """A pipeline whose way from noise to image is cut into as many pieces as its student takes steps.

    From the state at which a piece begins the student is to reach its end in one straight step, as in *Progressive
    Distillation for Fast Sampling of Diffusion Models* (Salimans and Ho, 2022, https://arxiv.org/abs/2202.00512) and
    *PeRFlow: Piecewise Rectified Flow as Universal Plug-and-Play Accelerator* (Yan et al., 2024,
    https://arxiv.org/abs/2405.07510). Guidance is part of the way, as in *On Distillation of Guided Diffusion Models*
    (Meng et al., 2023, https://arxiv.org/abs/2210.03142), so that the student needs no second call for it. Unlike in
    the first, all pieces are learned at once; unlike in any of them, each begins at a state that the teacher itself has
    reached, so that no image is needed.

    Args:
        pipeline: The teacher; its scheduler is replaced.
        num_steps: Steps that it takes, a multiple of `num_student_steps`.
        num_student_steps: Steps that the student will take.
        guidance_scale: Its guidance, see `ConditionalDDPMPipeline`.
        guidance_interval: Part of its steps in which it is guided.
        time_shift: How far the times of both are moved towards noise.

    Attributes:
        pipeline: The teacher.
        sigmas: Noise levels (num_student_steps + 1,) of the states, from the first one to 0.
        timesteps: What the network is told there (num_student_steps,).

    Raises:
        ValueError: If the teacher does not predict a flow's velocity, or the numbers of steps do not fit.
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
        self.pipeline = pipeline
        self._options = {
            "num_inference_steps": num_steps,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
        }
        self._every = num_steps // num_student_steps
        pipeline.scheduler = make_flow_solver(time_shift, solver_order=2)
        pipeline.set_progress_bar_config(disable=True)
        times = make_flow_solver(time_shift, solver_order=1)
        times.set_timesteps(num_student_steps)
        self.sigmas: Tensor = times.sigmas
        self.timesteps: Tensor = times.timesteps

    def states(self, class_labels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Draws images and returns the states on the way that the student is to pass too.

        Args:
            class_labels: Multi-hot rows (B, num_classes).
            seeds: The seed of each image.

        Returns:
            Standardized states (num_student_steps + 1, B, C, H, W), float32: the noise first, the image last.
        """
        states = []

        def keep(pipeline: ConditionalDDPMPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
            if (step + 1) % self._every == 0:
                states.append(tensors["sample"])

        self.pipeline(
            class_labels,
            seeds=seeds,
            micro_batch_size=len(seeds),
            output_type="pt",
            callback_on_step_end=keep,
            **self._options,
        )
        noise = torch.stack(
            [torch.randn(states[0].shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        return torch.stack([noise.to(states[0]), *states])


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

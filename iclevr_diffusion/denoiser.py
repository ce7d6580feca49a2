"""The denoising networks that a run can train and the noise schedules that they live on, as its configuration says."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn

from iclevr_diffusion.config import option
from iclevr_diffusion.flow_solver import make_flow_solver
from iclevr_diffusion.models.unet_multilabel import PRESETS, MultiLabelUNet2DModel
from iclevr_diffusion.models.unet_small import SmallMultiLabelUNet
from iclevr_diffusion.training_data import DataConfig, check_sizes

# The arguments of each network that are options of a run; none leaves an argument as the network or the preset has it.
ARCHITECTURE = {
    "unet2d": (
        "patch_size",
        "block_out_channels",
        "layers_per_block",
        "attention_levels",
        "attention_head_dim",
        "label_encoding",
        "network_output",
    ),
    "small": ("base_channels", "num_levels", "label_injection", "use_label_embedding", "use_time_embedding"),
}
# The options that a run must leave alone, as they are those of the other network.
FOREIGN = {"unet2d": ARCHITECTURE["small"], "small": ("preset", "gradient_checkpointing", *ARCHITECTURE["unet2d"])}
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]  # those that DDPM and DDIM share


@dataclass(kw_only=True)
class DenoiserConfig(DataConfig):
    """What a run that trains a denoising network is told about the network and the noise."""

    network: Literal["unet2d", "small"] = option(
        "unet2d", "diffusers' U-Net, or a small one around a code of few cells"
    )
    preset: Literal["reported", "base", "tiny", "tokens"] = option(
        "tiny", "kind of unet2d; the next seven fields change parts"
    )
    patch_size: int | None = option(None, "side of the squares of pixels that are folded into channels")
    block_out_channels: tuple[int, ...] | None = option(None, "channels per level, finest first")
    layers_per_block: int | None = option(None, "residual blocks per level")
    attention_levels: tuple[int, ...] | None = option(None, "levels with self-attention, 0 the finest")
    attention_head_dim: int | None = option(None, "channels of an attention head")
    label_encoding: Literal["linear", "tokens"] | None = option(
        None, "of unet2d: labels are added to the time (linear), or attended to as tokens; the preset's, if not given"
    )
    network_output: Literal["prediction", "sample"] | None = option(
        None,
        "of unet2d: it puts out what it predicts, or the image, from which a flow's velocity follows; the preset's, if not given",
    )
    base_channels: int | None = option(None, "of small: channels of the finest level, 256 if not given")
    num_levels: int | None = option(None, "of small: levels below the finest, 2 if not given")
    label_injection: Literal["film", "early"] | None = option(
        None, "of small: labels scale and times shift on the way up (film), or both are added on the way down"
    )
    use_label_embedding: bool | None = option(
        None, "of small: whether it looks at the labels, as it does if not given"
    )
    use_time_embedding: bool | None = option(None, "of small: whether it looks at the time, as it does if not given")
    gradient_checkpointing: bool = option(False, "save memory of unet2d, for a third more time")

    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow", "edm"] = option(
        "flow", "what the network predicts; edm is the preconditioned one of Karras et al."
    )
    beta_schedule: BetaSchedule = option("squaredcos_cap_v2", "noise schedule, where not flow or edm")
    num_train_timesteps: int = option(1000, "steps of the noise schedule; a flow's times are always counted in 1000")
    sampler: Literal["ddpm", "ddim"] = option("ddim", "scheduler saved, where not flow or edm", may_change=True)
    time_sampling: Literal["uniform", "logit-normal"] | None = option(
        None, "how training times are drawn; logit-normal for flow and edm, uniform else, if not given"
    )
    time_shift: float | None = option(
        None,
        "above 1, times (and a flow's sampling steps) move towards noise; 4 for flow and edm, 1 else, if not given",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_sampling is None:
            self.time_sampling = "logit-normal" if self.is_continuous else "uniform"
        if self.time_shift is None:
            self.time_shift = 4.0 if self.is_continuous else 1.0
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name in FOREIGN[self.network] and value != item.default:
                raise ValueError(
                    f"`{item.name}` must be left out for the network {self.network}, which has no such option, got"
                    f" {value}."
                )
            if item.name in ("beta_schedule", "sampler") and self.is_continuous and value != item.default:
                raise ValueError(
                    f"`{item.name}` must be left out where `prediction_type` is {self.prediction_type}, which has its own,"
                    f" got {value}; give another `prediction_type`, such as epsilon."
                )
        if self.num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps` must be at least 1, got {self.num_train_timesteps}.")
        if self.is_continuous and self.num_train_timesteps != 1000:
            raise ValueError(
                f"`num_train_timesteps` must be 1000 where `prediction_type` is {self.prediction_type}, got"
                f" {self.num_train_timesteps}."
            )
        if self.prediction_type == "edm" and self.network == "small":
            raise ValueError(
                "`prediction_type` must not be edm for the network small, which counts its times, got edm."
            )
        if not 0 < self.time_shift < float("inf"):
            raise ValueError(f"`time_shift` must be positive and finite, got {self.time_shift}.")
        if not self.is_continuous and (left := float(make_scheduler(self).alphas_cumprod[-1]) ** 0.5) > 0.2:
            raise ValueError(
                f"`num_train_timesteps` must be enough for `beta_schedule` {self.beta_schedule} to end in noise, from which"
                f" images are drawn, got {self.num_train_timesteps}, at whose end {left:.0%} of an image is left; take"
                " 1000, or squaredcos_cap_v2."
            )
        check_sizes(lambda: make_denoiser(self, 1, 1, null_condition=False, empty_condition=False))

    @property
    def puts_out_images(self) -> bool:
        """Whether the inner network puts out images and not what is predicted."""
        preset = PRESETS[self.preset] if self.network == "unet2d" else {}
        return (self.network_output or preset.get("network_output")) == "sample"

    @property
    def is_continuous(self) -> bool:
        """Whether times are real numbers, on a path of their own, and not steps of a noise schedule."""
        return self.prediction_type in ("flow", "edm")


def make_denoiser(
    config: DenoiserConfig, num_classes: int, in_channels: int, *, null_condition: bool, empty_condition: bool
) -> MultiLabelUNet2DModel | SmallMultiLabelUNet:
    """Makes a freshly initialized network.

    Args:
        config: The run's configuration.
        num_classes: Number of labels of the data.
        in_channels: Channels of their images.
        null_condition: Whether the network must know "no condition".
        empty_condition: Whether there are images without any label.
    """
    arguments = {
        "num_classes": num_classes,
        "sample_size": config.resolution,
        "in_channels": in_channels,
        "prediction_type": config.prediction_type,
        "null_condition": null_condition,
        "empty_condition": empty_condition,
    }
    names = ARCHITECTURE[config.network]
    arguments |= {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.network == "small":
        return SmallMultiLabelUNet(num_train_timesteps=config.num_train_timesteps, **arguments)
    unet = MultiLabelUNet2DModel.from_preset(config.preset, **arguments)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def choose_attention(unet: nn.Module, device: torch.device, mixed_precision: str) -> None:
    """Has a network that is about to be trained compute its attention in the way that is fastest there.

    On a CPU in bfloat16 the backward pass of PyTorch's fused attention takes several times as long as plain products
    do. Call it after the averaged copy is made, which only draws and keeps the fused one.
    """
    if device.type != "cpu" or mixed_precision != "bf16":
        return
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


def make_scheduler(config: DenoiserConfig, *, bound: float = 1.0) -> SchedulerMixin:
    """Makes the scheduler that samples from the network; but for a flow or EDM, its `alphas_cumprod` train it too.

    EDM's noise levels are those of Karras et al. (2022), table 1, divided by their `sigma_data` of .5, as ours is 1; its
    steps are of DPM-Solver++ (Lu et al., 2022, https://arxiv.org/abs/2211.01095), which asks the network once a step. So
    are those of networks that put out images: the last image is what is drawn, and Euler's last time lies next to 0, where
    training hardly looks.

    The cosine schedule ends in noise alone, where the image that follows from a predicted noise is its error divided by
    next to nothing (Lin et al., 2024, https://arxiv.org/abs/2305.08891, section 3.3). So sampling then does not begin with
    the last of fewer steps, and clips, as do *Improved Denoising Diffusion Probabilistic Models* (Nichol and Dhariwal, 2021,
    https://arxiv.org/abs/2102.09672).

    Args:
        config: The run's configuration.
        bound: The largest absolute value of an image in the network's space.
    """
    if config.puts_out_images:
        return make_flow_solver(config.time_shift, solver_order=2)
    if config.prediction_type == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=config.time_shift)
    if config.prediction_type == "edm":
        return EDMDPMSolverMultistepScheduler(sigma_min=0.004, sigma_max=160.0, sigma_data=1.0, rho=7.0)
    scheduler_class = DDPMScheduler if config.sampler == "ddpm" else DDIMScheduler
    is_unstable = config.prediction_type == "epsilon" and config.beta_schedule == "squaredcos_cap_v2"
    return scheduler_class(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        clip_sample=is_unstable,
        clip_sample_range=bound,
        timestep_spacing="leading" if is_unstable else "trailing",
    )

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from .composition import Composition, Condition, is_composed, read_compositions
from .label_vocabulary import LabelVocabulary
from .labelled_pipeline import LARGEST_BATCH, ConditionalImageOutput, Images, LabelledPipeline

ClassLabels = str | Sequence[str | Sequence[Condition | str | int]] | Tensor | np.ndarray


class ConditionalDDPMPipeline(LabelledPipeline, DiffusionPipeline):
    """Draws images that show given labels, by the reverse process of a diffusion model.

    *Denoising Diffusion Probabilistic Models* (Ho et al., 2020, https://arxiv.org/abs/2006.11239) with classifier-free
    guidance (Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598). Any diffusers scheduler whose prediction type
    is the network's can be assigned to `scheduler`.

    An image may be composed of several conditions, as in *Compositional Visual Generation with Composable Diffusion
    Models* (Liu et al., 2022, https://arxiv.org/abs/2206.01714). With the unconditional prediction u, the prediction c_i
    for condition i and its weight w_i, which is negative for one that is negated, a step follows

        u + guidance_scale * sum_i w_i (c_i - u),

    so that guidance which is off (`guidance_scale` of 1, or outside of `guidance_interval`) leaves u + sum_i w_i (c_i - u).
    For one condition of weight 1 these are the guided and the conditional prediction. All predictions of a step are rows
    of one call of the network; u is left out where its factor is 0 because the weights sum to 1 and guidance is off.

    With a `guide`, a smaller or less trained network, guidance leads away from what that one predicts for the same labels
    instead of from the unconditional prediction, as in *Guiding a Diffusion Model with a Bad Version of Itself* (Karras
    et al., 2024, https://arxiv.org/abs/2406.02507): `guide + guidance_scale * (network - guide)`. Neither then
    needs an unconditional prediction, but for sums of conditions, which each makes for itself.

    An image depends on the weights, its labels, its seed, the scheduler and the number of steps, not on its place or
    its neighbours: each image has a random stream of its own, drawn on the CPU in float32. Kernels round by batch
    shape, so equality to the bit needs one `micro_batch_size` on one machine; other sizes differ by rounding alone.

    Args:
        unet: The network, `MultiLabelUNet2DModel` or one of the same call and configuration.
        scheduler: The diffusers scheduler that takes the steps.
        label_names: Names of the labels by index, as a list or as the mapping {"0": name, ...} that is saved.
        default_num_inference_steps: Steps taken when a call does not say.
        default_guidance_scale: Guidance scale used when a call does not say.
        guide: The network that guidance leads away from, for the same labels and images as `unet` and of the same
            prediction type; with `None` it leads away from the unconditional prediction.
        student_num_inference_steps: Steps that the network was distilled for, where it is a student of that many; a
            call with another number is warned of.

    Raises:
        ValueError: If `label_names` or `guide` does not fit the network.
    """

    _optional_components = ["guide"]

    # Named here too, as diffusers fetches only the files that this one imports itself.
    vocabulary: LabelVocabulary

    def __init__(
        self,
        unet: nn.Module,
        scheduler: SchedulerMixin,
        label_names: Sequence[str] | Mapping[str, str] | None = None,
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 1.0,
        guide: nn.Module | None = None,
        student_num_inference_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, guide=guide)
        self._check_guide()
        self._register_label_names(
            label_names,
            unet.config.num_classes,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
            student_num_inference_steps=student_num_inference_steps,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None,
        num_images: int | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: Sequence[int] | int | None = None,
        micro_batch_size: int | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
        num_states: int = 0,
        callback_on_step_end: Callable[["ConditionalDDPMPipeline", int, Tensor, dict], dict | None] | None = None,
    ) -> ConditionalImageOutput | tuple[Images]:
        """Draws one image for each row of labels.

        Args:
            class_labels: A list with one inner list of names or indices an image, a matrix (batch, num_classes) with
                entries >= 0, or a 1-D integer tensor with one label an image; an empty inner list asks for an empty
                scene. `None` draws `num_images` images without a condition. For images composed of conditions, the
                text of one image, "red cube, blue sphere AND NOT gray cylinder:0.5" (see `parse_prompt`), or a list
                with an entry an image: text, a list of `Condition`, or a list of labels.
            num_images: How many images to draw where `class_labels` is `None`.
            num_inference_steps: Steps of the scheduler; the pipeline's default if not given.
            guidance_scale: w in `unconditional + w * (conditional - unconditional)`: 1 is off. The pipeline's
                default if not given. It multiplies the weights of all conditions of an image. With a `guide` its
                prediction takes the place of the unconditional one.
            guidance_interval: The part of the steps, from 0 (first) to 1 (last), in which guidance is on, as in
                *Applying Guidance in a Limited Interval* (Kynkäänniemi et al., 2024,
                https://arxiv.org/abs/2404.07724).
            generator: Source of the images' seeds, or a list with one source an image. Without it and `seeds`, torch's
                global generator is the source.
            seeds: The seed of each image, or one seed for an image drawn alone.
            micro_batch_size: Images that go through the network at once; the last chunk is padded to it. Without it,
                all at once up to 64. Images with different numbers of conditions are drawn one after the other, each
                number in chunks of its own.
            output_type: `pil` for a list of images, `np` for float32 (B, H, W, C) in [0, 1], `pt` for a tensor
                (B, C, H, W) in [0, 1].
            return_dict: Whether to return a `ConditionalImageOutput` rather than a tuple `(images,)`.
            num_states: Number of states on the way to return, the first being the noise: 10 gives a strip with every
                tenth of the way.
            callback_on_step_end: Called as `callback(pipe, step_index, timestep, {"sample": sample})` after each step
                of each chunk; a returned dictionary may hold a `sample` that goes on in its place.

        Returns:
            The images, their seeds and, if asked for, the states.

        Raises:
            ValueError: If an argument is not of the form above, or asks for what this model or scheduler cannot do.
        """
        compositions = self.encode_compositions(class_labels, num_images)
        sizes = [len(composition.images) for composition in compositions]
        num_steps = self._positive("num_inference_steps", num_inference_steps, self.config.default_num_inference_steps)
        if guidance_scale is None:
            guidance_scale = 1.0 if class_labels is None else self.config.default_guidance_scale
        self._warn_of_other_steps(num_steps)
        self._check_guidance(class_labels, guidance_scale, guidance_interval)
        self._check_guide()
        self._check_scheduler()
        self._warn_of_early_start(num_steps)
        self._check_output_type(output_type)
        if not 0 <= num_states <= num_steps:
            raise ValueError(f"`num_states` must lie between 0 and the {num_steps} steps, got {num_states}.")
        seeds = self._image_seeds(sum(sizes), generator, seeds)
        chunk_sizes = [self._positive("micro_batch_size", micro_batch_size, min(n, LARGEST_BATCH)) for n in sizes]
        num_chunks = sum(-(-n // size) for n, size in zip(sizes, chunk_sizes, strict=True))
        drawn = []
        with self.progress_bar(total=num_chunks * num_steps) as progress_bar:
            for composition, chunk_size in zip(compositions, chunk_sizes, strict=True):
                drawn.append(
                    self._draw_in_chunks(
                        len(composition.images),
                        chunk_size,
                        lambda rows, composition=composition: self._denoise(
                            composition.of(rows),
                            seeds,
                            num_steps=num_steps,
                            guidance_scale=guidance_scale,
                            guidance_interval=guidance_interval,
                            num_states=num_states,
                            callback=callback_on_step_end,
                            on_step=progress_bar.update,
                        ),
                    )
                )
        # Back from the order in which they were drawn.
        order = torch.cat([composition.images for composition in compositions]).argsort()
        parts = [torch.cat(part)[order] for part in zip(*drawn, strict=True)]
        *states, images = (self._to_images(part, output_type) for part in parts)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ConditionalImageOutput(images=images, seeds=seeds, states=states if num_states else None)

    def encode_compositions(
        self, class_labels: ClassLabels | None, num_images: int | None = None
    ) -> list[Composition]:
        """Makes what each image is composed of from any spelling that a call accepts.

        Returns:
            The images in groups of as many conditions: without `Condition` or text a single group of one condition of
            weight 1, and for `None` with `num_images` one of no condition.

        Raises:
            ValueError: If the labels do not fit the vocabulary, or ask for what the model never saw in training.
        """
        if is_composed(class_labels):
            compositions = read_compositions(class_labels, lambda labels: self.encode_labels(labels, num_images))
            for composition in compositions:
                if composition.needs_null and not self.unet.config.null_condition:
                    raise ValueError(
                        f"`class_labels[{composition.images[0]}]` must be one condition, or several whose weights sum to"
                        f" 1, got weights of {composition.weights[:, 0].tolist()}: this model was trained without label"
                        " dropout, so it has no unconditional prediction that conditions could be summed around. Join"
                        " the labels by commas, or take a model trained with label dropout."
                    )
            return compositions
        multi_hot = self.encode_labels(class_labels, num_images)
        num_conditions = 0 if class_labels is None else 1
        return [
            Composition(
                images=torch.arange(len(multi_hot)),
                class_labels=multi_hot[None][:num_conditions],
                weights=torch.ones(num_conditions, len(multi_hot)),
                needs_null=num_conditions == 0,
            )
        ]

    def encode_labels(
        self, class_labels: Sequence[Sequence[str | int]] | Tensor | np.ndarray | None, num_images: int | None = None
    ) -> Tensor:
        """Makes the multi-hot matrix (batch, num_classes), float32, of labels that are one condition an image.

        `None` with `num_images` gives that many rows of zeros, which a call ignores.

        Raises:
            ValueError: If the labels do not fit the vocabulary, or ask for what the model never saw in training.
        """
        if class_labels is None:
            if num_images is None:
                raise ValueError(
                    "`class_labels` must be given, or `num_images` with `class_labels=None` to draw without a condition."
                )
            if not self.unet.config.null_condition:
                raise ValueError(
                    "`class_labels` must be given: this model was trained without label dropout and cannot draw without"
                    " a condition."
                )
            return torch.zeros(self._positive("num_images", num_images, 1), len(self.vocabulary))
        if num_images is not None:
            raise ValueError(
                f"`num_images` goes with `class_labels=None` only, got {num_images}; ask for several images of the same"
                " labels by repeating them: [labels] * n."
            )
        multi_hot = self.vocabulary.encode(class_labels).cpu()
        empty = (multi_hot == 0).all(dim=1).nonzero().flatten().tolist()
        if empty and not self.unet.config.empty_condition:
            raise ValueError(
                f"`class_labels[{empty[0]}]` asks for an empty scene, which this model never saw in training; name at"
                " least one label, or use `class_labels=None` to draw without a condition."
            )
        return multi_hot

    def _denoise(
        self,
        composition: Composition,
        seeds: list[int],
        *,
        num_steps: int,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        num_states: int,
        callback: Callable | None,
        on_step: Callable[[], Any],
    ) -> list[Tensor]:
        """Draws one chunk of the images that have `seeds`, and returns `num_states` states and the result, on the CPU."""
        device, dtype = self._execution_device, next(self.unet.parameters()).dtype
        generators = [torch.Generator().manual_seed(seeds[image]) for image in composition.images]
        self.scheduler.set_timesteps(num_steps, device=device)
        timesteps = self.scheduler.timesteps
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generators} if takes_generator else {}
        keep_at = {round(k * len(timesteps) / num_states) for k in range(num_states)} if num_states else set()

        config = self.unet.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
        # The state stays in float32 whatever the weights' dtype: half precision would round it at every step.
        sample = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        composition = composition.to(device, dtype)
        states = []
        for i, t in enumerate(timesteps):
            scaled = sample
            if hasattr(self.scheduler, "scale_model_input"):
                scaled = self.scheduler.scale_model_input(sample, t)
            if i in keep_at:
                states.append(self.unet.unstandardize(scaled).cpu())

            in_interval = guidance_interval[0] <= i / len(timesteps) < guidance_interval[1]
            prediction = self._predict(scaled, t, composition, guidance_scale if in_interval else 1.0)
            sample = self.scheduler.step(prediction, t, sample, **step_kwargs).prev_sample

            if callback is not None:
                returned = callback(self, i, t, {"sample": sample})
                sample = (returned or {}).get("sample", sample)
            # Second-order solvers visit a time twice; the bar counts steps as the caller did.
            if (i + 1) * num_steps // len(timesteps) > i * num_steps // len(timesteps):
                on_step()
        return [*states, self.unet.unstandardize(sample).cpu()]

    def _predict(self, sample: Tensor, t: Tensor, composition: Composition, guidance_scale: float) -> Tensor:
        """Makes the prediction that a step follows, float32 (B, C, H, W), by one call of each network that it takes."""
        is_guided = guidance_scale != 1.0
        leads_from_null = is_guided and self.guide is None
        predictions = self._predictions(self.unet, sample, t, composition, composition.needs_null or leads_from_null)
        composed = composition.sum(predictions)
        if not is_guided:
            return composed
        weaker = predictions[-1]
        if self.guide is not None:
            weaker = composition.sum(self._predictions(self.guide, sample, t, composition, composition.needs_null))
        return torch.lerp(weaker, composed, guidance_scale)

    @staticmethod
    def _predictions(
        network: nn.Module, sample: Tensor, t: Tensor, composition: Composition, with_null: bool
    ) -> Tensor:
        """Returns a network's predictions for all conditions, then the unconditional one: float32 (N, B, C, H, W)."""
        class_labels, null_mask = composition.rows(with_null=with_null)
        num_rows = len(class_labels) // len(sample)
        rows = torch.cat([sample.to(next(network.parameters()).dtype)] * num_rows)
        return network(rows, t, class_labels, null_mask).sample.float().unflatten(0, (num_rows, len(sample)))

    def _warn_of_other_steps(self, num_steps: int) -> None:
        wanted = self.config.student_num_inference_steps
        if wanted is not None and num_steps != wanted:
            warnings.warn(
                f"`num_inference_steps` should be {wanted} for this student, which has learned those steps alone, got"
                f" {num_steps}: with fewer its objects blur or are missing, with more images get grainy and take longer.",
                stacklevel=4,
            )

    def _warn_of_early_start(self, num_steps: int) -> None:
        """Warns where the scheduler's first step expects much of an image, as there is only noise."""
        if self.unet.config.prediction_type in ("flow", "edm"):
            return
        self.scheduler.set_timesteps(num_steps)
        timesteps = self.scheduler.timesteps
        signal = float(self.scheduler.alphas_cumprod[int(timesteps[0])]) ** 0.5
        if signal > 0.2:
            warnings.warn(
                f"`num_inference_steps` {num_steps} makes {type(self.scheduler).__name__} begin where {signal:.0%}"
                " of an image is left, but it begins with noise: images will be poor. Take a number of 20 or more that"
                f" divides {self.scheduler.config.num_train_timesteps}, or a scheduler with timestep_spacing='trailing'.",
                stacklevel=4,
            )

    def _check_guide(self) -> None:
        if self.guide is None:
            return
        wanted, offered = self.unet.config, self.guide.config
        for name in ("num_classes", "sample_size", "in_channels", "prediction_type", "num_train_timesteps"):
            if offered.get(name) != wanted.get(name):
                raise ValueError(
                    f"`guide` must be a network for the same labels and images as `unet`, with {name}"
                    f" {wanted.get(name)!r}, got one with {offered.get(name)!r}."
                )
        if wanted.null_condition and not offered.null_condition:
            raise ValueError(
                "`guide` must know 'no condition', as `unet` does, got one trained without label dropout; train it with."
            )
        for name in ("data_mean", "data_std"):  # up to the rounding of half precision
            ours, theirs = (getattr(network, name).float().cpu() for network in (self.unet, self.guide))
            if not torch.allclose(theirs, ours, rtol=2e-3, atol=1e-3):
                raise ValueError(
                    f"`guide` must be trained on the same images as `unet`, got one with another {name}, by which images"
                    " are standardized."
                )

    def _check_guidance(
        self, class_labels: object, guidance_scale: float, guidance_interval: tuple[float, float]
    ) -> None:
        start, stop = guidance_interval
        if not 0.0 <= start <= stop <= 1.0:
            raise ValueError(
                f"`guidance_interval` must be two fractions of the way with 0 <= start <= stop <= 1, got {guidance_interval}."
            )
        if not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` must be a finite number, got {guidance_scale}; 1 is off.")
        if guidance_scale == 1.0 or self.guide is not None:
            return
        if class_labels is None:
            raise ValueError(
                f"`guidance_scale` must be 1 where `class_labels` is None, got {guidance_scale}: there is no condition to"
                " guide towards."
            )
        if not self.unet.config.null_condition:
            raise ValueError(
                f"`guidance_scale` must be 1 for this model, got {guidance_scale}: it was trained without label dropout,"
                " so it has no unconditional prediction; give the pipeline a `guide`."
            )

    def _check_scheduler(self) -> None:
        name, config = type(self.scheduler).__name__, self.scheduler.config
        wanted = self.unet.config.prediction_type
        # The EDM schedulers hold the preconditioning themselves; F is what they call epsilon.
        if hasattr(self.scheduler, "precondition_inputs"):
            if wanted != "edm":
                raise ValueError(
                    f"`scheduler` must leave the network's inputs and outputs as they are, got {name}, which expects a"
                    " network with its preconditioning; use EulerDiscreteScheduler or DPMSolverMultistepScheduler."
                )
            if config.prediction_type != "epsilon" or config.sigma_data != 1:
                raise ValueError(
                    f"`scheduler` must have sigma_data=1 and prediction_type='epsilon' for this network, got {name} with"
                    f" sigma_data={config.sigma_data} and prediction_type={config.prediction_type!r}; make it by"
                    f" {name}.from_config(pipe.scheduler.config)."
                )
            offered = "edm"
        elif name.startswith("FlowMatch"):
            offered = "flow"
        else:
            offered = config.get("prediction_type")
            if offered == "flow_prediction" and config.get("use_flow_sigmas"):
                offered = "flow"
        if offered != wanted:
            if wanted == "flow":
                way_out = (
                    "use FlowMatchEulerDiscreteScheduler, or for example DPMSolverMultistepScheduler("
                    "prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=...)"
                )
            elif wanted == "edm":
                way_out = "use EDMDPMSolverMultistepScheduler or EDMEulerScheduler with sigma_data=1"
            else:
                way_out = f"make it by {name}.from_config(pipe.scheduler.config, prediction_type={wanted!r})"
            raise ValueError(
                f"`scheduler` must take the network's prediction type {wanted!r}, got {name} for {offered!r}; {way_out}."
            )
        for option, reach in (("clip_sample", "clip_sample_range"), ("thresholding", "sample_max_value")):
            # The space of a network that standardizes reaches beyond [-1, 1].
            if config.get(option) and config.get(reach, 1.0) < 0.98 * self.unet.bound:
                raise ValueError(
                    f"`scheduler` must not clip images, got {name} with {option}=True and {reach}={config.get(reach)};"
                    f" make it by {name}.from_config(pipe.scheduler.config, {option}=False), or with {reach}="
                    f"{self.unet.bound:.4g}, which is what images reach in this network's space."
                )

"""Pipelines that take all steps of a drawing in one graph under ONNX Runtime, on the CPU."""

import hashlib
import inspect
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

import iclevr_diffusion
from iclevr_diffusion.files import cache_folder, writing_to_cache
from iclevr_diffusion.judging import weights_sha256
from iclevr_diffusion.pipelines.composition import Composition
from iclevr_diffusion.pipelines.pipeline_conditional_ddpm import ConditionalDDPMPipeline

OPSET_VERSION = 20  # newer ones leave GroupNorm to ONNX Runtime, which has no faster kernel for it
LARGEST_NUM_STEPS = 100  # the graph keeps the predictions of all steps
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


class OnnxDDPMPipeline(ConditionalDDPMPipeline):
    """A `ConditionalDDPMPipeline` whose network runs under ONNX Runtime, with all steps of a call in one graph.

    It is called as its parent is and draws the same noise, so that images differ by rounding alone, below 1e-3 of the
    range of a pixel. The graph is written into a cache folder at the first drawing and read from there later. One file
    serves all batch sizes, numbers of steps, schedulers, guidance scales and compositions: the steps of a scheduler are
    given to it as a table of numbers, see `tabulate_steps`.

    The weights are those that the pipeline has at its first drawing; later changes of them are not seen. Arguments are
    those of its parent.
    """

    network_calls_per_image = 0  # in the last drawing; hooks on the network see none

    _cache_dir: str | Path | None = None
    _session: Any = None
    _tabulated: tuple[Any, "Steps | None"] = (None, None)

    @classmethod
    def from_torch(cls, pipeline: ConditionalDDPMPipeline, cache_dir: str | Path | None = None) -> "OnnxDDPMPipeline":
        """Makes a pipeline with the parts of another.

        Args:
            pipeline: A `ConditionalDDPMPipeline`.
            cache_dir: Where graphs lie. By default the environment variable ICLEVR_CACHE, or `iclevr_diffusion` in the
                user's cache folder. Files in it can be deleted at any time.

        Raises:
            ValueError: If the pipeline is of another kind or has a guide, or its weights are not float32 on the CPU.
            ImportError: If one of the packages of the extra `onnx` is missing.
        """
        if type(pipeline) is not ConditionalDDPMPipeline:
            raise ValueError(
                f'`backend` must be "torch" for a {type(pipeline).__name__}, got "onnx", which takes the steps of a'
                " ConditionalDDPMPipeline in one graph."
            )
        if missing := [name for name in _PACKAGES if util.find_spec(name) is None]:
            raise ImportError(
                f'`backend="onnx"` needs {" and ".join(missing)}; run `pip install {" ".join(missing)}`, or leave'
                " `backend` out."
            )
        made = cls(
            pipeline.unet,
            pipeline.scheduler,
            label_names=pipeline.vocabulary.names,
            default_num_inference_steps=pipeline.config.default_num_inference_steps,
            default_guidance_scale=pipeline.config.default_guidance_scale,
            guide=pipeline.guide,
            student_num_inference_steps=pipeline.config.student_num_inference_steps,
        )
        made._check_networks()
        made.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        made._cache_dir = cache_dir
        return made

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:  # noqa: ANN401 -- its parent's
        """Is refused: the folder that the pipeline came from is what to keep.

        Raises:
            ValueError: Always.
        """
        raise ValueError('`save_pretrained` is for pipelines opened with backend="torch"; open it so, and save that.')

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
        """Draws one chunk of the images that have `seeds`, and returns `num_states` states and the result."""
        if callback is not None:
            raise ValueError(
                "`callback_on_step_end` must be left out where all steps are one graph; open the pipeline with"
                ' backend="torch" to be called after each.'
            )
        self._check_networks()
        steps = self._steps_of(num_steps)
        num_calls = len(steps.timesteps)

        is_guided = torch.tensor(
            [guidance_interval[0] <= i / num_calls < guidance_interval[1] for i in range(num_calls)]
        )
        scales = torch.where(is_guided, guidance_scale, 1.0)
        class_labels = composition.class_labels
        weights = scales[:, None, None] * composition.weights  # (N, conditions, B)
        if composition.needs_null or (scales != 1).any():
            class_labels = torch.cat([class_labels, torch.zeros(1, *class_labels.shape[1:])])
            weights = torch.cat([weights, 1 - weights.sum(dim=1, keepdim=True)], dim=1)

        config = self.unet.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        history = torch.zeros(num_calls + 1, len(composition.images), *shape)
        for row, image in enumerate(composition.images):
            history[0, row] = torch.randn(shape, generator=torch.Generator().manual_seed(seeds[image]))
        inputs = {
            "drawing": history,
            "inputs": steps.states[:-1],
            "slots": torch.eye(num_calls + 1)[1:],
            "timesteps": steps.timesteps,
            "conditions": weights,
            "labels": class_labels.expand(num_calls, *class_labels.shape),
        }
        if config.null_condition:
            is_null = torch.arange(len(class_labels)) >= len(composition.class_labels)
            inputs["null_rows"] = is_null.expand(num_calls, -1)
        history = self._run(inputs)
        self.network_calls_per_image = num_calls * len(class_labels)
        for _ in range(num_steps):
            on_step()
        kept = [round(k * num_calls / num_states) for k in range(num_states)] + [num_calls]
        return [self.unet.unstandardize(torch.tensordot(steps.states[row], history, 1)) for row in kept]

    def _steps_of(self, num_steps: int) -> "Steps":
        """Tabulates the scheduler's steps, unless they are those of the last drawing."""
        self.scheduler.set_timesteps(num_steps, device="cpu")
        key = (self.scheduler.to_json_string(), num_steps, *self.scheduler.timesteps.tolist())
        if self._tabulated[0] != key:
            self._tabulated = key, tabulate_steps(self.scheduler, num_steps)
        return self._tabulated[1]

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        if self._session is None:
            self._session = self._open_session(graph_file(self.unet, self._cache_dir))
        (drawn,) = self._session.run(None, {name: tensor.contiguous().numpy() for name, tensor in inputs.items()})
        return torch.from_numpy(drawn)

    def _open_session(self, path: Path) -> Any:  # noqa: ANN401 -- of a package that may be missing
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def _check_networks(self) -> None:
        if self.guide is not None:
            raise ValueError(
                '`backend` must be "torch" for a pipeline with a `guide`, got "onnx", whose graph holds one network.'
            )
        weight = next(self.unet.parameters())
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise ValueError(
                f"The weights must be float32 on the CPU under ONNX Runtime, got {weight.dtype} on {weight.device};"
                ' leave `device` and `dtype` out, or use backend="torch".'
            )


class Steps(NamedTuple):
    """What a scheduler does in its steps, as numbers.

    Args:
        timesteps: Times (N,) at which it asks for predictions.
        states: Rows (N + 1, N + 1): row i holds the weights of the noise and of the N predictions in the sum that is the
            network's input at call i, and for i = N in the result.
    """

    timesteps: Tensor
    states: Tensor


def tabulate_steps(scheduler: SchedulerMixin, num_steps: int) -> Steps:
    """Finds out what a scheduler does, by letting it step through unit vectors in the place of images.

    Schedulers that draw no noise and clip nothing make weighted sums of the noise and of the predictions so far, with
    weights that do not depend on the images.

    Raises:
        ValueError: If there are more steps than the graph takes, or the scheduler is of another kind.
    """
    if num_steps > LARGEST_NUM_STEPS:
        raise ValueError(
            f"`num_inference_steps` must be at most {LARGEST_NUM_STEPS} under ONNX Runtime, got {num_steps}; open the"
            ' pipeline with backend="torch" for more.'
        )
    scheduler.set_timesteps(num_steps, device="cpu")
    timesteps = scheduler.timesteps.float()
    num_calls = len(timesteps)
    states = _follow(scheduler, torch.eye(num_calls + 1), num_steps)
    probe = torch.randn(num_calls + 1, 64, generator=torch.Generator().manual_seed(0)) * 10  # beyond what is clipped
    followed, expected = _follow(scheduler, probe, num_steps), states @ probe
    if not torch.allclose(followed, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
        raise ValueError(
            f"`scheduler` must draw no noise and clip nothing under ONNX Runtime, got {type(scheduler).__name__} with"
            " settings that make its steps no weighted sums; use FlowMatchEulerDiscreteScheduler or"
            ' DPMSolverMultistepScheduler as they are by default, or backend="torch".'
        )
    return Steps(timesteps, states)


def _follow(scheduler: SchedulerMixin, vectors: Tensor, num_steps: int) -> Tensor:
    """Takes all steps with row 0 of `vectors` (N + 1, D) as noise and the others as predictions.

    Returns:
        The inputs of the network at the N calls, and the result (N + 1, D).
    """
    scheduler.set_timesteps(num_steps, device="cpu")
    images = vectors[:, None, None, None]  # schedulers want (B, C, H, W)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    step_kwargs = {"generator": torch.Generator().manual_seed(0)} if takes_generator else {}
    sample = images[0] * getattr(scheduler, "init_noise_sigma", 1.0)
    states = []
    for t, prediction in zip(scheduler.timesteps, images[1:], strict=True):
        has_scale = hasattr(scheduler, "scale_model_input")
        states.append(scheduler.scale_model_input(sample, t) if has_scale else sample)
        sample = scheduler.step(prediction, t, sample, **step_kwargs).prev_sample
    return torch.stack([*states, sample]).flatten(1)


class _Step(nn.Module):
    """One call of the network, in the form that the graph repeats."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        history: Tensor,
        input_weights: Tensor,
        slot: Tensor,
        timestep: Tensor,
        condition_weights: Tensor,
        class_labels: Tensor,
        is_null: Tensor | None = None,
    ) -> Tensor:
        """Adds a prediction to what a drawing has so far.

        Args:
            history: The noise and the predictions (N + 1, B, C, H, W), zeros where there is none yet.
            input_weights: Their weights (N + 1,) in the network's input.
            slot: 1 at the place of the new prediction, and else 0 (N + 1,).
            timestep: Time of the call.
            condition_weights: Weights (R, B) of the predictions for R rows of labels in the new one.
            class_labels: Multi-hot rows (R, B, num_classes).
            is_null: Which of the R are unconditioned, for a network that can be.

        Returns:
            The new history.
        """
        num_rows, num_images = condition_weights.shape
        # Else the export gives each input sizes of its own, and fails where a network with tokens multiplies them.
        torch._check(history.shape[1] == num_images)
        torch._check(class_labels.shape[0] == num_rows)
        torch._check(class_labels.shape[1] == num_images)
        if is_null is not None:
            torch._check(is_null.shape[0] == num_rows)
        sample = (input_weights[:, None, None, None, None] * history).sum(dim=0)
        rows = sample[None].expand(num_rows, *sample.shape).flatten(0, 1)
        null_mask = None if is_null is None else is_null[:, None].expand(num_rows, num_images).flatten()
        predictions = self.unet(rows, timestep, class_labels.flatten(0, 1), null_mask, return_dict=False)[0]
        predictions = predictions.unflatten(0, (num_rows, num_images))
        prediction = (condition_weights[:, :, None, None, None] * predictions).sum(dim=0)
        return history + slot[:, None, None, None, None] * prediction[None]


def graph_file(unet: nn.Module, cache_dir: str | Path | None = None) -> Path:
    """Returns the file with the graph of a network, which is written first if there is none of its weights.

    Args:
        unet: A network that `ConditionalDDPMPipeline` takes, float32 on the CPU.
        cache_dir: The folder, as `OnnxDDPMPipeline.from_torch` takes it.

    Raises:
        PermissionError: If the folder cannot be written.
    """
    cache_dir = cache_folder(cache_dir)
    versions = {name: metadata.version(name) for name in ("torch", "diffusers", "onnx", "onnxscript")}
    facts = {"weights": weights_sha256(unet), "iclevr_diffusion": iclevr_diffusion.__version__, **versions}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = cache_dir / f"network-{key[:32]}.onnx"
    if not path.is_file():
        with writing_to_cache("the network's graph", cache_dir):
            cache_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=cache_dir) as temporary:
                unfinished = Path(temporary) / path.name
                _write_graph(unet, unfinished)
                os.replace(unfinished, path)
    return path


def _write_graph(unet: nn.Module, path: Path) -> None:
    """Writes the graph: an ONNX `Scan` over the steps, whose body is one call of the network."""
    import onnx
    from onnx import TensorProto, helper

    body = _export_step(unet)
    config = unet.config
    history = ("K", "B", config.in_channels, config.sample_size, config.sample_size)
    # In the order of the body's inputs, but under other names than there, as ONNX demands; all but the first by step.
    inputs = {
        "drawing": (TensorProto.FLOAT, history),
        "inputs": (TensorProto.FLOAT, ("N", "K")),
        "slots": (TensorProto.FLOAT, ("N", "K")),
        "timesteps": (TensorProto.FLOAT, ("N",)),
        "conditions": (TensorProto.FLOAT, ("N", "R", "B")),
        "labels": (TensorProto.FLOAT, ("N", "R", "B", config.num_classes)),
    }
    if config.null_condition:
        inputs["null_rows"] = (TensorProto.BOOL, ("N", "R"))
    scan = helper.make_node("Scan", list(inputs), ["drawn"], body=body.graph, num_scan_inputs=len(inputs) - 1)
    graph = helper.make_graph(
        [scan],
        "drawing_in_steps",
        [helper.make_tensor_value_info(name, *form) for name, form in inputs.items()],
        [helper.make_tensor_value_info("drawn", TensorProto.FLOAT, history)],
    )
    model = helper.make_model(graph, opset_imports=body.opset_import, ir_version=body.ir_version)
    model.functions.extend(body.functions)
    onnx.save(model, path)


@contextmanager
def _silent_registry() -> Iterator[None]:
    """Keeps torch from saying that it cannot export the operations of torchvision, which no network here has.

    It lists all operations that it knows before an export, and says of each of a package that is missing that it skips it.
    """
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")

    def is_of_interest(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("torchvision is not installed")

    logger.addFilter(is_of_interest)
    try:
        yield
    finally:
        logger.removeFilter(is_of_interest)


def _export_step(unet: nn.Module) -> Any:  # noqa: ANN401 -- a package that may be missing
    num_steps, num_rows, num_images = 4, 2, 3  # none of them 1, which an export would take for a constant
    config = unet.config
    inputs = {
        "history": torch.zeros(num_steps, num_images, config.in_channels, config.sample_size, config.sample_size),
        "input_weights": torch.zeros(num_steps),
        "slot": torch.zeros(num_steps),
        "timestep": torch.tensor(500.0),
        "condition_weights": torch.zeros(num_rows, num_images),
        "class_labels": torch.zeros(num_rows, num_images, config.num_classes),
    }
    auto = torch.export.Dim.AUTO
    dynamic = {
        "history": {0: auto, 1: auto},
        "input_weights": {0: auto},
        "slot": {0: auto},
        "timestep": {},
        "condition_weights": {0: auto, 1: auto},
        "class_labels": {0: auto, 1: auto},
    }
    if config.null_condition:
        inputs["is_null"] = torch.zeros(num_rows, dtype=torch.bool)
        dynamic["is_null"] = {0: auto}
    was_training = unet.training
    try:
        with torch.no_grad(), warnings.catch_warnings(), _silent_registry():
            warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
            program = torch.onnx.export(
                _Step(unet).eval(),
                kwargs=inputs,
                dynamic_shapes=dynamic,
                opset_version=OPSET_VERSION,
                dynamo=True,
                verbose=False,
            )
    finally:
        unet.train(was_training)
    return program.model_proto

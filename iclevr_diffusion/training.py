import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import accelerate.utils
import numpy as np
import torch
import yaml
from accelerate import Accelerator, DataLoaderConfiguration, DistributedType, PartialState
from accelerate.utils import GradientAccumulationPlugin, broadcast
from diffusers import DiffusionPipeline, ModelMixin
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from iclevr_diffusion.checkpoint import Stateful, load_checkpoint, newest_checkpoint, read_manifest, save_checkpoint
from iclevr_diffusion.config import Config, TrainConfig, parse_config
from iclevr_diffusion.environment import (
    asked_for_cpu,
    describe_environment,
    device_fault,
    has_bfloat16,
    lost_processes_note,
    threads_note,
)
from iclevr_diffusion.files import judge_name, write_text
from iclevr_diffusion.first_weights import load_weights
from iclevr_diffusion.provenance import first_weights_facts


class Batches(Protocol):
    """A source of batches in which each is a pure function of its number."""

    def batch(self, step: int) -> dict[str, Tensor]:  # noqa: D102
        ...


Tracked = TypeVar("Tracked", bound=Stateful)


_LOCKS: dict[Path, FileLock] = {}  # of the folders that runs of this process write


class _StandardError:
    """Standard error that may be gone: a `tee` behind it gets the same Ctrl-C, and must not cost the checkpoint."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


STANDARD_ERROR = _StandardError()

_process_groups: list[torch.distributed.ProcessGroup] = []


def hold_process_group() -> None:
    """Keeps the group of processes, if there is one, until the program's end.

    Otherwise a `DistributedDataParallel` is the last to let it go. That waits for the group's threads with Python's lock
    held, for which one of them may be waiting in turn: now and then a program would hang after its last line.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _process_groups.append(torch.distributed.group.WORLD)


class TrainingRun:
    """What is the same for every model that is trained: processes, checkpoints, logs and leaving in good order.

    A run is a pure function of its configuration. Before every micro-step it seeds all random sources from the run's
    seed, the micro-step's number and the process's, and batches are asked for by number; hence a run that stops
    anywhere and goes on from a checkpoint needs neither random states nor a sampler's position, and drawing samples
    in between changes nothing. Losses are the script's business:

        run = TrainingRun(config)
        ema = run.track(ExponentialMovingAverage(unet))
        unet, optimizer, lr_scheduler = run.prepare(unet, optimizer, run.lr_scheduler(optimizer))
        for batch in run.batches(loader):
            loss = ...
            run.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            if run.weights_moved:
                ema.step(unet)
            run.log(loss=loss)

    Args:
        config: The configuration; a run whose `output_dir` has checkpoints of another one is refused.

    Attributes:
        accelerator: The `accelerate.Accelerator`.
        output_dir: Where everything goes.
        step: Number of the present optimisation step, from 1; between steps that of the last one.

    Raises:
        ValueError: If the configuration differs from that of the checkpoints in `output_dir`, nothing can be calculated
            on the device, or the launcher asks for FSDP, DeepSpeed or another way of sharding weights.
    """

    has_begun = False  # whether a run of this process has come to its loop, see `run_script`

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.step = 0
        # Of several processes on the CPU each would otherwise believe to be alone.
        several_on_cpu = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
        use_cpu = several_on_cpu or asked_for_cpu()
        # The first process renders and draws while the others wait for it.
        device = PartialState(cpu=use_cpu, timeout=timedelta(hours=2)).device
        if (fault := device_fault(device)) is not None:
            raise ValueError(
                f"Nothing can be calculated on {device}: {fault}. Install a build of PyTorch for this device, or train on"
                " the CPU, with --config_file train_scripts/accelerate/cpu.yaml behind `accelerate launch`."
            )
        # Accelerate has no fp16 on a CPU, and would say nothing.
        lacks_half = device.type == "cpu" if config.mixed_precision == "fp16" else not has_bfloat16(device)
        in_full = config.mixed_precision != "no" and lacks_half
        self.accelerator = Accelerator(
            cpu=use_cpu,
            mixed_precision="no" if in_full else config.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
            ),
            # One step of a learning rate schedule is one optimisation step, on any number of processes.
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            log_with=list(config.report_to) or None,
            project_dir=str(self.output_dir),
        )
        sharded = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA")
        if self.accelerator.distributed_type in [getattr(DistributedType, name) for name in sharded]:
            raise ValueError(
                f"`accelerate launch` asks for {self.accelerator.distributed_type.value}, whose sharded weights these"
                " checkpoints cannot hold; run one process, or data-parallel ones with --multi_gpu."
            )
        self._objects: dict[str, Stateful] = {}
        self._models: list[nn.Module] = []
        self._schedulers: list[LRScheduler] = []
        self._facts: dict[str, Any] = {}
        self._descriptions: dict[str, str] = {}
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._numbers: dict[str, float] = {}
        self._window = (0, time.perf_counter())
        self._bad_loss = torch.zeros((), device=self.accelerator.device)
        self._signal = 0
        self._stopping = False
        self._overflowed = False  # whether fp16 did, in the present step: a fused optimizer does not tell
        # `accelerate launch` does not pass SIGTERM on, so that its end must be noticed; it always sets this variable.
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        self._lock_folder()
        self._origin, self._manifest = self._find_checkpoint()
        self._seconds_before = self._manifest["facts"].get("seconds", 0.0)  # of training, when it was resumed
        self._started = time.perf_counter()
        self._time_is_up = False
        self._check_recipe()
        self.pin(seed=config.seed, num_processes=self.accelerator.num_processes)
        if config.report_to:
            flat = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in _plain(config).items()}
            self.accelerator.init_trackers(self.output_dir.name, config=flat)
        hold_process_group()
        accelerate.utils.set_seed(config.seed)  # the same first weights everywhere
        # Adam's averages for units that get no gradient fall below the smallest normal numbers, with which a CPU takes
        # many times as long; they count as zeros.
        torch.set_flush_denormal(True)
        self.print(f"Outputs go to {self.output_dir.resolve()}.")
        if in_full:
            place = "GPU" if device.type == "cuda" else "CPU"
            reason = "would only be emulated" if config.mixed_precision == "bf16" else "is for GPUs alone"
            self.print(
                f"This run calculates in float32: mixed_precision {config.mixed_precision} {reason} on this {place}."
            )
        if note := lost_processes_note(self.accelerator.num_processes):
            self.print(note)
        if device.type == "cpu" and (note := threads_note(self.accelerator.num_processes)):
            self.print(note)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.output_dir / "checkpoints"

    @property
    def resuming(self) -> bool:
        """Whether `output_dir` has a checkpoint to go on from."""
        return self._origin is not None

    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-step ends an optimisation step."""
        return self.accelerator.sync_gradients

    @property
    def weights_moved(self) -> bool:
        """Whether this micro-step ended an optimisation step that was not skipped, as fp16 does where it overflows."""
        return self.sync_gradients and not self._overflowed

    @property
    def stopping(self) -> bool:
        """Whether the program leaves after this step, because all processes have agreed on a stop."""
        return self._stopping

    def every(self, num_steps: int) -> bool:
        """Whether this micro-step ends an optimisation step whose number `num_steps` divides; 0 is never.

        Nor is it so when the run is stopping: what may take long, such as drawing samples, must not delay the checkpoint.
        """
        return self.sync_gradients and not self._stopping and num_steps > 0 and self.step % num_steps == 0

    def share_buffers(self, *networks: nn.Module) -> None:
        """Gives all processes the first one's buffers: each has running statistics of its own, and the first's are saved."""
        if self.accelerator.num_processes > 1:
            for network in networks:
                for buffer in network.buffers():
                    broadcast(buffer)

    def print(self, *text: str) -> None:
        """Prints on the main process, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(" ".join(text), file=STANDARD_ERROR)

    def pin(self, **facts: str | int | float | bool) -> None:
        """Names facts outside the configuration, such as the data's fingerprint, that a resumed run must share.

        Raises:
            ValueError: If the checkpoint to go on from has another value; one that lacks the fact agrees.
        """
        for name, value in facts.items():
            theirs = self._manifest["facts"].get(name, value)
            if theirs != value and name == "data":
                raise ValueError(
                    f"`data` must be what the first {self._manifest['step']} steps saw, to go on from {self._origin}: its"
                    " images or labels are others now, or were changed. Give them as they were, or train into another"
                    f" `output_dir`. (Their SHA-256 is {str(theirs)[:12]}... there, {str(value)[:12]}... here.)"
                )
            if theirs != value:
                raise ValueError(
                    f"`{name}` must be {theirs!r} to go on from {self._origin}, got {value!r}; train into another"
                    " `output_dir`."
                )
        self._facts.update(facts)

    def describe(self, name: str, text: str) -> None:
        """Has `text` written to the file `output_dir/name`, but not before it is settled that this run goes on."""
        self._descriptions[name] = text

    def start_from(self, source: str | None, model: ModelMixin, label_names: Sequence[str]) -> None:
        """Gives a model its first weights, see `load_weights`; a resumed run has its own and does not look at `source`.

        Args:
            source: Where they are, the option `init_from`; with `None` the model stays as it was made.
            model: The model, before it is prepared.
            label_names: Names of its labels, which may differ from those of `source`.

        Raises:
            ValueError: If the weights do not fit the model.
        """
        if source is None or self.resuming:
            return
        try:
            change = load_weights(model, source, label_names, other_labels=True)
        except ValueError as error:
            raise ValueError(f"`init_from`: {error}") from None
        self.print(f"The first weights are those of {source}{'.' if change is None else f': {change}.'}")
        self.describe("first_weights.json", json.dumps(first_weights_facts(source)) + "\n")

    def prepare(self, *objects: Any) -> tuple[Any, ...]:  # noqa: ANN401
        """Returns modules, optimizers and schedulers prepared by Accelerate, and puts their states into checkpoints."""
        kinds = {"model": nn.Module, "optimizer": torch.optim.Optimizer, "lr_scheduler": LRScheduler}
        for item in objects:
            for name, kind in kinds.items():
                if isinstance(item, kind):
                    number = sum(key.startswith(f"{name}_") for key in self._objects)
                    self._objects[f"{name}_{number}"] = item
                    break
            else:
                raise ValueError(
                    f"`objects` must be modules, optimizers and learning rate schedulers, got a {type(item).__name__};"
                    " batches are made by their number and need no preparation."
                )
        prepared = [self.accelerator.prepare(item) for item in objects]
        self._models += [item for item in prepared if isinstance(item, nn.Module)]
        self._schedulers += [item for item in objects if isinstance(item, LRScheduler)]
        if self.accelerator.scaler is not None:
            self._objects["grad_scaler"] = self.accelerator.scaler
        return tuple(prepared)

    def lr_scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Makes the configuration's learning rate schedule for an optimizer."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self.config.learning_rate_factor)

    def track(self, item: Tracked, name: str = "ema") -> Tracked:
        """Puts an average, or what else has a state, into checkpoints and returns it; its `model` goes to the device."""
        if isinstance(model := getattr(item, "model", None), nn.Module):
            model.to(self.accelerator.device)
        self._objects[name] = item
        return item

    def batches(self, loader: Batches) -> Iterator[dict[str, Tensor]]:
        """Yields the batches that are still to be trained on, one a micro-step, and does all that lies between them.

        It resumes from the newest whole checkpoint, counts `step`, writes metrics and checkpoints and ends at
        `max_steps`, or after `max_minutes` in this loop, samples and scores included. On SIGINT, SIGTERM, SIGHUP,
        SIGUSR1 or SIGBREAK it finishes the step, saves and leaves the program with code 128 + signal.
        """
        config, accelerator = self.config, self.accelerator
        self._resume()
        TrainingRun.has_begun = True
        images = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        bar = tqdm(
            total=config.max_steps * images,
            initial=self.step * images,
            unit=" images",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            file=STANDARD_ERROR,
            disable=not accelerator.is_main_process,
        )
        first_step = self.step
        self._started = started = time.perf_counter()
        self._window = (self.step, started)
        self._time_is_up = self._seconds_before >= self._seconds_allowed
        with self._catch_signals(), bar:
            while self.step < config.max_steps and not self._stopping and not self._time_is_up:
                self.step += 1
                for i in range(config.gradient_accumulation_steps):
                    micro_step = (self.step - 1) * config.gradient_accumulation_steps + i
                    batch = loader.batch(micro_step)
                    self._seed(micro_step)
                    with accelerator.accumulate(*self._models):
                        yield batch
                bar.update(images)
                finished = self.step == config.max_steps or self._stopping or self._time_is_up
                saving = finished or (config.save_every > 0 and self.step % config.save_every == 0)
                if saving or self._numbers or self.step % config.log_every == 0:
                    line = self._write_metrics(images)
                    bar.set_postfix({key: f"{line[key]:.4g}" for key in ("loss",) if key in line}, refresh=False)
                if saving:
                    self._save()
                if self.step == first_step + 1:
                    started = time.perf_counter()  # the first step also warms up
                elif self.step == first_step + 5 and not finished:
                    self._announce((time.perf_counter() - started) / 4, images)
            if self._time_is_up and self.step < config.max_steps:
                self.print(f"`max_minutes` are over after step {self.step} of {config.max_steps}.")
            elif self._stopping and self.step < config.max_steps:
                self.print(
                    f"Stopped after step {self.step} of {config.max_steps} and saved in {self.checkpoints}; the same"
                    " command goes on from there."
                )
                self.finish()
                raise SystemExit(128 + (self._signal or signal.SIGTERM))

    def backward(self, loss: Tensor, model: nn.Module | None = None, name: str = "") -> None:
        """Adds the gradients of a mean `loss`; at the end of a step clips them, or refuses them if not finite.

        Args:
            loss: The mean loss of this micro-step.
            model: The prepared model whose gradients are clipped, where a step has several losses; None is all of them.
            name: What is trained, such as `generator`; its gradient's length is logged as `grad_norm_<name>`.

        Raises:
            FloatingPointError: On all processes, before the weights move, if the loss of any, or a gradient, is not
                finite. With fp16 a gradient may overflow; it is refused when lower scales have not made it finite.
        """
        accelerator = self.accelerator
        self._bad_loss += ~torch.isfinite(loss.detach()).all()
        accelerator.backward(loss)
        if not self.sync_gradients:
            return
        models = self._models if model is None else [model]
        parameters = [parameter for model in models for parameter in model.parameters()]
        grad_norm = accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm or math.inf)
        bad_gradient = ~torch.isfinite(grad_norm)
        # One small sum over the processes and one look at it a step answers all that they must agree on.
        leaving = self._signal or (self._launcher is not None and os.getppid() != self._launcher)
        late = self._seconds() >= self._seconds_allowed
        asked = [torch.full_like(self._bad_loss, flag) for flag in (leaving, late)]
        bad_loss, bad_gradient, stop, late = accelerator.reduce(
            torch.stack([self._bad_loss, bad_gradient.float(), *asked])
        ).tolist()
        # A scaler looks for overflows itself, skips the step and lowers the scale; below 1 it no longer helps.
        overflow = bad_gradient and accelerator.scaler is not None and accelerator.scaler.get_scale() >= 1
        if bad_loss or (bad_gradient and not overflow):
            what = f"{name} {'loss' if bad_loss else 'gradient'}".lstrip()
            raise FloatingPointError(
                f"The {what} of step {self.step} is not finite; the weights did not move, and nothing was saved. Take a"
                " lower `learning_rate` or `max_grad_norm`, a longer warm-up or mixed_precision bf16 or no, in another"
                f" `output_dir`; checkpoints up to step {self._saved_step()} are in {self.checkpoints}."
            )
        self._stopping, self._time_is_up, self._overflowed = bool(stop), bool(late), bool(bad_gradient)
        if not bad_gradient:
            self.log(**{f"grad_norm_{name}" if name else "grad_norm": grad_norm})

    def log(self, **scalars: Tensor | float) -> None:
        """Notes numbers for `metrics.jsonl` and the trackers.

        Tensors are averaged over the steps since the last line and over processes, without waiting for the device.
        Plain numbers (a score) make a line at their own step, and must be the same on all processes.
        """
        for name, value in scalars.items():
            if isinstance(value, Tensor):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value.detach().float().mean(), count + 1)
            else:
                self._numbers[name] = value

    def save_pipeline(self, pipeline: DiffusionPipeline, name: str = "pipeline") -> Path:
        """Writes a pipeline to `output_dir/name`, on the main process, in the place of an older one."""
        folder = self.output_dir / name
        if self.accelerator.is_main_process:
            staging, replaced = self.output_dir / f".staging-{name}", self.output_dir / f".replaced-{name}"
            for leftover in (staging, replaced):
                shutil.rmtree(leftover, ignore_errors=True)
            pipeline.save_pretrained(staging)
            if folder.exists():
                os.replace(folder, replaced)
            os.replace(staging, folder)
            shutil.rmtree(replaced, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return folder

    def keep_best(
        self, score: float, pipeline: DiffusionPipeline, measure: Mapping[str, str | int | float] | None = None
    ) -> None:
        """Notes a validation score, and writes the pipeline to `output_dir/best_pipeline` if it is the highest yet.

        Args:
            score: The higher the better; the same on all processes.
            pipeline: What was scored.
            measure: What the score was measured with; scores of another measure are not compared with it.
        """
        measure = dict(measure or {})
        self.log(validation_score=score)
        record = self.output_dir / "best_pipeline.json"
        text = [record.read_text() if self.accelerator.is_main_process and record.exists() else "{}"]
        best = json.loads(accelerate.utils.broadcast_object_list(text)[0])
        best = best if best.get("measure", measure) == measure else {}
        before = f"{best['score']:.4f}" if "score" in best else "none"
        self.print(f"Step {self.step}: validation score {score:.4f}, best before {before}.")
        if score > best.get("score", -math.inf):
            self.save_pipeline(pipeline, "best_pipeline")
            if self.accelerator.is_main_process:
                write_text(record, json.dumps({"step": self.step, "score": score, "measure": measure}) + "\n")

    def finish(self) -> None:
        """Ends trackers and leaves the group of processes; the last call of a script."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if (lock := _LOCKS.pop(self.output_dir.resolve(), None)) is not None:
            lock.release()

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Returns a prepared model without what processes and compilation put around it."""
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    @property
    def _seconds_allowed(self) -> float:
        return math.inf if self.config.max_minutes is None else 60 * self.config.max_minutes

    def _seconds(self) -> float:
        """Returns the seconds that the loop has taken, in all the processes that went on from one another."""
        return self._seconds_before + time.perf_counter() - self._started

    def _seed(self, micro_step: int) -> None:
        text = f"{self.config.seed} {micro_step} {self.accelerator.process_index}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        torch.manual_seed(seed)  # of every device
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def _resume(self) -> None:
        """Loads the checkpoint that was found, takes back later metrics and scores, and says what is run on what."""
        if self._origin is not None:
            # A GPU's run in fp16 has a scale of its losses, which goes on from its first value where there was none.
            load_checkpoint(self._origin, self._objects, optional=("grad_scaler",))
            self.step = self._manifest["step"]
            self.print(f"Going on after step {self.step} of {self.config.max_steps}, from {self._origin}.")
        if self.accelerator.is_main_process:
            self._truncate_metrics()
            record = self.output_dir / "best_pipeline.json"
            if record.exists() and json.loads(record.read_text())["step"] > self.step:
                record.unlink()
            self._describe()

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            facts = {**self._facts, "seconds": self._seconds(), "config": _plain(self.config)}
            save_checkpoint(self.checkpoints, self.step, self._objects, facts, num_kept=self.config.num_checkpoints)
        self.accelerator.wait_for_everyone()

    def _saved_step(self) -> int:
        return max((int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*")), default=0)

    @contextlib.contextmanager
    def _catch_signals(self) -> Iterator[None]:
        first = 0.0

        def note(number: int, frame: types.FrameType | None) -> None:
            nonlocal first
            if not self._signal:
                self._signal, first = number, time.monotonic()
                # After its backward pass a step no longer looks, so that the next one is the last.
                text = f"\n{signal.Signals(number).name}: saving after this step or the next; Ctrl-C aborts.\n"
                if self.accelerator.is_main_process:
                    with contextlib.suppress(OSError, ValueError):  # of a `tee` that the same Ctrl-C has ended
                        os.write(
                            sys.stderr.fileno(), text.encode()
                        )  # `print` must not be called from a signal handler
            # A launcher may send its own copy of the first Ctrl-C.
            elif number == signal.SIGINT and time.monotonic() > first + 1:
                raise KeyboardInterrupt

        # SIGHUP comes where a terminal is closed, SIGUSR1 from job schedulers that are about to end a job, SIGBREAK from
        # a console of Windows. Who ignores one, as `nohup` has SIGHUP ignored, goes on doing so.
        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGBREAK")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        before = {
            number: signal.signal(number, note)
            for number in numbers
            if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) == signal.SIG_DFL
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _announce(self, seconds_a_step: float, images: int) -> None:
        remaining = self.config.max_steps - self.step
        left = self._seconds_allowed - self._seconds()
        seconds = min(remaining * seconds_a_step, left)
        duration = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
        duration = duration if seconds < 6000 else f"{seconds / 3600:.1f} hours"
        self.print(
            f"{remaining:,} steps of {images} images to go, {images / seconds_a_step:.0f} images a second: this will take"
            f" about {duration}, samples and scores aside."
        )
        if left < remaining * seconds_a_step:
            last = self.step + max(0, int(left / seconds_a_step))
            here, there = (self.config.learning_rate_factor(step) for step in (last, self.config.max_steps))
            if here != there:
                self.print(
                    f"`max_minutes` will end this run near step {last:,}, where the learning rate is at {here:.0%} of its"
                    f" height instead of the {there:.0%} after `max_steps` {self.config.max_steps:,}: a schedule that is"
                    " to run its course needs fewer steps, earlier `milestones` or more minutes."
                )

    def _write_metrics(self, images: int) -> dict[str, float]:
        means = {name: total / count for name, (total, count) in self._sums.items()}
        if means:
            reduced = self.accelerator.reduce(torch.stack(list(means.values())), reduction="mean")
            means = dict(zip(means, reduced.tolist(), strict=True))
        start, began = self._window
        now = time.perf_counter()
        for i, scheduler in enumerate(self._schedulers):
            means["learning_rate" if len(self._schedulers) == 1 else f"learning_rate_{i}"] = scheduler.get_last_lr()[0]
        line = {**means, **self._numbers, "images_per_second": (self.step - start) * images / (now - began)}
        if self.accelerator.is_main_process:
            with (self.output_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": self.step, **line}) + "\n")
        if self.config.report_to:
            self.accelerator.log(line, step=self.step)
        self._sums, self._numbers, self._window = {}, {}, (self.step, now)
        return line

    def _truncate_metrics(self) -> None:
        path = self.output_dir / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                kept += [line] if json.loads(line)["step"] <= self.step else []
            except ValueError:  # torn by a crash; the steps of a checkpoint come before it
                break
        write_text(path, "".join(f"{line}\n" for line in kept))

    def _lock_folder(self) -> None:
        """Keeps other runs out of the folder as long as this one writes there; for good, if the process ends first."""
        is_free = True
        if self.accelerator.is_main_process and (folder := self.output_dir.resolve()) not in _LOCKS:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                is_free = False
            else:
                _LOCKS[folder] = lock
        if not accelerate.utils.broadcast_object_list([is_free])[0]:
            raise ValueError(
                f"`output_dir` {self.output_dir} is being written by another run; wait for it, or take another."
            )

    def _find_checkpoint(self) -> tuple[Path | None, dict[str, Any]]:
        """Returns the newest whole checkpoint and its manifest, which the main process looks for.

        Raises:
            ValueError: If there is none, though the folder holds what a run has trained.
        """
        folder, manifest = None, {"step": 0, "facts": {}}
        trained: list[str] = []
        if self.accelerator.is_main_process and (folder := newest_checkpoint(self.checkpoints)) is not None:
            manifest = read_manifest(folder)
            path = self.output_dir / "config.yaml"
            if "config" not in manifest["facts"] and path.exists():  # a checkpoint from before it held its recipe
                with contextlib.suppress(yaml.YAMLError):
                    manifest["facts"]["config"] = yaml.safe_load(path.read_text())
        elif self.accelerator.is_main_process:
            trained = [name for name in ("pipeline", "best_pipeline", "judge") if (self.output_dir / name).exists()]
            trained += [f"checkpoints/{path.name}" for path in sorted(self.checkpoints.glob("step-*"))]
        folder, manifest, trained = accelerate.utils.broadcast_object_list([folder, manifest, trained])
        if trained:
            raise ValueError(
                f"`output_dir` {self.output_dir} holds {', '.join(trained)}, which would be written over, and no whole"
                " checkpoint to go on from; train into another folder, or move that away."
            )
        return folder, manifest

    def _check_recipe(self) -> None:
        """Refuses a configuration that is not that of the checkpoint to go on from."""
        if self._origin is None:
            return
        theirs, step = self._manifest["facts"].get("config"), self._manifest["step"]
        if not isinstance(theirs, dict):
            raise ValueError(
                f"`output_dir` {self.output_dir} must hold the config.yaml of its checkpoint of step {step}, which is"
                " missing or unreadable; put that file back, or train into another folder."
            )
        # A field that is newer than the recipe had its default then.
        theirs, ours = _plain(type(self.config)()) | theirs, _plain(self.config)
        free = {item.name for item in dataclasses.fields(self.config) if item.metadata.get("may_change")}
        # These say what comes yet, too: an end, or a decay, may be settled once it is seen how training goes.
        course = {name: theirs[name] for name in ("max_steps", "lr_schedule", "decay_fraction", "milestones")}
        differing = [name for name in theirs if name not in {*free, *course} and ours.get(name) != theirs.get(name)]
        changed = [name for name in course if ours[name] != theirs[name]]
        if not differing and changed:
            before = dataclasses.replace(self.config, **course | {"milestones": tuple(course["milestones"])})
            steps = range(step + 1)  # the state that is loaded holds the learning rate of the next step
            factors = [(self.config.learning_rate_factor(i), before.learning_rate_factor(i)) for i in steps]
            if self.config.max_steps < step or any(new != old for new, old in factors):
                differing = changed
        if differing:
            changes = "; ".join(f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in differing)
            raise ValueError(
                f"`output_dir` {self.output_dir} holds {step} steps of another recipe: {changes}. Train into another"
                " folder, or go on with the old values."
            )

    def _describe(self) -> None:
        recipe = yaml.safe_dump(_plain(self.config), sort_keys=False)
        for name, text in {"config.yaml": recipe, **self._descriptions}.items():
            write_text(self.output_dir / name, text)
        # A judge may change on the way, but has watched, or taught, all the same.
        record = self.output_dir / "judges.json"
        before = json.loads(record.read_text()) if self.resuming and record.exists() else []
        given = (getattr(self.config, option, None) for option in ("judge", "evaluator"))
        judges = sorted({*before, *(judge_name(judge) for judge in given if judge is not None)})
        if judges or record.exists():
            write_text(record, json.dumps(judges) + "\n")
        if self.step < self.config.max_steps:
            path = self.output_dir / "environment.json"
            launches = json.loads(path.read_text()) if path.exists() else []
            launch = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": [sys.executable, *sys.argv]}
            launch |= describe_environment(self.accelerator.device, self.accelerator.num_processes)
            launch["mixed_precision"] = self.accelerator.mixed_precision  # in which it ran, whatever the recipe asks
            write_text(path, json.dumps([*launches, launch], indent=2) + "\n")


def run_script(main: Callable[[Config], None], config_class: type[Config]) -> None:
    """Runs a training script with the configuration of the command line.

    What is wrong with the data, weights or judge given to it shows before the loop, and is told in one line; a fault in
    the loop or behind it is one of the program and keeps its traceback.

    Raises:
        SystemExit: With code 2, if the command line, or what it names, is not as it must be.
    """
    config = parse_config(config_class)
    try:
        main(config)
    except (ValueError, OSError, ImportError) as error:
        if TrainingRun.has_begun:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=STANDARD_ERROR)
        raise SystemExit(2) from None


def _plain(config: TrainConfig) -> dict[str, Any]:
    """Returns the fields as YAML reads them back: tuples are lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}

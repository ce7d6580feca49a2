"""What a measurement or a training ran on: the machine, the versions, and the state of the source."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

PACKAGES = ("iclevr-diffusion", "torch", "diffusers", "accelerate", "transformers", "datasets", "numpy", "onnxruntime")


def describe_environment(device: torch.device, num_processes: int = 1) -> dict[str, Any]:
    """Describes machine, versions and commit, in words that hold for every run on the same installation.

    Args:
        device: Where the networks are.
        num_processes: How many processes share the work.
    """
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "machine": gpu or _processor(),
        "device": gpu or device.type,
        "num_processes": num_processes,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": git_commit(),
    }


def has_bfloat16(device: torch.device) -> bool:
    """Says whether a device has instructions for products in bfloat16; a CPU without any is much faster in float32.

    PyTorch calculates in bfloat16 everywhere, and counts what it emulates as supported. On a CPU that is told by its
    instructions (AVX-512 BF16 or AMX; on Arm BF16), on an NVIDIA GPU by its generation (Ampere and later). Of other
    devices, and by releases of PyTorch that do not list a CPU's instructions, it is taken for granted.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return True
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16"))


def asked_for_cpu() -> bool:
    """Whether a launcher says that nothing is to run on a GPU, by the variable ACCELERATE_USE_CPU."""
    return bool(os.environ.get("ACCELERATE_USE_CPU")) and parse_flag_from_env("ACCELERATE_USE_CPU")


def device_fault(device: torch.device | str) -> str | None:
    """Says in a line why nothing can be calculated on a device, if so.

    A device that PyTorch lists may still be one whose kernels this build of PyTorch lacks, which shows once one is used.
    """
    try:
        (torch.ones(2, device=device) + 1).cpu()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return None


def default_device() -> torch.device:
    """Returns where networks run if nobody says: on a GPU of CUDA or ROCm that works, else on the CPU.

    It warns of a GPU that does not work, and leaves GPUs alone where ACCELERATE_USE_CPU is set.
    """
    if not torch.cuda.is_available() or asked_for_cpu():
        return torch.device("cpu")
    if (fault := device_fault("cuda")) is not None:
        warnings.warn(f"The GPU cannot be used ({fault}), so the CPU is.", stacklevel=2)
        return torch.device("cpu")
    return torch.device("cuda")


def num_processors() -> int:
    """Counts the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_note(num_processes: int) -> str | None:
    """Says what to do where the processes on the CPU of this machine have fewer or more threads than there are processors.

    As many threads as there are cores are right too, where each core is two processors.

    Args:
        num_processes: How many processes share the work; of several machines, `LOCAL_WORLD_SIZE` says how many are here.
    """
    processors = num_processors()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    threads = here * torch.get_num_threads()
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)  # newer than the oldest PyTorch that will do
    if threads in (processors, min(processors, get_capabilities().get("num_physical_cores", processors))):
        return None
    wanted = max(1, processors // here)
    if threads < processors:
        return f"{threads} of the {processors} processors are used; OMP_NUM_THREADS={wanted} uses {wanted * here}."
    if torch.get_num_threads() == wanted:
        return None  # more processes than processors, of one thread each
    return (
        f"{threads} threads share {processors} processors and wait for each other; OMP_NUM_THREADS={wanted} is faster."
    )


def lost_processes_note(num_processes: int) -> str | None:
    """Says what to do where `accelerate launch` seems to have been asked for more processes than the one that runs.

    With `--cpu` it leaves it to MPI to start several. Without MPI it starts one, and says nothing
    (https://github.com/huggingface/accelerate/issues/2741): the program finds no more than the variables for a meeting
    of several.
    """
    if num_processes > 1 or os.environ.get("ACCELERATE_USE_CPU") != "True" or "MASTER_PORT" not in os.environ:
        return None
    return (
        "One process runs. If several were asked for: `accelerate launch --cpu --num_processes` starts them under MPI"
        " alone; launch with --config_file train_scripts/accelerate/two_cpu.yaml instead, and --num_processes for others"
        " than two."
    )


def _processor() -> str:
    """Names the model of the CPU where Linux tells it, else its kind."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Returns the commit of the source tree, with a mark where files differ from it, or `None` outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    tracked = [*git, "ls-files", "--error-unmatch", Path(__file__).name]  # not so in a project's own `.venv`
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        subprocess.run(tracked, capture_output=True, check=True)
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    return None

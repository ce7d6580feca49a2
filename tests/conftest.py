"""Fixtures that several test files share; everything is 16x16 and made on the spot, so that no file needs a download."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# Set before torch and the Hugging Face libraries are imported, since they read these once. The caches go to a folder
# that lasts as long as this process: what a developer has cached or configured must not decide whether a test passes.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="iclevr-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_unconfigure() -> None:
    """Removes this process's caches."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def iclevr_root() -> Path:
    """The folder with the real i-CLEVR files; a test that asks for it skips where there is none."""
    root = os.environ.get("ICLEVR_ROOT")
    if not root:
        pytest.skip("needs the real i-CLEVR files: set ICLEVR_ROOT to the folder that holds objects.json")
    return Path(root)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the layout of i-CLEVR with four rendered scenes at 16x16; tests read it and never write to it."""
    from iclevr_diffusion.rendering import render_dataset

    return render_dataset(
        tmp_path_factory.mktemp("tiny") / "dataset", 4, size=16, seed=0, num_workers=1, progress=False
    )


@pytest.fixture
def tiny_unet() -> torch.nn.Module:
    """A small `MultiLabelUNet2DModel` in evaluation mode with the same random weights every time."""
    from iclevr_diffusion import MultiLabelUNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MultiLabelUNet2DModel(
            num_classes=24, sample_size=16, block_out_channels=(8, 16), attention_head_dim=8, null_condition=True
        ).eval()


@pytest.fixture
def tiny_pipeline(tiny_unet: torch.nn.Module) -> object:
    """A `ConditionalDDPMPipeline` around `tiny_unet` with a DDPM scheduler and the i-CLEVR labels; draws noise, fast."""
    from diffusers import DDPMScheduler

    from iclevr_diffusion import ICLEVR_LABELS, ConditionalDDPMPipeline

    pipeline = ConditionalDDPMPipeline(
        tiny_unet, DDPMScheduler(clip_sample=False), label_names=list(ICLEVR_LABELS.names)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a train script on the CPU as a user would: `accelerate launch`, or `torchrun` for several processes.

    `run_script("train_ddpm.py", "--max_steps", 2, num_processes=2)` returns the finished process with its text output;
    a script that fails fails the test and shows what it printed, unless `check=False`.
    """

    def run(
        script: str, *arguments: object, num_processes: int = 1, check: bool = True, timeout: float = 240.0
    ) -> subprocess.CompletedProcess[str]:
        if num_processes == 1:
            launcher = ["accelerate.commands.launch", "--cpu", "--mixed_precision", "no", "--dynamo_backend", "no"]
            launcher += ["--num_machines", "1", "--num_processes", "1", "--num_cpu_threads_per_process", "1"]
        else:  # `accelerate launch --cpu --num_processes 2` starts one process that believes it is alone
            launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
        finished = subprocess.run(
            [sys.executable, "-m", *launcher, str(REPOSITORY / "train_scripts" / script), *map(str, arguments)],
            env=os.environ | {"ACCELERATE_USE_CPU": "true"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if check and finished.returncode != 0:
            pytest.fail(f"{script} ended with status {finished.returncode}:\n{finished.stdout}")
        return finished

    return run


@pytest.fixture(autouse=True)
def own_signals():
    """Puts signal handlers back that a script's `main` has set: worker processes of later tests would inherit them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)

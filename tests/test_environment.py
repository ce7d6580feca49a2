import contextlib
import os
import re
import subprocess
import sys

import pytest
import torch

from iclevr_diffusion import environment
from iclevr_diffusion.environment import (
    default_device,
    device_fault,
    has_bfloat16,
    lost_processes_note,
    num_processors,
    threads_note,
)


@pytest.fixture
def lost(monkeypatch):
    """What a process finds that `accelerate launch --cpu --num_processes 2` has started alone."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")


def test_a_process_that_was_not_to_be_alone_is_told_how_to_start_the_others(lost):
    assert "--config_file train_scripts/accelerate/two_cpu.yaml" in lost_processes_note(1)
    assert lost_processes_note(2) is None


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_CPU", "MASTER_PORT"])
def test_a_process_that_was_to_be_alone_is_told_nothing(lost, monkeypatch, variable):
    monkeypatch.delenv(variable)
    assert lost_processes_note(1) is None


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "avx2": True, "amx_bf16": True}, True),
        ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
    ],
)
def test_a_cpu_has_bfloat16_where_it_has_instructions_for_products(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_bfloat16(torch.device("cpu")) is expected


def test_a_gpu_that_emulates_bfloat16_does_not_have_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not has_bfloat16(torch.device("cuda"))


def test_bfloat16_is_taken_for_granted_where_nothing_tells(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert has_bfloat16(torch.device("cpu")) and has_bfloat16(torch.device("mps"))


def test_a_device_that_calculates_has_no_fault_and_another_says_why():
    assert device_fault("cpu") is None
    assert "meta" in device_fault("meta")


@pytest.mark.parametrize(
    ("fault", "use_cpu", "expected"),
    [(None, "0", "cuda"), (None, "", "cuda"), (None, "1", "cpu"), ("no kernel image", "0", "cpu")],
)
def test_a_gpu_is_taken_by_itself_where_it_works_and_was_not_forbidden(monkeypatch, fault, use_cpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment, "device_fault", lambda device: fault)
    monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    expectation = pytest.warns(UserWarning, match="no kernel image") if fault else contextlib.nullcontext()
    with expectation:
        assert default_device().type == expected


@pytest.mark.parametrize(
    ("processors", "threads", "processes", "advice"),
    [
        (4, 4, 1, None),
        (4, 2, 2, None),
        (4, 1, 1, "1 of the 4 processors are used; OMP_NUM_THREADS=4 uses 4"),
        (5, 1, 2, "2 of the 5 processors are used; OMP_NUM_THREADS=2 uses 4"),
        (4, 64, 1, "64 threads share 4 processors .* OMP_NUM_THREADS=4"),
        (1, 1, 2, None),
        (16, 8, 1, None),  # the cores of a machine that has two processors each
    ],
)
def test_threads_that_do_not_fit_the_processors_are_told(monkeypatch, processors, threads, processes, advice):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(environment, "num_processors", lambda: processors)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    cores = 8 if processors == 16 else processors
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"num_physical_cores": cores}, raising=False)
    note = threads_note(processes)
    assert note is None if advice is None else re.search(advice, note)


def test_of_several_machines_the_processes_of_this_one_count(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(environment, "num_processors", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert threads_note(8) is None


def test_only_the_processors_that_a_process_may_use_count(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert num_processors() == 2


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "expected"), [("2", "two_cpu.yaml"), ("1", "None")])
def test_accelerate_still_starts_one_process_where_several_are_asked_for_on_the_cpu(tmp_path, num_processes, expected):
    script = tmp_path / "script.py"
    script.write_text("from iclevr_diffusion.environment import lost_processes_note as n; print(n(1))")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", num_processes]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    out = subprocess.run([*launch, str(script)], env=environment, capture_output=True, text=True, check=True).stdout
    assert expected in out and out.count("\n") == 1

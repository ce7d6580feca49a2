import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from iclevr_diffusion import MultiLabelUNet2DModel

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import limits  # noqa: E402


def smallest_network(device):
    with torch.device(device):
        return MultiLabelUNet2DModel(
            num_classes=3, sample_size=8, block_out_channels=(4,), layers_per_block=1, attention_head_dim=2,
            norm_num_groups=2, null_condition=True,
        )  # fmt: skip


def smallest_inputs(device, batch_size=1):
    sample = torch.zeros(batch_size, 3, 8, 8, device=device)
    return sample, torch.zeros(batch_size, device=device), torch.zeros(batch_size, 3, device=device)


# Multiplications of the network above for one image of 8x8 pixels, counted by hand.
RESIDUAL = 2 * 64 * 9 * 4 * 4 + 16 * 4  # two 3x3 convolutions, the time for 4 channels
MULTIPLICATIONS = (
    3 * 16  # labels
    + 4 * 16 + 16 * 16  # time
    + 64 * 9 * 3 * 4  # into the network
    + RESIDUAL  # down
    + 2 * RESIDUAL + 4 * 64 * 4 * 4 + 2 * 64 * 64 * 4  # between: attention has four layers and two products
    + 2 * (RESIDUAL + 64 * 9 * 4 * 4 + 64 * 8 * 4)  # up: twice as many channels come in, and past by a 1x1 convolution
    + 64 * 9 * 4 * 3  # out of it
)  # fmt: skip


def test_operations_are_those_counted_by_hand():
    operations = limits.count_operations(smallest_network("meta"), smallest_inputs("meta"))
    assert operations == 2 * MULTIPLICATIONS


def test_operations_do_not_depend_on_the_device_and_grow_with_the_batch():
    network = smallest_network("cpu")
    assert limits.count_operations(network, smallest_inputs("cpu")) == 2 * MULTIPLICATIONS
    assert limits.count_operations(network, smallest_inputs("cpu", 5)) == 5 * 2 * MULTIPLICATIONS


def test_the_backward_takes_twice_the_operations_but_for_what_needs_no_gradient():
    without_gradient = 64 * 9 * 3 * 4 + 3 * 16 + 4 * 16  # by the image, the labels and the time
    operations = limits.count_operations(smallest_network("meta"), smallest_inputs("meta"), backward=True)
    assert operations == 2 * (3 * MULTIPLICATIONS - without_gradient)


def test_bytes_are_those_of_every_operation_but_views():
    x, y = torch.zeros(4, 3), torch.zeros(3)
    counter = limits.ByteCounter()
    with counter:
        (x.view(12) * 2).reshape(4, 3) + y
    assert counter.num_bytes == 4 * (12 + 12) + 4 * (12 + 3 + 12)


@pytest.mark.parametrize("preset", ["tiny", "tokens"])
def test_a_preset_is_counted_without_memory_for_it(preset):
    counts = limits.count_preset(preset)
    network = MultiLabelUNet2DModel.from_preset(preset, num_classes=24, null_condition=True)
    assert counts["num_parameters"] == sum(weight.numel() for weight in network.parameters())
    assert counts["megabytes_of_weights"] * 1e6 == 4 * counts["num_parameters"]
    assert 2.8 < counts["gigaflop_to_train_on_an_image"] / counts["gigaflop_a_call"] < 3
    assert counts["megabytes_moved_by_a_call"] > counts["megabytes_of_weights"]


def test_the_costliest_convolutions_come_first():
    shapes = limits.costliest_convolutions("tiny")
    shares = [shape["share_of_operations"] for shape in shapes]
    assert shares == sorted(shares, reverse=True)
    assert 0.3 < sum(shares) < 1
    counted = 2 * shapes[0]["kernel_size"] ** 2 * shapes[0]["in_channels"] * shapes[0]["out_channels"]
    times = shares[0] * 1e9 * limits.count_preset("tiny")["gigaflop_a_call"] / counted / shapes[0]["output_size"] ** 2
    assert times == pytest.approx(round(times), abs=1e-6)  # so many layers of this shape


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("aten::convolution_backward", "convolutions, backward"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::addmm", "linear layers"),
        ("aten::native_group_norm", "normalization"),
        ("aten::copy_", "copies and casts"),
        ("aten::silu_backward", "element by element"),
        ("autograd::engine::evaluate_function: AddBackward0", "other"),
    ],
)
def test_an_operation_is_of_a_kind(key, kind):
    event = SimpleNamespace(key=key, self_cpu_time_total=2e6, self_device_time_total=0, device_type="DeviceType.CPU")
    assert limits.condense([event], torch.device("cpu")) == {kind: 2.0}


def test_a_kernel_of_the_device_is_counted_once():
    started = SimpleNamespace(key="aten::mm", self_cpu_time_total=9, self_device_time_total=3e6, device_type="CPU")
    kernel = SimpleNamespace(key="gemm", self_cpu_time_total=0, self_device_time_total=3e6, device_type="CUDA")
    assert limits.condense([started, kernel], torch.device("cuda")) == {"linear layers": 3.0}


@pytest.mark.parametrize(("duration", "num_runs", "num_profiled"), [(6.0, 2, 1), (4.0, 5, 3)])
def test_what_takes_long_is_measured_and_profiled_once(monkeypatch, duration, num_runs, num_profiled):
    clock, runs = [0.0], []

    def run():
        runs.append(1)
        clock[0] += duration

    monkeypatch.setattr(limits.time, "perf_counter", lambda: clock[0])
    assert limits.median_seconds(run, torch.device("cpu"), seconds=2.0) == duration and len(runs) == num_runs
    limits.profile_run(run, torch.device("cpu"), duration)
    assert len(runs) == num_runs + num_profiled


def test_a_profile_has_shares_of_all_the_time():
    layer, x = nn.Conv2d(3, 8, 3), torch.zeros(2, 3, 16, 16)
    shares = limits.profile_run(lambda: layer(x), torch.device("cpu"), seconds=0.01)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["convolutions"] > 0


@pytest.mark.parametrize("has_it", [True, False])
def test_the_best_rate_is_that_of_a_product_or_of_a_convolution(monkeypatch, has_it):
    monkeypatch.setattr(limits, "has_bfloat16", lambda device: has_it)
    monkeypatch.setitem(limits.MATRIX_SIZES, "cpu", (8, 16))
    monkeypatch.setitem(limits.CONVOLUTION_BATCH_SIZES, "cpu", 1)
    monkeypatch.setattr(limits, "COPIED_BYTES", 1000)
    # Each run "takes" a second, so that rates are operations: 2 * 16**3 of the larger product, and the convolution's.
    monkeypatch.setattr(limits, "median_seconds", lambda run, device, seconds: 1.0)
    machine = limits.measure_machine(torch.device("cpu"), 1.0)
    assert machine["gigaflop_a_second_by_size"]["float32"] == pytest.approx({"8": 2e-9 * 8**3, "16": 2e-9 * 16**3})
    best = machine["best_gigaflop_a_second"]
    assert set(best) == (
        {"float32", "bfloat16"} if has_it else {"float32"}
    )  # what is emulated is no rate of the machine
    assert all(rate == pytest.approx(2e-9 * 9 * 256 * 256 * 32 * 32) for rate in best.values())
    assert machine["gigabytes_a_second"] == pytest.approx(2e-6)


def test_a_training_step_moves_weights_and_average():
    network = MultiLabelUNet2DModel.from_preset(
        "tiny",
        block_out_channels=(8, 8),
        attention_levels=(),
        attention_head_dim=4,
        num_classes=24,
        null_condition=True,
    )
    step = limits.TrainingStep(network, 1, torch.device("cpu"), mixed=True)
    before = [weight.detach().clone() for weight in network.unet.conv_in.parameters()]
    step.run_backward()
    assert all(torch.equal(a, b) for a, b in zip(before, network.unet.conv_in.parameters(), strict=True))
    step.update()
    for weights in (network.unet.conv_in.parameters(), step.ema.model.unet.conv_in.parameters()):
        assert not any(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


def test_a_record_of_other_settings_is_not_gone_on_with(tmp_path):
    path = tmp_path / "limits.json"
    settings = {"machine": "a", "num_threads": 2}
    record = limits.start_record(path, settings) | {"presets": {"tiny": {}}}
    path.write_text(json.dumps(record))
    assert limits.start_record(path, settings) == record
    with pytest.raises(ValueError, match=r"num_threads: 2 there, 1 here\); remove it, or name another"):
        limits.start_record(path, settings | {"num_threads": 1})

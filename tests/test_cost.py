from types import SimpleNamespace

import torch

from iclevr_diffusion import cost
from iclevr_diffusion.cost import measure_cost


def measure(monkeypatch, seconds_of_draw, batch_size=8, rows=lambda num_images: num_images, is_compiled=False):
    """Measures a drawing that takes `seconds_of_draw(number of the call, num_images)` on a made-up clock."""
    network, calls, clock = torch.nn.Linear(1, 1), [], [0.0]
    if is_compiled:
        monkeypatch.setattr(network, "_compiled_call_impl", network._call_impl)

    def draw(num_images):
        calls.append(num_images)
        network(torch.zeros(rows(num_images), 1))
        clock[0] += seconds_of_draw(len(calls), num_images)

    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    return measure_cost(draw, [network], batch_size=batch_size), calls, network


def test_speed_and_latency_are_those_of_warm_repeats(monkeypatch):
    found, calls, _ = measure(monkeypatch, lambda call, num_images: 5.0 if call in (1, 2, 6) else num_images / 4)
    assert found == {
        "images_per_second": 4.0,
        "seconds_for_one_image": 0.25,
        "batch_size": 8,
        "network_calls_per_image": 1,
    }
    assert calls == [1, *[8] * 4, *[1] * 4]


def test_what_takes_long_is_drawn_once(monkeypatch):
    found, calls, _ = measure(monkeypatch, lambda call, num_images: 11.0 * num_images)
    assert calls == [1, 8, 1]
    assert found["images_per_second"] == 8 / 88 and found["seconds_for_one_image"] == 11.0


def test_what_compiling_takes_is_not_held_for_the_time_of_drawing(monkeypatch):
    compiled = (2, 4)  # the first drawings of a batch and of one image, after the one whose calls are counted
    found, calls, _ = measure(monkeypatch, lambda call, _: 60.0 if call in compiled else 11.0, is_compiled=True)
    assert calls == [1, 8, 8, 1, 1]
    assert found["images_per_second"] == 8 / 11 and found["seconds_for_one_image"] == 11.0


def test_a_call_counts_once_for_each_of_its_rows(monkeypatch):
    found, _, network = measure(monkeypatch, lambda *_: 1.0, rows=lambda num_images: 2 * num_images)
    assert found["network_calls_per_image"] == 2
    assert not network._forward_pre_hooks  # nothing is left behind

"""What it costs to draw an image: time, and calls of the networks."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

NUM_REPEATS = 3
LONG = 10.0  # seconds; what takes longer is neither warmed up for nor repeated


def measure_cost(draw: Callable[[int], Any], networks: Sequence[nn.Module], *, batch_size: int) -> dict[str, Any]:
    """Measures images drawn together and one drawn alone: after a first time to warm up, the median of three.

    Args:
        draw: Draws so many images and waits until they are there.
        networks: The networks that draw.
        batch_size: How many images are drawn together.

    Returns:
        `images_per_second` for `batch_size` images at a time, `seconds_for_one_image`, and
        `network_calls_per_image`, where a call for a batch counts once for each of its rows: guidance, which asks
        twice, counts twice.
    """
    num_rows = 0

    def count(network: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal num_rows
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1]
        num_rows += max(map(len, tensors), default=1)

    with ExitStack() as hooks:
        for network in networks:
            handle = network.register_forward_pre_hook(count, with_kwargs=True)
            hooks.callback(handle.remove)
        draw(1)

    # They compile again without the hooks, and for every shape.
    is_compiled = any(network._compiled_call_impl is not None for network in networks)

    def seconds(num_images: int) -> float:
        measured = []
        for _ in range(1 + NUM_REPEATS):
            begin = time.perf_counter()
            draw(num_images)
            measured.append(time.perf_counter() - begin)
            if measured[-1] > LONG and (len(measured) > 1 or not is_compiled):
                return measured[-1]
        return statistics.median(measured[1:])

    return {
        "images_per_second": batch_size / seconds(batch_size),
        "seconds_for_one_image": seconds(1),
        "batch_size": batch_size,
        "network_calls_per_image": num_rows,
    }

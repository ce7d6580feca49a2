"""Sampling time in words: what `benchmarks/sampling.py` measured in one run, as a part of the leaderboard."""

import json
from pathlib import Path
from typing import Any

from iclevr_diffusion.leaderboard_tables import markdown_row, three_digits

SCHEMA_VERSION = 1
YARDSTICK = "reported DDPM network, 1000 calls of DDPM"  # what every system's time is set against
_NUMBERS = ("num_parameters", "network_calls_per_image", "seconds_for_one_image", "seconds_an_image_in_a_batch")
_CIRCUMSTANCES = ("systems", "machine", "device", "dtype", "num_threads", "batch_size", "date")


def load_sampling(path: Path) -> dict[str, Any]:
    """Opens what `benchmarks/sampling.py` wrote.

    Raises:
        ValueError: If it is not one of this version, or lacks something that the table shows.
    """
    again = "run benchmarks/sampling.py again to write it"
    try:
        sampling = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON, and does not ({error}); {again}.") from None
    version = sampling.get("schema_version") if isinstance(sampling, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path} must have schema_version {SCHEMA_VERSION}, got {version!r}; {again}.")
    if missing := [key for key in _CIRCUMSTANCES if key not in sampling]:
        raise ValueError(f"{path} must say {', '.join(missing)}, and does not; {again}.")
    systems = sampling["systems"]
    if YARDSTICK not in systems:
        raise ValueError(f"{path} must hold the times of the {YARDSTICK}, and does not; {again}.")
    for name, system in systems.items():
        for key in _NUMBERS:
            value = system.get(key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(
                    f"{path} is malformed: {key} of {name} must be a number above 0, got {value!r}; {again}."
                )
    return sampling


def render_sampling(sampling: dict[str, Any]) -> list[str]:
    """Writes a heading, a sentence and a table out, the fastest system first."""
    systems, batch_size = sampling["systems"], sampling["batch_size"]
    slowest = systems[YARDSTICK]["seconds_for_one_image"]
    titles = ["system", "network calls an image", "parameters", "seconds for one image", "times as fast as the DDPM"]
    lines = [markdown_row([*titles, f"seconds an image, {batch_size} at a time"]), "|---|" + "---:|" * len(titles)]
    for name, system in sorted(systems.items(), key=lambda item: item[1]["seconds_for_one_image"]):
        in_batch = three_digits(system["seconds_an_image_in_a_batch"])
        if system.get("batch_timed_on_steps") is not None:
            in_batch += f" (from {system['batch_timed_on_steps']} steps)"
        cells = [
            name,
            three_digits(system["network_calls_per_image"]),
            f"{system['num_parameters'] / 1e6:.2f} M",
            three_digits(system["seconds_for_one_image"]),
            three_digits(slowest / system["seconds_for_one_image"]),
            in_batch,
        ]
        lines.append(markdown_row(cells))
    threads = f"{sampling['num_threads']} thread{'' if sampling['num_threads'] == 1 else 's'}"
    where = ", ".join(dict.fromkeys([sampling["machine"], sampling["device"], threads, sampling["dtype"]]))
    return [
        "## Sampling time",
        f"Measured side by side in one run on {where}, {sampling['date']}. The DDPM that others are set against is the"
        " reported one: its network asked 1000 times. Reported networks have random weights here, which take as long as"
        " trained ones. Every image drawn alone was drawn in full; where it is said, a batch was timed on some of its"
        " steps and multiplied.",
        "\n".join(lines),
    ]

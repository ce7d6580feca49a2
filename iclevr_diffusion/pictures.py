"""The pictures of a report: classes, latents, denoising, guidance and translation by a pipeline, and a run's curves."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

import iclevr_diffusion
from iclevr_diffusion.call_options import call_options, request_lines, takes
from iclevr_diffusion.images import make_grid, make_strip, make_table, save_gif, save_png

LabelLists = Sequence[str | Sequence[str]]  # text as for `parse_prompt`, or labels

FRAME_MILLISECONDS = 80


@dataclass
class Picture:
    """A picture and what is known about it.

    Args:
        image: The picture.
        facts: What it shows and how it was drawn, the metadata of its files.
        frames: The frames of a moving picture that goes with it, if there is one.
    """

    image: Image.Image
    facts: dict[str, Any]
    frames: list[Image.Image] = field(default_factory=list)

    def save(self, path: str | Path) -> list[Path]:
        """Writes the picture to `path`, the moving one beside it with the ending .gif, and returns the files.

        Raises:
            ValueError: If `path` does not end in .png.
        """
        path = Path(path)
        if path.suffix != ".png":
            raise ValueError(f"`path` must end in .png, as a PNG file holds the picture's facts, got {str(path)!r}.")
        facts = self.facts | {"Software": f"iclevr_diffusion {iclevr_diffusion.__version__}"}
        save_png(self.image, path, facts)
        if not self.frames:
            return [path]
        save_gif(self.frames, path.with_suffix(".gif"), facts, duration=FRAME_MILLISECONDS)
        return [path, path.with_suffix(".gif")]


def draw_classes(
    pipeline: DiffusionPipeline,
    label_lists: LabelLists | None,
    num_images: int = 8,
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Picture:
    """Draws a row for each label set, each row from the same seeds, which count up from `seed`.

    Args:
        pipeline: A pipeline that draws images of labels, or images of no labels.
        label_lists: Label sets, one a row; `None` for a pipeline without labels, of which all `num_images` rows are
            drawn from seeds of their own.
        num_images: Images in a row.
        seed: Seed of the first image of a row.
        options: Arguments of the pipeline's call by name, such as `num_inference_steps`.

    Raises:
        ValueError: If an option is not one of the pipeline's, or the pipeline refuses the labels.
    """
    num_rows = num_images if label_lists is None else len(label_lists)
    if label_lists is None:
        seeds = list(range(seed, seed + num_rows * num_images))
    else:
        seeds = list(range(seed, seed + num_images)) * num_rows
    images = _draw(pipeline, _each(label_lists, num_images), options, seeds=seeds).images
    facts = _facts(pipeline, "classes", options, labels=label_lists, seeds=_rows(seeds, num_images))
    return Picture(make_table(_rows(images, num_images), _captions(label_lists)), facts)


def draw_latents(
    pipeline: DiffusionPipeline,
    labels: Sequence[str] | None,
    seeds: Sequence[int] = (0, 1, 2, 3),
    *,
    size: int = 8,
    options: Mapping[str, Any] | None = None,
) -> Picture:
    """Draws a square of images whose latents lie between those of its four corners.

    The latents are interpolated spherically, first down the left and the right edge and then along the rows, so that
    all are as long as latents are that the network was trained with.

    Args:
        pipeline: A pipeline that takes `latents`, as GANs and VAEs do.
        labels: The labels of all images; `None` for a pipeline without labels.
        seeds: Seeds of the corners: top left, top right, bottom left, bottom right.
        size: Rows and columns, at least 2.
        options: Arguments of the pipeline's call by name.

    Raises:
        ValueError: If the pipeline takes no latents, or the numbers of seeds and rows are not those above.
    """
    if len(seeds) != 4:
        raise ValueError(f"`seeds` must be four, one a corner, got {len(seeds)}.")
    top_left, top_right, bottom_left, bottom_right = _latents(pipeline, seeds)
    left = interpolate(top_left, bottom_left, size)
    right = interpolate(top_right, bottom_right, size)
    latents = torch.cat([interpolate(*ends, size) for ends in zip(left, right, strict=True)])
    label_lists = None if labels is None else [labels]
    images = _draw(pipeline, _each(label_lists, size * size), options, latents=latents).images
    facts = _facts(pipeline, "latents", options, labels=labels, corner_seeds=list(seeds), interpolation="spherical")
    return Picture(make_table(_rows(images, size)), facts)


def draw_interpolation(
    pipeline: DiffusionPipeline,
    label_lists: LabelLists | None,
    seeds: Sequence[int] = (0, 1),
    *,
    num_images: int = 16,
    options: Mapping[str, Any] | None = None,
) -> Picture:
    """Draws the way from one seed's latents to another's: as a row for each label set, and moving, there and back.

    Args:
        pipeline: A pipeline that takes `latents`, as GANs and VAEs do.
        label_lists: Label sets, one a row; `None` for a pipeline without labels, which gives one row.
        seeds: The two seeds, whose own images are the ends.
        num_images: Images in a row, at least 2; spherically interpolated between the ends.
        options: Arguments of the pipeline's call by name.

    Raises:
        ValueError: If the pipeline takes no latents, or the numbers of seeds and images are not those above.
    """
    if len(seeds) != 2:
        raise ValueError(f"`seeds` must be two, one an end, got {len(seeds)}.")
    latents = interpolate(*_latents(pipeline, seeds), num_images)
    num_rows = 1 if label_lists is None else len(label_lists)
    images = _draw(pipeline, _each(label_lists, num_images), options, latents=latents.repeat(num_rows, 1)).images
    rows, captions = _rows(images, num_images), _captions(label_lists)
    frames = [make_grid(column, captions or None) for column in zip(*rows, strict=True)]
    ends = [f"seed {seeds[0]}", *[""] * (num_images - 2), f"seed {seeds[1]}"]
    facts = _facts(
        pipeline, "interpolation", options, labels=label_lists, end_seeds=list(seeds), interpolation="spherical"
    )
    return Picture(make_table(rows, captions, ends), facts, frames + frames[-2:0:-1])


def draw_denoising(
    pipeline: DiffusionPipeline,
    label_lists: LabelLists,
    *,
    num_states: int = 10,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Picture:
    """Draws how each label set's image comes out of the noise, a row an image.

    Args:
        pipeline: A pipeline that returns states on its way, as diffusion pipelines do.
        label_lists: Label sets, one a row.
        num_states: States before the image, the first being the noise.
        seed: Seed of the first row; the next ones count up from it.
        options: Arguments of the pipeline's call by name.

    Raises:
        ValueError: If the pipeline returns no states, or not so many.
    """
    if not takes(pipeline, "num_states"):
        raise ValueError(
            f"`pipeline` must draw step by step for a picture of its denoising, and a {type(pipeline).__name__} draws in"
            " one call."
        )
    seeds = list(range(seed, seed + len(label_lists)))
    output = _draw(pipeline, label_lists, options, seeds=seeds, num_states=num_states)
    captions = [f"{round(100 * state / num_states)} %" for state in range(num_states)] + ["image"]
    rows = list(zip(*output.states, output.images, strict=True))
    facts = _facts(pipeline, "denoising", options, labels=label_lists, seeds=seeds, num_states=num_states)
    return Picture(make_table(rows, _captions(label_lists), captions), facts)


def draw_guidance(
    pipeline: DiffusionPipeline,
    label_lists: LabelLists,
    weights: Sequence[float] = (0.0, 0.5, 2.0),
    num_images: int = 4,
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Picture:
    """Draws each label set, a row each, from the same seeds at several weights of guidance, a column each.

    The weight is w in `(1 + w) * conditional - w * unconditional`, the convention of *Classifier-Free Diffusion
    Guidance* (Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598), where 0 is off: `guidance_scale` is 1 + w.

    Args:
        pipeline: A pipeline that takes `guidance_scale`, as diffusion pipelines do.
        label_lists: Label sets, one a row.
        weights: The values of w.
        num_images: Images of each label set at each weight.
        seed: Seed of the first of these images.
        options: Arguments of the pipeline's call by name, without `guidance_scale`.

    Raises:
        ValueError: If the pipeline or its network knows no guidance, or `options` holds a `guidance_scale`.
    """
    if not takes(pipeline, "guidance_scale"):
        raise ValueError(
            f"`pipeline` must take `guidance_scale` for a picture of its guidance, and a {type(pipeline).__name__} does"
            " not."
        )
    if options is not None and options.get("guidance_scale") is not None:
        raise ValueError(
            f"`guidance_scale` must be left out, as 1 + w of each of the weights takes its place, got"
            f" {options['guidance_scale']}."
        )
    scales = [1.0 + weight for weight in weights]
    seeds = list(range(seed, seed + num_images)) * len(label_lists)
    columns = []
    for scale in scales:
        of_scale = dict(options or {}) | {"guidance_scale": scale}
        images = _draw(pipeline, _each(label_lists, num_images), of_scale, seeds=seeds).images
        columns.append([make_strip(row) for row in _rows(images, num_images)])
    captions = [f"w = {weight:g}, guidance_scale {scale:g}" for weight, scale in zip(weights, scales, strict=True)]
    if num_images == 1:  # no room for a long line
        captions = [caption.replace(", guidance_scale", "\nscale") for caption in captions]
    rows = list(zip(*columns, strict=True))
    facts = _facts(pipeline, "guidance", options, labels=label_lists, seeds=seeds[:num_images])
    facts |= {"weights": list(weights), "guidance_scale": scales}
    return Picture(make_table(rows, _captions(label_lists), captions, min_width=64 * num_images), facts)


def draw_translation(
    pipeline: DiffusionPipeline,
    images: Sequence[Image.Image],
    direction: Literal["a_to_b", "b_to_a"] = "a_to_b",
    *,
    options: Mapping[str, Any] | None = None,
) -> Picture:
    """Draws images, what a pipeline maps them to, and what it maps these back to: a row each, a column an image.

    Args:
        pipeline: A pipeline that maps images both ways, as a CycleGAN does.
        images: Images of any size and mode; they are resized to the network's, as data sets are.
        direction: The way in which these images are mapped first.
        options: Arguments of the pipeline's call by name.

    Raises:
        ValueError: If the pipeline maps no images, or there is no such direction or no image.
    """
    if not takes(pipeline, "direction"):
        raise ValueError(f"`pipeline` must map images to images, as a CycleGAN does, got a {type(pipeline).__name__}.")
    ways = {"a_to_b": "b_to_a", "b_to_a": "a_to_b"}
    if direction not in ways:
        raise ValueError(f"`direction` must be `a_to_b` or `b_to_a`, got {direction!r}.")
    if not images:
        raise ValueError("`images` must hold at least one image, got none.")
    config = getattr(pipeline, f"generator_{direction}").config
    size, mode = (config.sample_size, config.sample_size), "L" if config.in_channels == 1 else "RGB"
    images = [image.convert(mode).resize(size, Image.Resampling.BILINEAR) for image in images]
    arguments = call_options(pipeline, options or {})
    mapped = pipeline(images, direction=direction, **arguments).images
    cycled = pipeline(mapped, direction=ways[direction], **arguments).images
    captions = ["input", direction.replace("_", " "), "and back"]
    facts = _facts(pipeline, "translation", options, direction=direction)
    return Picture(make_table([images, mapped, cycled], captions), facts)


def draw_curves(runs: Sequence[str | Path], names: Sequence[str] | None = None) -> Picture:
    """Draws what training runs logged against the optimisation step: a panel a name, a line a run.

    Args:
        runs: Output folders of training runs, or their `metrics.jsonl`.
        names: What to draw; by default whatever is called a loss in at least one of the runs.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If a file is not of that form, or no run logged one of the names.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "A picture of curves needs matplotlib, which is not installed: pip install matplotlib."
        ) from None
    metrics = {str(run): _read_metrics(run) for run in dict.fromkeys(map(Path, runs))}
    logged = list(
        dict.fromkeys(name for lines in metrics.values() for line in lines for name in line if name != "step")
    )
    names = [name for name in logged if "loss" in name] if names is None else list(names)
    if unknown := [name for name in names if name not in logged]:
        raise ValueError(f"`names` must be among what the runs logged, {', '.join(logged)}; got {', '.join(unknown)}.")
    if not names:
        raise ValueError(f"`names` must be given, as these runs logged no loss but {', '.join(logged) or 'nothing'}.")
    plain = {"parse_math": False}  # names are no formulas, even with a $ on either side
    with style.context("petroff10"):  # colours that stay apart for the colour-blind
        num_columns = min(len(names), 2)
        num_rows = -(-len(names) // num_columns)
        figure = Figure(figsize=(5.5 * num_columns, 3 * num_rows + 0.6), dpi=120, layout="constrained")
        panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
        lines_of_run = {}
        for panel, name in zip(panels, names, strict=False):
            for number, (run, lines) in enumerate(metrics.items()):
                logging = [line for line in lines if name in line]
                steps, values = [line["step"] for line in logging], [line[name] for line in logging]
                marker = "o" if len(steps) == 1 else ""  # a point alone makes no line
                (lines_of_run[run],) = panel.plot(steps, values, color=f"C{number}", marker=marker)
            panel.set_title(name, fontsize=10, **plain)
            panel.set_xlabel("step")
            panel.grid(color="#e6e6e6")
            panel.spines[["top", "right"]].set_visible(False)
        for panel in panels[len(names) :]:
            panel.remove()
        legend = figure.legend(lines_of_run.values(), lines_of_run, loc="outside lower center", frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    last = [lines[-1]["step"] for lines in metrics.values()]
    return Picture(
        Image.open(buffer).convert("RGB"),
        {"kind": "curves", "runs": list(metrics), "last_steps": last, "names": names},
    )


def interpolate(start: Tensor, end: Tensor, num_points: int) -> Tensor:
    """Gives points (num_points, dim) on the way between two latents (dim,), both ends included.

    Spherical interpolation, as in *Sampling Generative Networks* (White, 2016, https://arxiv.org/abs/1609.04468): the
    straight way from one Gaussian sample to another leads through points shorter than such samples are. Where the two
    point the same or the opposite way, which leaves no plane to turn in, it is straight.

    Raises:
        ValueError: If there are fewer than two points.
    """
    if num_points < 2:
        raise ValueError(f"`num_points` must be at least 2, the two ends, got {num_points}.")
    t = torch.linspace(0, 1, num_points)[:, None]
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=0).clamp(-1, 1)
    angle = cosine.acos()
    if angle.sin() < 1e-4:
        points = (1 - t) * start + t * end
    else:
        points = (((1 - t) * angle).sin() * start + (t * angle).sin() * end) / angle.sin()
    points[0], points[-1] = start, end  # to the bit
    return points


def _latents(pipeline: DiffusionPipeline, seeds: Sequence[int]) -> Tensor:
    """Gives the latents (B, latent_dim) from which the pipeline draws these seeds' images."""
    if not takes(pipeline, "latents"):
        raise ValueError(
            f"`pipeline` must take `latents`, as GANs and VAEs do, got a {type(pipeline).__name__}; the noise of a"
            " diffusion pipeline comes from seeds alone, between which there is nothing."
        )
    (size,) = {
        component.config.latent_dim
        for component in pipeline.components.values()
        if "latent_dim" in getattr(component, "config", {})
    }
    return torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _draw(
    pipeline: DiffusionPipeline,
    label_lists: LabelLists | None,
    options: Mapping[str, Any] | None,
    **arguments: Any,  # noqa: ANN401 -- the call's own
) -> Any:  # noqa: ANN401 -- a pipeline's output
    if not takes(pipeline, "class_labels"):
        raise ValueError(f"`pipeline` must draw images of labels or of nothing, got a {type(pipeline).__name__}.")
    num_images = len(arguments.get("seeds", arguments.get("latents")))
    options = call_options(pipeline, options or {})
    if "micro_batch_size" in options:  # chunks are padded to it
        options["micro_batch_size"] = min(options["micro_batch_size"], num_images)
    return pipeline(label_lists, num_images if label_lists is None else None, **options, **arguments)


def _each(label_lists: LabelLists | None, count: int) -> LabelLists | None:
    return None if label_lists is None else [labels for labels in label_lists for _ in range(count)]


def _rows(items: Sequence[Any], length: int) -> list[Sequence[Any]]:
    return [items[start : start + length] for start in range(0, len(items), length)]


def _captions(label_lists: LabelLists | None) -> list[str]:
    return [] if label_lists is None else [request_lines(labels) or "empty scene" for labels in label_lists]


def _facts(
    pipeline: DiffusionPipeline,
    kind: str,
    options: Mapping[str, Any] | None,
    **facts: Any,  # noqa: ANN401 -- of any kind
) -> dict[str, Any]:
    """Puts together what a picture's file says; what is None is left out."""
    drawn = {"kind": kind, "model": pipeline.config.get("_name_or_path")}
    if hasattr(pipeline, "scheduler"):
        drawn["scheduler"] = type(pipeline.scheduler).__name__
    every = drawn | call_options(pipeline, options or {}) | facts
    every.pop("micro_batch_size", None)  # by which images differ in their rounding alone
    return {name: value for name, value in every.items() if value is not None}


def _read_metrics(path: Path) -> list[dict[str, float]]:
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"`runs` must be output folders of training runs, or their metrics.jsonl; there is no {path}."
        )
    texts = path.read_text(encoding="utf-8").splitlines()
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            if number == len(texts):  # a run that goes on, or a crash, may have torn it
                break
            raise ValueError(f"{path}, line {number}, must be JSON: {error}.") from error
        if not isinstance(lines[-1], dict) or not isinstance(lines[-1].get("step"), int):
            raise ValueError(
                f'{path}, line {number}, must be of the form {{"step": 50, "loss": 0.1}}, got {text:.80}.'
            )
    if not lines:
        raise ValueError(f"{path} must hold at least one line of metrics, and holds none.")
    return lines

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from iclevr_diffusion import ICLEVR_LABELS, picture
from iclevr_diffusion.models.cgan import CGANGenerator
from iclevr_diffusion.models.cyclegan import CycleGANGenerator
from iclevr_diffusion.models.dcgan import DCGANGenerator
from iclevr_diffusion.models.vae_multilabel import MultiLabelVAE
from iclevr_diffusion.pictures import (
    Picture,
    draw_classes,
    draw_curves,
    draw_denoising,
    draw_guidance,
    draw_interpolation,
    draw_latents,
    draw_translation,
    interpolate,
)
from iclevr_diffusion.pipelines.pipeline_conditional_gan import ConditionalGANPipeline
from iclevr_diffusion.pipelines.pipeline_conditional_vae import ConditionalVAEPipeline
from iclevr_diffusion.pipelines.pipeline_cyclegan import CycleGANPipeline

LABELS = [["red cube"], ["blue sphere", "gray cylinder"]]
STEPS = {"num_inference_steps": 2}
MARGIN = 4  # between the cells of a table, and at its lower right


def vivid(network):
    """Makes an untrained network's images differ plainly from each other."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return network.eval()


@pytest.fixture
def gan():
    torch.manual_seed(0)
    return ConditionalGANPipeline(vivid(DCGANGenerator(24, 16, latent_dim=6, base_channels=4)), [*ICLEVR_LABELS])


@pytest.fixture
def unlabelled():
    torch.manual_seed(0)
    return ConditionalGANPipeline(vivid(CGANGenerator(0, 16, latent_dim=6, base_channels=4, hidden_dim=8)))


@pytest.fixture
def cyclegan():
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "block_out_channels": (4, 8), "num_residual_blocks": 1}
    return CycleGANPipeline(vivid(CycleGANGenerator(**sizes)), vivid(CycleGANGenerator(**sizes)))


def cells(table, num_rows, num_columns):
    """Cuts the images of 16x16 pixels out of a table, whose captions stand above and at the left: [row][column]."""
    pixels, size = np.asarray(table), 64  # they are enlarged fourfold
    top = pixels.shape[0] - num_rows * (size + MARGIN)
    left = pixels.shape[1] - num_columns * (size + MARGIN)
    return [
        [
            pixels[top + row * (size + MARGIN) :, left + column * (size + MARGIN) :][:size:4, :size:4]
            for column in range(num_columns)
        ]
        for row in range(num_rows)
    ]


def arrays(images):
    return [np.asarray(image.convert("RGB")) for image in images]


def assert_same(found, expected):
    """Two lists of images are the same but for rounding, as kernels round by the number of images in a batch."""
    assert_close(torch.tensor(np.array(found)).float(), torch.tensor(np.array(expected)).float(), atol=2, rtol=0)


# Latents


def test_two_latents_at_right_angles_are_joined_by_a_quarter_of_a_circle():
    points = interpolate(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]), 4)
    expected = [[2 * math.cos(angle), 2 * math.sin(angle)] for angle in (0, math.pi / 6, math.pi / 3, math.pi / 2)]
    assert_close(points, torch.tensor(expected))
    assert points[0].tolist() == [2, 0] and points[-1].tolist() == [0, 2]


@pytest.mark.parametrize("end", [3.0, -3.0])
def test_latents_on_one_line_are_joined_by_it(end):
    points = interpolate(torch.tensor([1.0, 0.0]), torch.tensor([end, 0.0]), 3)
    assert_close(points, torch.tensor([[1.0, 0.0], [(1 + end) / 2, 0.0], [end, 0.0]]))


def test_fewer_points_than_ends_are_refused():
    with pytest.raises(ValueError, match="`num_points` must be at least 2, the two ends, got 1"):
        interpolate(torch.zeros(2), torch.ones(2), 1)


# Kinds of picture


def test_classes_are_rows_and_seeds_are_columns(gan):
    drawn = draw_classes(gan, LABELS, 3, seed=5)
    expected = gan([labels for labels in LABELS for _ in range(3)], seeds=[5, 6, 7, 5, 6, 7]).images
    assert_same(sum(cells(drawn.image, 2, 3), []), arrays(expected))
    assert drawn.facts["labels"] == LABELS and drawn.facts["seeds"] == [[5, 6, 7], [5, 6, 7]]


def test_without_labels_every_image_has_a_seed_of_its_own(unlabelled):
    drawn = draw_classes(unlabelled, None, 2, seed=5)
    expected = unlabelled(num_images=4, seeds=[5, 6, 7, 8]).images
    assert_same(sum(cells(drawn.image, 2, 2), []), arrays(expected))
    assert drawn.facts["seeds"] == [[5, 6], [7, 8]] and "labels" not in drawn.facts


def test_the_corners_of_the_latents_are_the_images_of_their_seeds(gan):
    drawn = draw_latents(gan, ["red cube"], [4, 5, 6, 7], size=3)
    grid = cells(drawn.image, 3, 3)
    assert_same(
        [grid[0][0], grid[0][2], grid[2][0], grid[2][2]], arrays(gan([["red cube"]] * 4, seeds=range(4, 8)).images)
    )
    between = np.array([row[1] for row in grid] + [grid[1][0], grid[1][2]])
    assert len({image.tobytes() for image in between}) == 5
    assert drawn.facts["corner_seeds"] == [4, 5, 6, 7]


def test_an_interpolation_ends_in_the_images_of_its_seeds_and_moves_there_and_back(gan):
    drawn = draw_interpolation(gan, LABELS, [4, 5], num_images=3)
    rows = cells(drawn.image, 2, 3)
    for row, labels in zip(rows, LABELS, strict=True):
        assert_same([row[0], row[2]], arrays(gan([labels] * 2, seeds=[4, 5]).images))
        assert (row[1] != row[0]).any() and (row[1] != row[2]).any()
    assert len(drawn.frames) == 4
    assert drawn.frames[1].tobytes() == drawn.frames[3].tobytes() != drawn.frames[0].tobytes()


def test_a_vae_is_interpolated_by_its_latents_too():
    torch.manual_seed(0)
    vae = MultiLabelVAE(5, 0, 16, in_channels=1, architecture="mlp", hidden_widths=(8,))
    pipeline = ConditionalVAEPipeline(vivid(vae))
    drawn = draw_interpolation(pipeline, None, [1, 2], num_images=3)
    ((first, _, last),) = cells(drawn.image, 1, 3)
    assert_same([first, last], arrays(pipeline(num_images=2, seeds=[1, 2]).images))


def test_a_row_of_denoising_ends_in_the_image_and_begins_with_its_noise(tiny_pipeline):
    drawn = draw_denoising(tiny_pipeline, LABELS, num_states=2, seed=3, options=STEPS)
    output = tiny_pipeline(LABELS, seeds=[3, 4], num_states=2, **STEPS)
    for row, image, noise in zip(cells(drawn.image, 2, 3), output.images, output.states[0], strict=True):
        assert_same([row[0], row[2]], arrays([noise, image]))
    assert drawn.facts["num_states"] == 2 and drawn.facts["scheduler"] == "DDPMScheduler"


def test_guidance_weights_are_one_less_than_the_guidance_scale(tiny_pipeline):
    drawn = draw_guidance(tiny_pipeline, LABELS, [0, 2], 1, seed=3, options=STEPS)
    rows = cells(drawn.image, 2, 2)
    for column, scale in enumerate([1.0, 3.0]):
        expected = tiny_pipeline(LABELS, seeds=[3, 3], guidance_scale=scale, **STEPS).images
        assert_same([row[column] for row in rows], arrays(expected))
    assert (rows[0][0] != rows[0][1]).any()
    assert drawn.facts["weights"] == [0, 2] and drawn.facts["guidance_scale"] == [1, 3]


@pytest.mark.parametrize(("direction", "back"), [("a_to_b", "b_to_a"), ("b_to_a", "a_to_b")])
def test_a_translation_shows_images_what_they_become_and_what_these_become(cyclegan, direction, back):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    rows = cells(draw_translation(cyclegan, images, direction).image, 3, 2)
    mapped = cyclegan(images, direction=direction).images
    assert_same(rows, [arrays(images), arrays(mapped), arrays(cyclegan(mapped, direction=back).images)])


def test_images_of_other_sizes_are_resized_before_they_are_translated(cyclegan):
    drawn = draw_translation(cyclegan, [Image.new("L", (20, 30), 128), Image.new("RGB", (16, 16), "red")])
    assert cells(drawn.image, 3, 2)[0][0].tolist() == np.full((16, 16, 3), 128).tolist()


def test_the_pictures_options_reach_the_pipeline_and_its_file(tiny_pipeline, monkeypatch):
    calls = []
    call = type(tiny_pipeline).__call__
    monkeypatch.setattr(
        type(tiny_pipeline),
        "__call__",
        lambda self, class_labels=None, num_images=None, *, seeds, num_inference_steps, guidance_scale, micro_batch_size: (
            calls.append((num_inference_steps, guidance_scale, micro_batch_size))
            or call(self, class_labels, num_images, seeds=seeds, num_inference_steps=1)
        ),
    )
    drawn = draw_classes(tiny_pipeline, LABELS, 1, options=STEPS | {"guidance_scale": None, "micro_batch_size": 64})
    assert calls == [(2, 1.0, 2)]
    assert drawn.facts["num_inference_steps"] == 2 and drawn.facts["guidance_scale"] == 1.0


# Curves


def write_metrics(folder, *lines):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_curves_are_of_all_losses_and_a_torn_last_line_is_left_out(tmp_path):
    first = write_metrics(
        tmp_path / "first", '{"step": 5, "loss": 1.0, "learning_rate": 1}', '{"step": 10, "loss": 0.5}'
    )
    second = write_metrics(tmp_path / "second", '{"step": 7, "generator_loss": 3}', '{"step": 9, "gener')
    drawn = draw_curves([first, second / "metrics.jsonl"])
    assert drawn.facts["names"] == ["loss", "generator_loss"]
    assert drawn.facts["last_steps"] == [10, 7]
    assert drawn.facts["runs"] == [str(first), str(second / "metrics.jsonl")]
    colors = {tuple(color) for color in np.asarray(drawn.image).reshape(-1, 3).tolist()}
    assert {(63, 144, 218), (255, 169, 14)} <= colors  # a line, and a point alone


def test_a_run_that_is_not_there_ends_the_command_with_one_line(tmp_path):
    with pytest.raises(
        SystemExit, match="^iclevr-picture: `runs` must be output folders of training runs.*no such run"
    ):
        picture.main(["curves", "no such run", "--out", str(tmp_path / "curves.png")])


def test_a_run_that_is_named_twice_is_one_line(tmp_path):
    run = write_metrics(tmp_path / "run", '{"step": 5, "loss": 1}')
    assert draw_curves([str(run), f"{run}/"]).facts["runs"] == [str(run)]


def test_curves_of_named_values_have_a_panel_each(tmp_path):
    run = write_metrics(tmp_path / "run", '{"step": 5, "loss": 1.0, "a": 1}', '{"step": 10, "loss": 0.5, "a": 2}')
    one, two = draw_curves([run], ["a"]), draw_curves([run], ["a", "loss"])
    assert two.image.width == 2 * one.image.width and two.image.height == one.image.height


@pytest.mark.parametrize(
    ("lines", "names", "message"),
    [
        (['{"step": 5, "lr": 1}'], None, "`names` must be given, as these runs logged no loss but lr"),
        (['{"step": 5, "loss": 1}'], ["step", "los"], "among what the runs logged, loss; got step, los"),
        ([], None, "must hold at least one line of metrics"),
        (["torn", '{"step": 5, "loss": 1}'], None, "line 1, must be JSON"),
        (['{"loss": 1}'], None, "line 1, must be of the form .*got"),
        (["[5]"], None, "line 1, must be of the form"),
    ],
)
def test_metrics_that_cannot_be_drawn_are_refused(tmp_path, lines, names, message):
    with pytest.raises(ValueError, match=message):
        draw_curves([write_metrics(tmp_path / "run", *lines)], names)


# Refusals


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda gan, ddpm, cyclegan: draw_denoising(gan, LABELS), "draws in one call"),
        (lambda gan, ddpm, cyclegan: draw_guidance(gan, LABELS), "must take `guidance_scale`"),
        (
            lambda gan, ddpm, cyclegan: draw_guidance(ddpm, LABELS, options={"guidance_scale": 2.0}),
            "left out.*got 2.0",
        ),
        (lambda gan, ddpm, cyclegan: draw_latents(ddpm, ["red cube"]), "must take `latents`.*seeds alone"),
        (lambda gan, ddpm, cyclegan: draw_interpolation(ddpm, LABELS), "must take `latents`.*seeds alone"),
        (lambda gan, ddpm, cyclegan: draw_latents(gan, ["red cube"], [0, 1]), "`seeds` must be four.*got 2"),
        (lambda gan, ddpm, cyclegan: draw_interpolation(gan, LABELS, [0]), "`seeds` must be two.*got 1"),
        (lambda gan, ddpm, cyclegan: draw_classes(cyclegan, None), "must draw images of labels or of nothing"),
        (lambda gan, ddpm, cyclegan: draw_classes(gan, LABELS, options=STEPS), "got num_inference_steps"),
        (lambda gan, ddpm, cyclegan: draw_translation(gan, []), "must map images to images"),
        (lambda gan, ddpm, cyclegan: draw_translation(cyclegan, []), "at least one image"),
        (lambda gan, ddpm, cyclegan: draw_translation(cyclegan, [], "b_to_b"), "`direction` must be .*got 'b_to_b'"),
    ],
)
def test_a_picture_that_a_pipeline_cannot_give_is_refused(gan, tiny_pipeline, cyclegan, draw, message):
    with pytest.raises(ValueError, match=message):
        draw(gan, tiny_pipeline, cyclegan)


# Files


def test_a_saved_picture_says_how_it_was_drawn_and_its_moving_one_too(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    files = Picture(frames[0], {"kind": "interpolation", "seeds": [4, 5]}, frames).save(tmp_path / "new" / "a.png")
    assert files == [tmp_path / "new" / "a.png", tmp_path / "new" / "a.gif"]
    assert sorted(file.name for file in files[0].parent.iterdir()) == ["a.gif", "a.png"]
    facts = Image.open(files[0]).text
    assert facts.pop("Software").startswith("iclevr_diffusion ")
    assert facts == {"kind": "interpolation", "seeds": "[4, 5]"}
    moving = Image.open(files[1])
    assert moving.n_frames == 2 and moving.info["loop"] == 0
    assert json.loads(moving.info["comment"])["seeds"] == [4, 5]


def test_a_picture_in_another_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .png, .*got '.*a.jpg'"):
        Picture(Image.new("RGB", (8, 8)), {}).save(tmp_path / "a.jpg")


# iclevr-picture


@pytest.fixture
def run_picture(tmp_path, capsys):
    def run(pipeline, kind, *arguments):
        pipeline.save_pretrained(tmp_path / "pipeline")
        fixed = ["--pipeline", str(tmp_path / "pipeline"), "--device", "cpu", "--out", str(tmp_path / "picture.png")]
        picture.main([kind, *map(str, arguments), *fixed])
        assert str(tmp_path / "picture.png") in capsys.readouterr().out
        return Image.open(tmp_path / "picture.png")

    return run


def test_the_command_draws_each_label_where_no_prompt_is_given(run_picture, gan):
    drawn = run_picture(gan, "classes", "--num_images", 1)
    assert json.loads(drawn.text["labels"]) == [[name] for name in ICLEVR_LABELS]
    prompted = run_picture(gan, "classes", "red cube, blue sphere", "--num_images", 1, "--seed", 7)
    assert json.loads(prompted.text["labels"]) == [["red cube", "blue sphere"]]
    assert json.loads(prompted.text["seeds"]) == [[7]]


@pytest.mark.parametrize(
    ("kind", "arguments", "facts"),
    [
        (
            "latents",
            ["red cube", "--size", 2, "--seeds", 4, 5, 6, 7],
            {"labels": ["red cube"], "corner_seeds": [4, 5, 6, 7]},
        ),
        (
            "interpolation",
            ["red cube", "--num_images", 2, "--seeds", 4, 5],
            {"labels": [["red cube"]], "end_seeds": [4, 5]},
        ),
    ],
)
def test_the_command_draws_what_lies_between_latents(run_picture, gan, kind, arguments, facts):
    text = run_picture(gan, kind, *arguments).text
    assert text["kind"] == kind
    assert {name: json.loads(text[name]) for name in facts} == facts


@pytest.mark.parametrize(
    ("kind", "arguments", "facts"),
    [
        ("denoising", ["red cube", "--num_states", 1, "--seed", 4], {"num_states": 1, "seeds": [4]}),
        (
            "guidance",
            ["red cube", "--weights", 0.5, 1, "--num_images", 1],
            {"weights": [0.5, 1.0], "guidance_scale": [1.5, 2.0]},
        ),
    ],
)
def test_the_command_draws_what_diffusion_models_do(run_picture, tiny_pipeline, kind, arguments, facts):
    text = run_picture(tiny_pipeline, kind, *arguments, "--num_inference_steps", 2).text
    assert text["kind"] == kind and json.loads(text["num_inference_steps"]) == 2
    assert {name: json.loads(text[name]) for name in facts} == facts


def test_the_command_translates_files_folders_and_noise(cyclegan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(picture, "open_pipeline", lambda args, device: cyclegan)
    (tmp_path / "folder").mkdir()
    for name, color in (("b.png", "red"), ("a.JPG", "blue"), ("c.jpeg", "lime")):
        Image.new("RGB", (16, 16), color).save(tmp_path / "folder" / name)
    (tmp_path / "folder" / "notes.txt").write_text("no image")

    def translate(*arguments):
        picture.main(["translation", *map(str, arguments), "--out", str(tmp_path / "out.png"), "--device", "cpu"])
        return Image.open(tmp_path / "out.png")

    of_folder = translate(tmp_path / "folder", "--num_images", 2, "--direction", "b_to_a")
    assert json.loads(of_folder.text["images"]) == ["a.JPG", "b.png"] and of_folder.text["direction"] == "b_to_a"
    assert cells(of_folder, 3, 2)[0][1].reshape(-1, 3)[0].tolist() == [255, 0, 0]
    of_file = translate(tmp_path / "folder" / "b.png")
    assert json.loads(of_file.text["images"]) == ["b.png"]
    first, second, again = (translate("noise", "--num_images", 1, "--seed", seed) for seed in (1, 2, 1))
    assert first.text["images"] == "noise" and first.text["seed"] == "1"
    assert first.tobytes() == again.tobytes() != second.tobytes()


def test_the_command_draws_curves_without_a_pipeline(tmp_path):
    run = write_metrics(tmp_path / "run", '{"step": 5, "loss": 1.0, "score": 1}', '{"step": 10, "loss": 0.5}')
    picture.main(["curves", str(run), "--names", "score", "--out", str(tmp_path / "curves.png")])
    assert json.loads(Image.open(tmp_path / "curves.png").text["names"]) == ["score"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classes", "red cub"], "did you mean 'red cube'"),
        (["latents"], "nothing to draw"),
        (["latents", "red cube", "blue cube"], "`prompts` must be one, .* got 2"),
        (["translation", "noise"], "must map images to images"),
        (["translation", "no such file"], "`images` must be image files.*no such file"),
        (["denoising", "red cube"], "draws in one call"),
        (["classes", "red cube", "--num_inference_steps", "2"], "got num_inference_steps"),
    ],
)
def test_what_cannot_be_drawn_ends_the_command_with_one_line(run_picture, gan, arguments, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        run_picture(gan, *arguments)
    assert str(stopped.value).startswith("iclevr-picture: ") and "\n" not in str(stopped.value)


def test_prompts_for_a_pipeline_without_labels_are_refused(run_picture, unlabelled):
    with pytest.raises(SystemExit, match="`prompts` must be left out"):
        run_picture(unlabelled, "classes", "red cube")
    assert "labels" not in run_picture(unlabelled, "classes", "--num_images", 1).text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classes", "--num_images", "0"], "--num_images: must be a whole number of at least 1, got '0'"),
        (["latents", "--size", "1"], "--size: must be a whole number of at least 2, got '1'"),
        (["curves", "run", "--out", "a.gif"], "--out: must end in .png, got 'a.gif'"),
        ([], "KIND"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_opened(arguments, message, capsys):
    with pytest.raises(SystemExit):
        picture.main(arguments)
    assert message in capsys.readouterr().err


def test_the_help_shows_the_flags_of_all_kinds(capsys):
    with pytest.raises(SystemExit):
        picture.main(["--help"])
    shown = capsys.readouterr().out
    assert all(
        flag in shown for flag in ("--num_images", "--size", "--num_states", "--weights", "--direction", "--names")
    )

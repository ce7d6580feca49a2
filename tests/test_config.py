from dataclasses import dataclass
from typing import Literal

import pytest

from iclevr_diffusion.config import TrainConfig, option, parse_config


@dataclass(kw_only=True)
class ExampleConfig(TrainConfig):
    """Trains an example."""

    channels: tuple[int, ...] = option((8, 16), "channels per level")
    kind: Literal["small", "no"] = option("small", "size of the network")
    judge: str | None = option("none yet", "a folder")
    flip: bool = option(False, "mirror 50 % of the images")


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        (tmp_path / "recipe.yaml").write_text(text)
        return ["--config", str(tmp_path / "recipe.yaml")]

    return write


@pytest.fixture
def refusal(capsys):
    def parse(*arguments):
        with pytest.raises(SystemExit):
            parse_config(ExampleConfig, arguments)
        return capsys.readouterr().err

    return parse


def test_fields_come_from_the_flags_over_the_recipe_over_the_defaults(recipe):
    arguments = recipe("max_steps: 7\nbatch_size: 3\nchannels: [1, 2, 3]\n")
    config = parse_config(ExampleConfig, [*arguments, "--batch_size", "5"])
    assert (config.max_steps, config.batch_size, config.channels, config.kind) == (7, 5, (1, 2, 3), "small")


def test_flags_of_every_type_are_read():
    arguments = [
        "--learning_rate",
        "1e-4",
        "--channels",
        "4",
        "8",
        "--flip",
        "--judge",
        "none",
        "--kind",
        "no",
        "--report_to",
        "tensorboard",
    ]
    config = parse_config(ExampleConfig, arguments)
    assert config.learning_rate == 1e-4 and config.channels == (4, 8) and config.flip is True
    assert config.judge is None and config.kind == "no" and config.report_to == ("tensorboard",)
    assert parse_config(ExampleConfig, ["--flip", "false", "--channels"]) == ExampleConfig(flip=False, channels=())


def test_yaml_spellings_that_mean_something_else_to_yaml_are_read_as_meant(recipe):
    config = parse_config(ExampleConfig, recipe("learning_rate: 1e-4\nmixed_precision: no\njudge: null\n"))
    assert config.learning_rate == 1e-4 and config.mixed_precision == "no" and config.judge is None


def test_an_unknown_key_of_a_recipe_is_refused_with_the_nearest_and_all_known_ones(recipe, refusal):
    message = refusal(*recipe("batchsize: 3\n"))
    assert "unknown field 'batchsize'. Did you mean 'batch_size'? The known ones are output_dir, seed," in message
    assert "flip" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_steps: many", "`max_steps` must be a whole number, got 'many'"),
        ("max_steps: 1.5", "`max_steps` must be a whole number, got 1.5"),
        ("max_steps: true", "`max_steps` must be a whole number, got True"),
        ("learning_rate: [1]", r"`learning_rate` must be a number, got [1]"),
        ("channels: 8", "`channels` must be a list of a whole number, got 8"),
        ("kind: large", "`kind` must be small or no, got 'large'"),
        ("flip: 2", "`flip` must be true or false, got 2"),
        ("judge: 3", "`judge` must be text, got 3"),
        ("- 1", "must hold one field and its value a line, got a list"),
        ("max_steps: [", "must be a YAML file"),
        ("max_steps: 0", "`max_steps` must be at least 1, got 0"),
        ("save_every: -1", "`save_every` must be at least 0, got -1"),
        ("warmup_steps: -5", "`warmup_steps` must be at least 0, got -5"),
        ("seed: -1", "`seed` must lie in [0, 2**32 - 1], got -1"),
        ("decay_fraction: 2", "`decay_fraction` must lie in [0, 1], got 2.0"),
        ("max_grad_norm: 0", "`max_grad_norm` must be positive or none, got 0.0"),
    ],
)
def test_a_wrong_value_of_a_recipe_is_refused_by_name(recipe, refusal, text, expected):
    assert expected in refusal(*recipe(text))


def test_flags_are_neither_abbreviated_nor_unknown(refusal):
    assert "unrecognized arguments: --batch" in refusal("--batch", "3")


def test_a_missing_recipe_is_named(refusal):
    assert "nowhere.yaml" in refusal("--config", "nowhere.yaml")


def test_help_lists_every_field_with_its_type_and_default(capsys):
    with pytest.raises(SystemExit):
        parse_config(ExampleConfig, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Trains an example." in text and "mirror 50 % of the images (true or false; default False)" in text


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [0.5, 1, 1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381]),
        ("warmup-stable-decay", [0.5, 1, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
    ],
)
def test_learning_rates_rise_over_the_warm_up_and_fall_as_the_schedule_says(schedule, expected):
    config = TrainConfig(max_steps=10, warmup_steps=2, lr_schedule=schedule, decay_fraction=0.4)
    assert [config.learning_rate_factor(step) for step in range(10)] == pytest.approx(expected, abs=1e-4)
    assert config.learning_rate_factor(10) == (1 if schedule == "constant" else 0)


def test_milestones_divide_the_learning_rate_by_ten_each():
    config = TrainConfig(lr_schedule="milestones", milestones=(3, 5), warmup_steps=2)
    factors = [config.learning_rate_factor(step) for step in range(7)]
    assert factors == pytest.approx([0.5, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("arguments", [{"lr_schedule": "milestones"}, {"milestones": (3,)}])
def test_milestones_and_their_schedule_go_together(arguments):
    with pytest.raises(ValueError, match="`milestones` must name steps for the schedule `milestones`"):
        TrainConfig(**arguments)

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_leaderboard import changed, make_results

import iclevr_diffusion
from iclevr_diffusion.config import parse_config
from iclevr_diffusion.images import save_png
from iclevr_diffusion.leaderboard_reports import load_records, make_run_record, read_rows, render_reports
from iclevr_diffusion.leaderboard_sampling import YARDSTICK, load_sampling, render_sampling

REPOSITORY = Path(__file__).resolve().parents[1]


def load_module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


baselines = load_module(REPOSITORY / "benchmarks" / "baselines.py")
sampling = load_module(REPOSITORY / "benchmarks" / "sampling.py")
gan_cures = load_module(REPOSITORY / "benchmarks" / "gan_cures.py")
ROWS = read_rows(baselines.ROWS)

LIST = """
- {name: plain, paper: DCGAN, kind: reported recipe, script: train_gan.py, recipe: dcgan_real,
   reported: {test: 0.72, new_test: 0.68}, epochs: 100}
- {name: mended, paper: DCGAN, kind: cured, script: train_gan.py, recipe: projection_real, cures: plain}
- {name: without, paper: DCGAN, kind: ablation, script: train_gan.py, recipe: dcgan_real,
   overrides: {flip: true, betas: [0.0, 0.9], judge: null}, reported: {test: 0.5, new_test: 0.5}, remark: a remark}
"""
CONFIG = {"max_steps": 200, "max_minutes": None}
TRAINING = {"num_steps": 200, "num_images": 1000, "seconds": 90.0, "environment": {"device": "cpu"}, "config": CONFIG}


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows.yaml").write_text(LIST)
    return read_rows(tmp_path / "rows.yaml")


def record(
    folder, row, top_k, num_epochs=100.0, num_steps=200, diversity=0.9, max_minutes=None, steps=None, **options
):
    """Writes the record of a row whose mean over both lists is `top_k`, as judge-a sees it."""
    results = make_results(row.name, top_k, **options)
    changed(results, "distribution", "diversity", "pixels", "value", to=diversity)
    run = {"schema_version": 1, "script": row.script, "recipe": row.recipe, "overrides": dict(row.overrides)}
    run |= {"weights": "best_pipeline", "num_steps": num_steps, "max_steps": 200, "max_minutes": max_minutes}
    run |= {"num_epochs": num_epochs, "seconds": 90.0, "device": "cpu", "num_inference_steps": steps}
    (folder / row.name).mkdir(parents=True, exist_ok=True)
    (folder / row.name / "results.json").write_text(json.dumps(results))
    (folder / row.name / "run.json").write_text(json.dumps(run))


def table_of(rows, folder, judge="judge-a"):
    text = render_reports(rows, load_records(rows, folder), judge)
    header, _, *lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    titles = [title.strip() for title in header]
    return text, {line[0].strip(): dict(zip(titles, map(str.strip, line), strict=True)) for line in lines}


def test_a_row_has_what_was_reported_and_what_was_measured(rows, tmp_path):
    record(tmp_path, rows["plain"], 0.8)
    text, table = table_of(rows, tmp_path)
    assert table["plain"] == {
        "system": "plain",
        "kind": "reported recipe",
        "reported: test": "0.7200",
        "reported: new_test": "0.6800",
        "test": "0.820 [0.810, 0.830]",
        "new_test": "0.780 [0.770, 0.790]",
        "points above the report": "+10.0 [+9.0, +11.0]",
        "diversity": "0.90",
        "training": "100 epochs, 1.5 min",
        "aim": "reached",
        "remark": "",
    }
    assert [table["*real images, held out*"][name] for name in ("test", "new_test")] == ["0.980", "0.960"]
    assert "Trained on cpu. Of 1 systems, 1 are scored by the weights that did best" in text


def test_what_was_not_run_is_listed_as_missing(rows, tmp_path):
    text, table = table_of(rows, tmp_path)
    assert [row["training"] for row in table.values()] == ["not run yet"] * 3
    assert text.endswith("Not run yet: plain, mended, without (3 of 3).\n")
    for row in rows.values():
        record(tmp_path, row, 0.8)
    assert table_of(rows, tmp_path)[0].endswith("Not run yet: none (0 of 3).\n")


@pytest.mark.parametrize(
    ("top_k", "num_epochs", "aim"),
    [(0.69, 100, "reached"), (0.68, 100, "missed"), (0.68, 50, "less training"), (0.69, 50, "reached")],
)
def test_a_reported_recipe_aims_at_the_report_within_its_interval(rows, tmp_path, top_k, num_epochs, aim):
    record(tmp_path, rows["plain"], top_k, num_epochs)  # .7 was reported; intervals reach .01 above the value
    row = table_of(rows, tmp_path)[1]["plain"]
    assert row["aim"] == aim
    assert row["training"] == ("50 of 100 epochs, 1.5 min" if num_epochs == 50 else "100 epochs, 1.5 min")


@pytest.mark.parametrize(
    ("top_k", "diversity", "num_steps", "aim"),
    [
        (0.731, 0.8, 200, "reached"),
        (0.729, 0.8, 200, "missed"),
        (0.731, 0.79, 200, "missed"),
        (0.729, 0.8, 100, "less training"),
    ],
)
def test_a_cure_aims_at_three_points_more_and_at_diversity(rows, tmp_path, top_k, diversity, num_steps, aim):
    record(tmp_path, rows["mended"], top_k, 10.0, num_steps, diversity)
    row = table_of(rows, tmp_path)[1]["mended"]
    assert [row["aim"], row["kind"]] == [aim, "cure of plain"]
    assert row["training"] == ("10 of 20 epochs, 1.5 min" if num_steps == 100 else "10 epochs, 1.5 min")


@pytest.mark.parametrize(("ceiling", "aim"), [(0.72, "reached"), (0.73, "missed")])
def test_a_cure_of_a_system_near_the_ceiling_aims_at_the_ceiling(rows, tmp_path, ceiling, aim):
    record(tmp_path, rows["mended"], 0.725)  # .7 was reported, so that it aims at .73
    path = tmp_path / "mended" / "results.json"
    results = json.loads(path.read_text())
    for name in ("test", "new_test"):
        changed(results, "protocols", name, "judges", "judge-a", "ceiling", "top_k", to=ceiling)
    path.write_text(json.dumps(results))
    assert table_of(rows, tmp_path)[1]["mended"]["aim"] == aim


def test_rows_of_less_training_are_grouped_by_what_they_had(rows, tmp_path):
    record(tmp_path, rows["plain"], 0.8, num_epochs=50)
    record(tmp_path, rows["without"], 0.8, num_steps=100, max_minutes=8.0)
    record(tmp_path, rows["mended"], 0.8)
    text, _ = table_of(rows, tmp_path)
    assert "within a group: the recipe's steps on cpu: plain; at most 8 min on cpu: without." in text


def test_a_system_that_was_drawn_in_fewer_steps_than_its_recipe_is_named(rows, tmp_path):
    taken = make_results("plain", 0.8)["settings"]["options"]["num_inference_steps"]
    record(tmp_path, rows["plain"], 0.8, steps=1000)
    record(tmp_path, rows["mended"], 0.8, steps=taken)
    record(tmp_path, rows["without"], 0.8)
    assert f"fewer steps than their recipes': plain ({taken} of 1000)." in table_of(rows, tmp_path)[0]


def test_many_epochs_are_written_out(rows, tmp_path):
    record(tmp_path, rows["mended"], 0.8, num_epochs=5000.0, num_steps=100)
    assert table_of(rows, tmp_path)[1]["mended"]["training"] == "5,000 of 10,000 epochs, 1.5 min"


def test_an_ablation_has_no_aim_and_keeps_its_remark(rows, tmp_path):
    record(tmp_path, rows["without"], 0.4)
    row = table_of(rows, tmp_path)[1]["without"]
    assert [row["aim"], row["remark"], row["points above the report"]] == ["-", "a remark", "-10.0 [-11.0, -9.0]"]


def test_a_judge_that_taught_a_system_marks_it_and_may_not_score_the_table(rows, tmp_path):
    record(tmp_path, rows["plain"], 0.8, taught=["judge-b"])
    text, table = table_of(rows, tmp_path)
    assert "plain†" in table and "† Another judge taught this system." in text
    with pytest.raises(ValueError, match="`judge` must be .* got 'judge-b', which taught plain"):
        table_of(rows, tmp_path, "judge-b")
    with pytest.raises(ValueError, match="got 'judge-c', which did not score plain"):
        table_of(rows, tmp_path, "judge-c")


def test_records_of_other_judges_weights_do_not_compare(rows, tmp_path):
    record(tmp_path, rows["plain"], 0.8)
    record(tmp_path, rows["mended"], 0.8)
    path = tmp_path / "mended" / "results.json"
    results = changed(json.loads(path.read_text()), "settings", "judges", "judge-a", "weights_sha256", to="other")
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match="must agree in the weights of the judge"):
        table_of(rows, tmp_path)


def test_a_record_of_another_recipe_is_refused(rows, tmp_path):
    record(tmp_path, rows["plain"], 0.8)
    path = tmp_path / "plain" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"overrides": {"batch_size": 1}}))
    with pytest.raises(
        ValueError, match=r"plain was trained with overrides \{'batch_size': 1\}, and its row has \{\}"
    ):
        load_records(rows, tmp_path)
    (tmp_path / "plain").rename(tmp_path / "stranger")
    with pytest.raises(ValueError, match="has none named 'stranger'"):
        load_records(rows, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: mended", "name: plain", "distinct names, got 'plain' twice"),
        ("kind: ablation", "kind: cure", "`kind` must be one of reported recipe, cured, ablation, got 'cure'"),
        ("cures: plain", "cures: nobody", "`cures` must name another row"),
        ("cures: plain", "cures: mended", "`cures` must name another row"),
        ("epochs: 100", "cures: nobody", "nothing if it is not, got 'nobody' for the kind 'reported recipe'"),
        (", cures: plain", "", "`cures` must name another row"),
        ("epochs: 100", "epoch: 100", "must be a list of mappings with keys of"),
        ("test: 0.5, new_test: 0.5", "test: 0.5", "`reported` must have scores of test and new_test"),
        ("recipe: projection_real, ", "", "a row must have recipe"),
    ],
)
def test_a_list_of_rows_that_makes_no_sense_is_refused(tmp_path, old, new, message):
    (tmp_path / "rows.yaml").write_text(LIST.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "rows.yaml")


def test_a_run_record_counts_epochs_over_the_images_trained_on(rows, tmp_path):
    (tmp_path / "data.json").write_text('{"num_images": 250}')
    run = make_run_record(rows["plain"], tmp_path, weights="pipeline", training=TRAINING)
    assert [run[key] for key in ("num_epochs", "seconds", "device", "recipe")] == [4.0, 90.0, "cpu", "dcgan_real"]


@pytest.fixture
def fake(rows, tmp_path, monkeypatch):
    """Baselines whose processes only leave the files that the real ones would; gives also the commands that were run."""
    made = baselines.Baselines(
        rows, tmp_path / "out", tmp_path / "records", device="cpu", judges=["judge-a", "judge-b"]
    )
    commands, status = [], {}

    def popen(command, **_):
        commands.append(command)
        name = Path(command[command.index("--output_dir" if "--config" in command else "--out") + 1]).name
        if "--config" in command:
            (tmp_path / "out" / "runs" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "out" / "runs" / name / "data.json").write_text('{"num_images": 250}')
        else:
            folder = tmp_path / "out" / "scores" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "results.json").write_text(json.dumps(make_results(name, 0.8)))
            save_png(Image.new("RGB", (16, 16)), folder / "samples.png", {"labels": [["red cube"]]})
        return subprocess.CompletedProcess(command, 0)

    class Process:
        def __init__(self, command, **options):
            self.done = popen(command, **options)

        def wait(self):
            return status.get(Path(self.done.args[1]).name, 0)

    def export(pipeline, folder, **_):
        folder.mkdir(parents=True)
        (folder / "training.json").write_text(json.dumps(TRAINING))

    monkeypatch.setattr(baselines.subprocess, "Popen", Process)
    monkeypatch.setattr(baselines, "load_pipeline", Path)
    monkeypatch.setattr(baselines, "export_pipeline", export)
    monkeypatch.setattr(baselines, "write_card", lambda *_, **__: None)
    monkeypatch.delenv("ICLEVR_ROOT", raising=False)
    return made, commands, status


def test_a_row_is_trained_scored_and_recorded_once(fake, rows, tmp_path):
    made, commands, _ = fake
    made.run("plain")
    assert [Path(command[1]).name for command in commands] == ["train_gan.py", "-m"]
    assert {path.name for path in (tmp_path / "records" / "plain").iterdir()} == {
        "results.json",
        "run.json",
        "card.yaml",
        "training.json",
        "samples.png",
    }
    made.run("plain")
    assert len(commands) == 2
    assert "+10.0" in table_of(rows, tmp_path / "records")[1]["plain"]["points above the report"]


def test_a_stopped_row_goes_on_with_what_is_missing(fake, tmp_path):
    made, commands, _ = fake
    made.run("plain")
    (tmp_path / "out" / "scores" / "plain" / "results.json").rename(tmp_path / "elsewhere")
    (tmp_path / "out" / "scores" / "plain" / "samples.png").unlink()
    (tmp_path / "out" / "scores" / "plain").rmdir()
    made.run("plain")
    assert [Path(command[1]).name for command in commands] == ["train_gan.py", "-m", "-m"]


def test_other_seeds_or_judges_score_a_trained_row_anew(fake):
    made, commands, _ = fake
    made.seeds = 2
    made.run("plain")
    made.seeds, made.device = None, "cuda"
    made.run("plain")
    assert [Path(command[1]).name for command in commands] == ["train_gan.py", "-m", "-m"]
    assert "--seeds" in commands[1] and "--seeds" not in commands[2]
    made.run("plain")
    assert len(commands) == 3


@pytest.mark.parametrize(("steps", "words"), [(1000, ["50", "DDIMScheduler"]), (50, []), (None, [])])
def test_only_what_would_take_more_steps_is_scored_with_fewer(fake, tmp_path, rows, steps, words):
    made, _, _ = fake
    made.sampling_steps = 50
    (tmp_path / "out" / "pipelines" / "plain").mkdir(parents=True)
    index = {} if steps is None else {"default_num_inference_steps": steps}
    (tmp_path / "out" / "pipelines" / "plain" / "model_index.json").write_text(json.dumps(index))
    command = made.evaluation_command(rows["plain"])
    flags = ("--num_inference_steps", "--scheduler")
    assert [command[command.index(flag) + 1] for flag in flags if flag in command] == words


def test_overrides_are_flags_of_the_script(fake, tmp_path, rows):
    made, _, _ = fake
    made.minutes, made.data = 8.0, "images"
    words = made.training_command(rows["without"])
    assert words[2:4] == ["--config", str(REPOSITORY / "train_scripts" / "recipes" / "dcgan_real.yaml")]
    flags = " ".join(words[6:])
    assert flags == "--flip true --betas 0.0 0.9 --judge none --max_minutes 8.0 --data images"


def test_real_images_are_what_matched_needs(fake, rows, monkeypatch):
    made, commands, _ = fake
    made.run("plain")
    assert "matched" not in commands[1] and "--data" not in commands[1]
    monkeypatch.setenv("ICLEVR_ROOT", "somewhere")
    made.run("mended")
    assert "matched" in commands[3] and "--data" not in commands[3]


def test_a_failed_row_says_why_and_leaves_no_record(fake, tmp_path):
    made, _, status = fake
    status["train_gan.py"] = 3
    with pytest.raises(ValueError, match="the training of plain ended with status 3:\n\\$ .*train_gan.py"):
        made.run("plain")
    assert not (tmp_path / "records" / "plain").exists()


def test_a_run_of_other_settings_is_refused(fake):
    made, _, _ = fake
    made.run("plain")
    made.minutes = 8.0
    with pytest.raises(ValueError, match="holds a run of plain with minutes None, and now it is 8.0"):
        made.run("plain")


def test_a_failed_row_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.yaml").write_text(LIST)
    ran = []

    def run(self, name):
        ran.append(name)
        if name == "plain":
            raise ValueError("it broke")
        if name == "mended":
            raise KeyError("num_steps")

    monkeypatch.setattr(baselines.Baselines, "run", run)
    arguments = ["--rows", str(tmp_path / "rows.yaml"), "--records", str(tmp_path / "records")]
    with pytest.raises(SystemExit, match="baselines: plain, mended failed"):
        baselines.main(arguments)
    assert ran == ["plain", "mended", "without"]
    assert "plain: ValueError: it broke" in capsys.readouterr().err
    assert "Not run yet: plain" in (tmp_path / "records.md").read_text()
    with pytest.raises(SystemExit, match="`only` must name rows of .* got nobody"):
        baselines.main([*arguments, "--only", "nobody"])


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_row_of_the_repository_is_a_command_that_its_script_takes(row, tmp_path):
    script = load_module(REPOSITORY / "train_scripts" / row.script)
    (config_class,) = [
        value
        for name, value in vars(script).items()
        if name.endswith("Config") and value.__module__ == script.__name__
    ]
    config = parse_config(config_class, baselines.Baselines(ROWS, tmp_path, minutes=8.0).training_command(row)[2:])
    assert config.data == "ICLEVR_ROOT" and config.resolution == 64
    assert all(getattr(config, name) == value for name, value in row.overrides.items())
    assert getattr(config, "evaluator", None) != baselines.JUDGE != config.judge


def test_the_table_of_this_repository_is_what_its_records_give():
    table = baselines.RECORDS.with_suffix(".md").read_text(encoding="utf-8")
    assert table == baselines.make_table(ROWS, baselines.RECORDS), "run python benchmarks/baselines.py --table"


def sampling_of(**systems):
    """What benchmarks/sampling.py writes of systems that take so many seconds for an image."""
    return {
        "schema_version": 1,
        "machine": "Machine X",
        "device": "cpu",
        "dtype": "float32",
        "num_threads": 1,
        "batch_size": 4,
        "date": "2030-01-02",
        "systems": {
            name: {
                "num_parameters": 5_970_000,
                "network_calls_per_image": 1000 if name == YARDSTICK else 1,
                "seconds_for_one_image": seconds,
                "seconds_an_image_in_a_batch": seconds / 2,
                "batch_timed_on_steps": 50 if name == YARDSTICK else None,
            }
            for name, seconds in systems.items()
        },
    }


def test_sampling_times_stand_beside_the_reported_ddpm(tmp_path):
    path = tmp_path / "sampling.json"
    path.write_text(json.dumps(sampling_of(**{YARDSTICK: 20.0, "gan": 0.01})))
    heading, where, table = render_sampling(load_sampling(path))
    assert heading == "## Sampling time" and "Machine X, cpu, 1 thread, float32, 2030-01-02" in where
    assert table.splitlines()[2:] == [
        "| gan | 1 | 5.97 M | 0.01 | 2,000 | 0.005 |",
        f"| {YARDSTICK} | 1,000 | 5.97 M | 20 | 1 | 10 (from 50 steps) |",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must hold JSON"),
        (json.dumps({"schema_version": 0}), "must have schema_version 1, got 0"),
        (
            json.dumps({"schema_version": 1, "systems": {}}),
            "must say machine, device, dtype, num_threads, batch_size, date",
        ),
        (json.dumps(sampling_of(gan=1.0)), "must hold the times of the reported DDPM"),
        (
            json.dumps(sampling_of(**{YARDSTICK: 1.0, "gan": 0})),
            "seconds_for_one_image of gan must be a number above 0",
        ),
    ],
)
def test_sampling_times_that_are_malformed_are_refused(tmp_path, content, message):
    (tmp_path / "sampling.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_sampling(tmp_path / "sampling.json")


def test_pipelines_that_draw_nothing_or_share_a_name_are_refused_before_any_is_timed(tiny_pipeline, tmp_path):
    for name in ("a", "b"):
        tiny_pipeline.save_pretrained(tmp_path / name / "run" / "pipeline")
    with pytest.raises(ValueError, match="`pipelines` must have distinct names, got run twice"):
        sampling.open_named([str(tmp_path / name / "run" / "pipeline") for name in ("a", "b")])
    generators = [
        iclevr_diffusion.CycleGANGenerator(16, block_out_channels=(4, 8), num_residual_blocks=1) for _ in range(2)
    ]
    iclevr_diffusion.CycleGANPipeline(*generators).save_pretrained(tmp_path / "cycle")
    with pytest.raises(ValueError, match="cycle, which maps images"):
        sampling.open_named([str(tmp_path / "cycle")])


def test_a_batch_of_many_calls_is_timed_on_some_and_multiplied(tiny_pipeline, monkeypatch):
    called = []
    monkeypatch.setattr(sampling, "TIMED_STEPS", 2)
    monkeypatch.setattr(sampling, "measure_cost", lambda draw, networks, batch_size: draw(batch_size) or found)
    found = {"images_per_second": 4.0, "seconds_for_one_image": 0.5, "network_calls_per_image": 2 * 2}
    call = type(tiny_pipeline).__call__

    @functools.wraps(call)  # its arguments are looked at
    def count(self, class_labels, **options):
        called.append((len(class_labels), options["num_inference_steps"]))
        return call(self, class_labels, **options)

    monkeypatch.setattr(type(tiny_pipeline), "__call__", count)
    tiny_pipeline.register_to_config(default_num_inference_steps=6)
    cost = sampling.measure(tiny_pipeline, 3)
    assert called == [(3, 2), (1, 6)]  # a part of the batch, and one whole image
    assert [cost["network_calls_per_image"], cost["seconds_an_image_in_a_batch"]] == [12, 0.75]
    assert cost["batch_timed_on_steps"] == 2 and cost["seconds_for_one_image"] not in (0.5, 0)


def test_a_few_calls_are_timed_in_full(tiny_pipeline):
    tiny_pipeline.register_to_config(default_num_inference_steps=2)
    cost = sampling.measure(tiny_pipeline, 2)
    assert [cost["network_calls_per_image"], cost["batch_timed_on_steps"]] == [2, None]


def test_a_cure_is_counted_in_the_seeds_that_it_bettered():
    def runs(*values):
        names = ("labels_found", "diversity", "kernel_distance")
        return {seed: dict(zip(names, numbers, strict=True)) | {"seconds": 9.0} for seed, numbers in enumerate(values)}

    failure, cure, _ = gan_cures.PAIRS[0]
    records = {
        failure: runs((0.2, 0.9, 1.5), (0.4, 0.9, 1.5)),
        cure: runs((0.3, 0.8, 1.0), (0.4, 0.8, 1.0), (1, 1, 0)),
    }
    first, second, *_ = gan_cures.summarize(records)
    assert [first["failure"], first["cure"], first["seeds"]] == [failure, cure, [0, 1]]  # those that both have
    assert first["seeds_cured"] == {"labels_found": 1, "kernel_distance": 2}  # a draw is no cure
    assert first["cure_means"] == pytest.approx({"labels_found": 0.35, "diversity": 0.8, "kernel_distance": 1.0})
    assert second["seeds"] == [] and "seeds_cured" not in second

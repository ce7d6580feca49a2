import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iclevr_diffusion.compare import BEGIN, END, Comparison, find_results, main
from iclevr_diffusion.images import save_png
from iclevr_diffusion.leaderboard import SCHEMA_VERSION, System, load_system, make_leaderboard, top_k_by_label
from iclevr_diffusion.leaderboard_plots import draw_samples, open_samples, plot_quality_against_speed
from iclevr_diffusion.leaderboard_tables import render_csv, render_markdown, render_summary

REPOSITORY = Path(__file__).resolve().parents[1]

LABELS = ["red cube", "blue sphere", "gray cylinder"]
SHOWN = [["red cube"], ["blue sphere", "gray cylinder"]]  # the labels of the images in samples.png
CEILINGS = {"test": 0.98, "new_test": 0.96, "all": 0.95, "crowded": 0.80}  # top-k of real images


def estimate(value, width=0.02):
    return {"value": value, "low": value - width / 2, "high": value + width / 2}


def make_scores(top_k, width=0.02):
    values = {"top_k": top_k, "exact_match": top_k - 0.2, "precision": top_k - 0.1, "recall": top_k - 0.05}
    values |= {"count_accuracy": top_k - 0.15, "mean_average_precision": top_k - 0.01}
    return {"num_images": 960} | {name: estimate(value, width) for name, value in values.items()}


def make_results(
    name="ours",
    top_k=0.9,
    *,
    judges=("judge-a", "judge-b"),
    taught=(),
    protocols=("test", "new_test"),
    labels=LABELS,
    speed=12.5,
    machine="Machine X",
):
    """What iclevr-evaluate writes about a made-up system: `top_k` by the first judge, .1 less by the second."""
    by_judge = {judge: top_k - 0.1 * place for place, judge in enumerate(judges)}

    def score(protocol):
        shift = 0.02 if protocol == "test" else -0.02
        return {
            judge: {
                "all": make_scores(value + shift),
                "by_num_objects": {str(k): make_scores(value + shift) for k in (1, 2)},
                "by_label": {
                    label: {"num_images": 30, "top_k": estimate(value + shift)} for label in labels
                },
                "by_seen": {"seen": make_scores(value + shift), "unseen": make_scores(value + shift)},
                "one_seed_top_k": {"min": value, "median": value, "max": value},
                "ceiling": {"top_k": CEILINGS[protocol], "exact_match": CEILINGS[protocol] - 0.05},
            }
            for judge, value in by_judge.items()
        }  # fmt: skip

    held_out = {"num_images": 600, "top_k": 0.97, "exact_match": 0.96, "precision": 0.99, "recall": 0.985}
    held_out |= {"count_accuracy": 0.97, "mean_average_precision": 0.998}
    distances = {"kernel_distance": 0.1, "precision": 0.7, "recall": 0.6, "density": 0.8, "coverage": 0.5}
    results = {
        "schema_version": 2,
        "pipeline": {"name": name, "class": "MadeUpPipeline", "weights_sha256": f"{name:0<64}", "num_parameters": 5_970_000, "data_sha256": None},
        "settings": {
            "options": {"num_inference_steps": 20, "guidance_scale": 5.0},
            "judges": {judge: {"class": "Judge", "weights_sha256": f"{judge:0<64}", "threshold": 0.0} for judge in judges},
        },
        "quick": False,
        "judges_used_in_training": list(taught),
        "protocols": {
            protocol: {
                "sha256": f"{protocol:0<64}", "num_conditions": 32, "num_replicates": 30, "num_images": 960,
                "quick": False, "resampled": "replicates", "judges": score(protocol),
            }
            for protocol in protocols
        },
        "held_out_images": {
            "data_sha256": "d" * 64, "num_images": 600,
            "judges": {judge: held_out | {"by_num_objects": {"1": held_out}} for judge in judges},
        },
        "distribution": {
            "data_sha256": "d" * 64, "num_generated": 600, "num_real": 600,
            "judges": {
                judge: {
                    "generated": distances | {"frechet_distance": 100 * (1 - value)},
                    "real": distances | {"frechet_distance": 1.5},
                }
                for judge, value in by_judge.items()
            },
            "diversity": {"judges": {judge: {"value": 0.875, "num_conditions": 40, "num_real": 300} for judge in judges}},
        },
        "cost": {
            "images_per_second": speed, "seconds_for_one_image": 0.25, "batch_size": 64, "device": "cpu",
            "dtype": "float32", "num_threads": 1, "num_parameters": 5_970_000, "network_calls_per_image": 40,
        },
        "environment": {"machine": machine, "git_commit": "0123456789abcdef0123-dirty"},
    }  # fmt: skip
    if {"test", "new_test"} <= set(protocols):
        ceiling = {"top_k": 0.97, "exact_match": 0.92}
        results["mean_of_test_and_new_test"] = {
            judge: make_scores(value) | {"ceiling": ceiling} for judge, value in by_judge.items()
        }
    return results


def save(folder, results, shown=SHOWN):
    """Writes an evaluation's folder and returns its results.json."""
    path = folder / results["pipeline"]["name"] / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(results))
    if shown is not None:
        save_png(Image.new("RGB", (16 * len(shown), 16), "red"), path.with_name("samples.png"), {"labels": shown})
    return path


def board_of(*results, protocols=None):
    """A leaderboard of results that lie in no file."""
    return make_leaderboard(
        [System(Path(part["pipeline"]["name"], "results.json"), part) for part in results], protocols
    )


def changed(results, *keys, to):
    """Sets what the keys lead to, and returns the results."""
    part = results
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = to
    return results


def without_labels(name="unlabelled"):
    results = changed(make_results(name), "protocols", to={})
    del results["mean_of_test_and_new_test"]
    return results


def rows_of(markdown, title):
    """The cells of the table under a heading, by column, for each system."""
    lines = [
        line for line in markdown.split(f"## {title}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")
    ]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_systems_stand_in_the_order_of_their_mean_top_k():
    board = board_of(make_results("a", 0.7), make_results("b", 0.9), make_results("c", 0.8))
    assert [system.name for system in board.ranked] == ["b", "c", "a"]
    table = rows_of(render_markdown(board, Path()), "As judge-a sees it")
    assert list(table) == ["*real images, held out*", "b", "c", "a"]


def test_a_row_holds_quality_with_intervals_and_cost():
    row = rows_of(render_markdown(board_of(make_results("a", 0.8)), Path()), "As judge-a sees it")["a"]
    assert row == {
        "system": "a",
        "top-k, mean": "0.800 [0.790, 0.810]",
        "top-k, test": "0.820 [0.810, 0.830]",
        "top-k, new_test": "0.780 [0.770, 0.790]",
        "exact match": "0.600 [0.590, 0.610]",
        "precision": "0.700 [0.690, 0.710]",
        "Frechet distance": "20",
        "relative diversity": "0.875",
        "images/s": "12.5",
        "seconds for one image": "0.25",
        "network calls an image": "40",
        "parameters": "5.97 M",
    }


def test_the_first_row_is_the_judge_on_real_images_with_as_many_objects():
    row = rows_of(render_markdown(board_of(make_results()), Path()), "As judge-b sees it")["*real images, held out*"]
    assert row["top-k, mean"] == "0.970"
    assert [row["top-k, test"], row["top-k, new_test"]] == ["0.980", "0.960"]
    assert [row["exact match"], row["precision"], row["Frechet distance"]] == ["0.920", "0.990", "1.5"]


def test_what_was_not_measured_is_a_dash():
    results = make_results("a")
    results["held_out_images"] = results["distribution"] = {"missing": "no images were given"}
    for part in (results["mean_of_test_and_new_test"], *(p["judges"] for p in results["protocols"].values())):
        for scores in part.values():
            scores.pop("ceiling")
    markdown = render_markdown(board_of(results), Path())
    row = rows_of(markdown, "As judge-a sees it")["a"]
    assert [row["Frechet distance"], row["relative diversity"]] == ["-", "-"]
    assert "| *real" not in markdown


def test_a_table_has_a_column_for_each_further_protocol_that_all_have_drawn():
    some, more = make_results("a", protocols=("test", "new_test", "all")), make_results(
        "b", protocols=("test", "crowded", "new_test", "all")
    )  # fmt: skip
    row = rows_of(render_markdown(board_of(some, more), Path()), "As judge-a sees it")["b"]
    assert [title for title in row if title.startswith("top-k")] == [
        "top-k, mean",
        "top-k, test",
        "top-k, new_test",
        "top-k, all",
    ]


def test_without_the_lists_of_the_task_the_first_protocol_ranks():
    board = board_of(
        make_results("a", 0.7, protocols=("crowded", "all")), make_results("b", protocols=("all", "crowded"))
    )
    assert board.main_protocols == ("all",)
    assert [system.name for system in board.ranked] == ["b", "a"]
    row = rows_of(render_markdown(board, Path()), "As judge-a sees it")["a"]
    assert row["top-k, all"] == "0.680 [0.670, 0.690]"


def test_protocols_that_were_asked_for_are_the_only_ones_shown():
    board = board_of(make_results("a"), make_results("b"), protocols=["new_test"])
    assert board.protocols == ("new_test",)
    assert "0.880" in render_markdown(board, Path())  # .9 - .02
    assert "top-k, mean" not in render_markdown(board, Path())


def test_the_best_value_is_bold_only_where_its_interval_is_apart_from_the_next():
    apart = render_markdown(board_of(make_results("a", 0.80), make_results("b", 0.83)), Path())
    assert rows_of(apart, "As judge-a sees it")["b"]["top-k, mean"] == "**0.830 [0.820, 0.840]**"
    assert rows_of(apart, "As judge-a sees it")["a"]["top-k, mean"] == "0.800 [0.790, 0.810]"
    together = render_markdown(board_of(make_results("a", 0.80), make_results("b", 0.815)), Path())
    assert rows_of(together, "As judge-a sees it")["b"]["top-k, mean"] == "0.815 [0.805, 0.825]"
    assert "| **" not in render_markdown(board_of(make_results("a")), Path())


def test_a_third_system_with_a_wide_interval_keeps_the_best_from_being_bold():
    wide = make_results("c", 0.78)
    wide["mean_of_test_and_new_test"]["judge-a"] |= {"top_k": estimate(0.78, 0.2)}
    markdown = render_markdown(board_of(make_results("a", 0.80), make_results("b", 0.83), wide), Path())
    assert rows_of(markdown, "As judge-a sees it")["b"]["top-k, mean"] == "0.830 [0.820, 0.840]"


def test_a_judge_that_taught_a_system_neither_ranks_nor_makes_it_bold():
    taught, other = make_results("a", 0.95, taught=["judge-a"]), make_results("b", 0.7)
    board = board_of(taught, other, make_results("c", 0.6))
    assert board.judges == ("judge-b", "judge-a")
    table = rows_of(render_markdown(board, Path()), "As judge-a sees it")
    assert table["a†"]["top-k, mean"] == "0.950 [0.940, 0.960]"
    assert table["b"]["top-k, mean"] == "**0.700 [0.690, 0.710]**"
    assert "† judge-a had a part in this system's training" in render_markdown(board, Path())
    assert "†" not in render_markdown(board_of(make_results("a"), other), Path())


def test_the_judge_that_reads_real_images_best_ranks():
    results = make_results()
    results["held_out_images"]["judges"]["judge-a"] = {"exact_match": 0.95}
    assert board_of(results).judges == ("judge-b", "judge-a")


def test_quick_systems_are_left_out_by_name():
    quick = changed(make_results("hasty"), "protocols", "test", "quick", to=True)
    board = board_of(quick, make_results("a"))
    assert [system.name for system in board.ranked] == ["a"]
    assert "Left out, as they drew too few images (quick): hasty." in render_markdown(board, Path())
    assert [system.name for system in board_of(quick, make_results("a"), protocols=["new_test"]).ranked] == [
        "a",
        "hasty",
    ]


def test_systems_without_labels_have_a_table_of_their_own():
    board = board_of(make_results("a"), without_labels())
    markdown = render_markdown(board, Path())
    table = rows_of(markdown, "Systems that are not told what to draw")
    assert [table["unlabelled"]["judge"], table["unlabelled"]["Frechet distance"]] == ["judge-b", "20"]
    assert table["*real images, held out*"]["Frechet distance"] == "1.5"
    assert table["unlabelled"]["images/s"] == "12.5"
    assert "unlabelled" not in rows_of(markdown, "As judge-a sees it")
    assert ["unlabelled", "judge-a", "False", "matched", "generated", "coverage", "0.5", "", ""] in list(
        csv.reader(render_csv(board).splitlines())
    )


def test_speeds_of_several_machines_carry_a_letter_each():
    one = render_markdown(board_of(make_results("a", 0.9), make_results("b", 0.8)), Path())
    assert "<sup>" not in one
    assert "Speeds were measured on: Machine X, cpu, 1 thread." in one
    board = board_of(make_results("a", 0.9), make_results("b", 0.8, machine="Machine Y", speed=4321))
    table = rows_of(render_markdown(board, Path()), "As judge-a sees it")
    assert [table["a"]["images/s"], table["b"]["images/s"]] == ["12.5<sup>a</sup>", "4,320<sup>b</sup>"]
    assert "<sup>a</sup> Machine X, cpu, 1 thread; <sup>b</sup> Machine Y" in render_summary(board, "results")


def test_threads_make_a_machine_another_one():
    other = changed(make_results("b"), "cost", "num_threads", to=2)
    assert board_of(make_results("a"), other).machines == ("Machine X, cpu, 1 thread", "Machine X, cpu, 2 threads")


def test_relative_diversities_of_other_conditions_are_not_shown():
    other = make_results("b")
    other["distribution"]["diversity"]["judges"]["judge-a"]["num_conditions"] = 41
    board = board_of(make_results("a"), other)
    assert "relative diversity" not in rows_of(render_markdown(board, Path()), "As judge-a sees it")["a"]
    assert "Relative diversities are not shown" in render_markdown(board, Path())
    assert "relative_diversity" not in render_csv(board)


def test_the_csv_holds_every_number_with_the_ends_of_its_interval():
    board = board_of(make_results("a", 0.8, taught=["judge-b"]))
    header, *rows = csv.reader(render_csv(board).splitlines())
    assert header == ["system", "judge", "judge_taught_it", "protocol", "part", "metric", "value", "low", "high"]
    found = {tuple(row[:6]): row[6:] for row in rows}
    assert len(found) == len(rows)
    assert found["a", "judge-a", "False", "test", "all", "top_k"] == ["0.82", "0.81", "0.83"]
    assert found["a", "judge-b", "True", "mean_of_test_and_new_test", "all", "exact_match"] == ["0.5", "0.49", "0.51"]
    assert found["a", "judge-a", "False", "new_test", "num_objects 2", "recall"] == ["0.73", "0.72", "0.74"]
    assert found["a", "judge-a", "False", "new_test", "unseen", "precision"] == ["0.68", "0.67", "0.69"]
    assert found["a", "judge-a", "False", "matched", "generated", "frechet_distance"] == ["20", "", ""]
    assert found["a", "judge-a", "False", "", "diversity", "relative_diversity"] == ["0.875", "", ""]
    assert found["a", "", "", "", "Machine X, cpu, 1 thread", "images_per_second"] == ["12.5", "", ""]
    real = "real images, held out"
    assert found[real, "judge-a", "", "test", "all", "top_k"] == ["0.98", "", ""]
    assert found[real, "judge-a", "", "held-out images", "num_objects 1", "recall"] == ["0.985", "", ""]


def test_labels_are_pooled_over_the_images_of_both_lists():
    results = make_results(labels=["red cube", "blue sphere"])
    test, new_test = (results["protocols"][name]["judges"]["judge-a"]["by_label"] for name in ("test", "new_test"))
    test["red cube"] = {"num_images": 30, "top_k": estimate(0.8)}
    new_test["red cube"] = {"num_images": 10, "top_k": estimate(0.4)}
    del new_test["blue sphere"]
    other = make_results("other", 0.5, labels=["red cube"])
    labels, rows = top_k_by_label(board_of(results, other))
    assert labels == ["red cube", "blue sphere"]
    assert rows[0] == pytest.approx([0.7, 0.92])  # (30 * .8 + 10 * .4) / 40
    assert rows[1] == [pytest.approx(0.5), None]


def test_labels_are_taken_from_all_conditions_where_every_system_has_drawn_them():
    board = board_of(make_results(top_k=0.8, protocols=("test", "new_test", "all"), labels=["red cube"]))
    for name in ("test", "new_test"):
        board.ranked[0].results["protocols"][name]["judges"]["judge-a"]["by_label"]["red cube"]["top_k"]["value"] = 0
    assert top_k_by_label(board) == (["red cube"], [[pytest.approx(0.78)]])


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("schema_version",), 1, "schema_version 2, got 1; run iclevr-evaluate again"),
        (("pipeline", "name"), 3, r"pipeline\.name must be str, got 3"),
        (("protocols", "test", "sha256"), None, r"protocols\.test\.sha256 must be str, got None"),
        (("protocols", "test", "judges", "judge-a", "all"), {}, r"protocols\.test\.judges\.judge-a\.all\.top_k is missing"),
        (("cost",), [], r"cost must be a mapping, got \[\]"),
        (("settings", "judges", "judge-a", "threshold"), "0", "threshold must be int or float, got '0'"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_of_this_form_is_refused_by_name(keys, value, message, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(changed(make_results(), *keys, to=value)))
    with pytest.raises(ValueError, match=message) as error:
        load_system(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "\x80"])
def test_a_file_that_is_no_results_at_all_is_refused(text, tmp_path):
    path = tmp_path / "results.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="results.json must"):
        load_system(path)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("protocols", "test", "sha256"), "0" * 64, "the conditions of the protocol test"),
        (("settings", "judges", "judge-a", "weights_sha256"), "0" * 64, "the weights_sha256 of the judge judge-a"),
        (("settings", "judges", "judge-a", "threshold"), 1.5, "the threshold of the judge judge-a"),
        (("held_out_images", "data_sha256"), "0" * 64, "the real images that judges were tested on"),
        (("distribution", "data_sha256"), "0" * 64, "the real images that distances are from"),
        (("distribution", "num_generated"), 300, "the num_generated of the distances"),
        (("distribution", "num_real"), 300, "the num_real of the distances"),
        (("pipeline", "name"), "a", "distinct names, and a/results.json and a/results.json are both 'a'"),
        (("judges_used_in_training",), ["judge-a", "judge-b"], "b/results.json must hold the scores of a judge that had no part"),
        (("mean_of_test_and_new_test", "judge-a", "top_k", "low"), None, r"b/results.json is malformed: mean.*\.low must be"),
    ],
)  # fmt: skip
def test_results_that_do_not_compare_are_refused(keys, value, message):
    with pytest.raises(ValueError, match=message):
        board_of(make_results("a"), changed(make_results("b"), *keys, to=value))


def test_systems_without_labels_must_be_held_against_the_same_images_too():
    other = changed(without_labels("b"), "distribution", "num_generated", to=10)
    with pytest.raises(ValueError, match="num_generated is 600 in a/results.json and 10 in b/results.json"):
        board_of(make_results(), without_labels("a"), other)


def test_systems_that_share_no_protocol_are_refused():
    with pytest.raises(ValueError, match="share none: a/results.json has test; b/results.json has all, crowded"):
        board_of(make_results("a", protocols=["test"]), make_results("b", protocols=["all", "crowded"]))


def test_a_protocol_that_a_system_lacks_is_refused():
    with pytest.raises(ValueError, match="b/results.json lacks all: it has test, new_test"):
        board_of(make_results("a", protocols=["test", "all"]), make_results("b"), protocols=["test", "all"])


def test_a_protocol_that_is_not_shown_may_differ():
    other = changed(make_results("b"), "protocols", "test", "sha256", to="0" * 64)
    assert board_of(make_results("a"), other, protocols=["new_test"]).protocols == ("new_test",)


def test_systems_that_share_no_independent_judge_are_refused():
    with pytest.raises(ValueError, match="share none: a/results.json has judge-a; b/results.json has judge-b"):
        board_of(make_results("a", judges=["judge-a"]), make_results("b", judges=["judge-b"]))
    taught = [make_results(name, taught=[f"judge-{name}"]) for name in "ab"]
    with pytest.raises(ValueError, match="a judge that taught none of them.*taught by judge-a; .*taught by judge-b"):
        board_of(*taught)


def test_a_leaderboard_of_nothing_but_quick_results_is_refused():
    with pytest.raises(ValueError, match=r"a drew too few images \(quick\)"):
        board_of(changed(make_results("a"), "protocols", "test", "quick", to=True))
    with pytest.raises(ValueError, match="none draws labels"):
        board_of(without_labels())


@pytest.fixture
def evaluations(tmp_path):
    """Two evaluations, a README, and the command line that compares them."""
    folders = [save(tmp_path, make_results(name, top_k)).parent for name, top_k in (("a", 0.7), ("b", 0.9))]
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return [*map(str, folders), "--out", str(tmp_path / "out"), "--readme", str(readme)]


def stale(arguments):
    """The names of the files that `--check` finds stale."""
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--check"])
    first, *files = str(end.value.code).splitlines()
    assert first == "iclevr-compare: not what the results give; run it again:"
    return {Path(file).name for file in files}


def test_the_command_writes_what_its_check_then_accepts(evaluations, tmp_path, capsys):
    everything = {"leaderboard.md", "leaderboard.csv", "quality_against_speed.png", "labels.png", "samples.png"}
    assert stale(evaluations) == everything | {"README.md"}
    assert not (tmp_path / "out").exists()
    main(evaluations)
    assert {path.name for path in (tmp_path / "out").iterdir()} == everything
    main([*evaluations, "--check"])
    assert capsys.readouterr().out.endswith("The leaderboard is what the results give.\n")

    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith(f"before\n{BEGIN}\n\n| system | top-k, test |")
    assert readme.endswith(f"{END}\nafter\n")
    assert "(out/quality_against_speed.png)" in readme
    assert "[b](../b/results.json)" in (tmp_path / "out" / "leaderboard.md").read_text()

    table = (tmp_path / "out" / "leaderboard.csv").read_text()
    (tmp_path / "out" / "leaderboard.csv").write_text("system\n")
    (tmp_path / "README.md").write_text(readme.replace("0.920", "0.999"))
    assert stale(evaluations) == {"leaderboard.csv", "README.md"}
    (tmp_path / "out" / "leaderboard.csv").write_text(table)
    (tmp_path / "README.md").write_text(readme)
    save_png(Image.new("RGB", (32, 16), "blue"), tmp_path / "a" / "samples.png", {"labels": SHOWN})
    pictures = {name for name in everything if name.endswith("png")}  # told by the hash of the inputs that they carry
    assert stale(evaluations) == pictures | {"leaderboard.md"}


def test_a_readme_without_the_marks_is_refused(evaluations, tmp_path):
    (tmp_path / "README.md").write_text(f"{END} {BEGIN}")
    with pytest.raises(SystemExit, match="README.md must hold the lines <!-- leaderboard:begin -->"):
        main(evaluations)
    assert not (tmp_path / "out").exists()


def test_results_are_found_in_the_folder_of_benchmarks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="iclevr-compare: There is no benchmarks/results"):
        main([])
    save(tmp_path / "benchmarks" / "results", make_results("a"))
    assert find_results() == [Path("benchmarks/results/a/results.json")]
    with pytest.raises(ValueError, match="there is no elsewhere"):
        find_results(["benchmarks/results/a", "elsewhere"])


def test_the_plot_names_every_point_where_nothing_covers_the_name():
    places = {
        "conditional-ddpm": (0.95, 12.0),
        "flow-matching": (0.948, 12.5),
        "acgan": (0.945, 13),
        "vae": (0.6, 900),
    }
    board = board_of(*(make_results(name, top_k, speed=speed) for name, (top_k, speed) in places.items()))
    figure = plot_quality_against_speed(board)
    boxes = {text.get_text(): text.get_window_extent() for text in figure.axes[0].texts if text.get_text()}
    assert boxes.keys() == places.keys()
    points = [
        figure.axes[0].transData.transform((speed, height))
        for top_k, speed in places.values()
        for height in (top_k - 0.01, top_k, top_k + 0.01)
    ]
    for name, box in boxes.items():
        assert not any(box.overlaps(other) for other_name, other in boxes.items() if other_name != name)
        assert not any(box.contains(*point) for point in points)


def test_the_plot_gives_each_machine_a_shape_and_the_ceiling_a_line():
    board = board_of(make_results("a", 0.9), make_results("b", 0.8), make_results("c", 0.7, machine="Machine Y"))
    figure = plot_quality_against_speed(board)
    (axes,) = figure.axes
    handles, names = axes.get_legend_handles_labels()
    assert sorted(names) == ["Machine X, cpu, 1 thread", "Machine Y, cpu, 1 thread", "real images, held out"]
    shapes = {name: handle[0].get_marker() for name, handle in zip(names, handles, strict=True) if name[0] == "M"}
    assert len(set(shapes.values())) == 2
    (line,) = [handle for handle, name in zip(handles, names, strict=True) if name[0] == "r"]
    assert set(line.get_ydata()) == {0.97}
    assert axes.get_xscale() == "log"


def test_the_grid_has_a_row_a_system_and_a_column_a_condition(tmp_path):
    paths = [save(tmp_path, make_results(name, top_k)) for name, top_k in (("a", 0.7), ("b", 0.9))]
    strip = Image.new("RGB", (32, 16), "lime")
    strip.paste("blue", (16, 0, 32, 16))
    save_png(strip, paths[0].with_name("samples.png"), {"labels": SHOWN})
    captions, pictures, notes = open_samples(make_leaderboard([load_system(path) for path in paths]))
    assert captions == ["red cube", "blue sphere\ngray cylinder"]
    assert [list(pictures), notes] == [["b", "a"], []]
    grid = np.asarray(draw_samples(captions, pictures))
    right, below = 6 + 64, 6 + 64  # the middle of the last image, from the end
    colors = [
        grid[-below - 134, -right - 134],
        grid[-below - 134, -right],
        grid[-below, -right - 134],
        grid[-below, -right],
    ]
    assert [tuple(color) for color in colors] == [(255, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_a_system_that_drew_other_conditions_first_is_left_out_of_the_grid(tmp_path):
    paths = [
        save(tmp_path, make_results("a", 0.9)),
        save(tmp_path, make_results("b", 0.8), [["red cube"], ["red cube"]]),
        save(tmp_path, make_results("c", 0.7), None),
    ]
    _, pictures, notes = open_samples(make_leaderboard([load_system(path) for path in paths]))
    assert list(pictures) == ["a"]
    assert notes[0] == "b is not among the images: its samples.png shows other labels."
    assert notes[1].startswith("c is not among the images: no samples.png")


def test_pictures_without_their_labels_are_refused(tmp_path):
    path = save(tmp_path, make_results("a"), None)
    board = make_leaderboard([load_system(path)])
    with pytest.raises(ValueError, match="At least one system must have a samples.png"):
        open_samples(board)
    Image.new("RGB", (32, 16)).save(path.with_name("samples.png"))
    with pytest.raises(ValueError, match="samples.png must be square images side by side"):
        open_samples(board)


def test_without_matplotlib_the_command_names_the_extra_that_brings_it(evaluations, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"iclevr-compare: .* pip install 'iclevr_diffusion\[eval\]'"):
        main(evaluations)
    assert not (tmp_path / "out").exists()


def test_the_leaderboard_of_this_repository_is_what_its_results_give(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    versions = {json.loads(path.read_text())["schema_version"] for path in find_results()}
    if versions != {SCHEMA_VERSION}:
        pytest.skip(
            f"benchmarks/results holds results of schema_version {sorted(versions)}, not yet {SCHEMA_VERSION} alone"
        )
    assert Comparison(readme="README.md").stale_files() == [], "run iclevr-compare --readme README.md"

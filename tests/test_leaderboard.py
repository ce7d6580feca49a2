import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from iclevr_diffusion.compare import BEGIN, END, Comparison, find_results, main
from iclevr_diffusion.images import save_png
from iclevr_diffusion.leaderboard import System, load_system, make_leaderboard, top_k_by_label
from iclevr_diffusion.leaderboard_plots import draw_samples, open_samples, plot_labels, plot_quality_against_speed
from iclevr_diffusion.leaderboard_tables import render_csv, render_markdown, render_summary

REPOSITORY = Path(__file__).resolve().parents[1]

LABELS = ["red cube", "blue sphere", "gray cylinder"]
SHOWN = [["red cube"], ["blue sphere", "gray cylinder"]]  # the labels of the images in samples.png
CEILINGS = {
    "test": 0.98,
    "new_test": 0.96,
    "all": 0.95,
    "crowded": 0.80,
    "held-out": 0.94,
    "matched": 0.93,
}  # top-k of real images


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
                "ceiling": {"top_k": CEILINGS.get(protocol, 0.9), "exact_match": CEILINGS.get(protocol, 0.9) - 0.05},
            }
            for judge, value in by_judge.items()
        }  # fmt: skip

    held_out = {"num_images": 600, "top_k": 0.97, "exact_match": 0.96, "precision": 0.99, "recall": 0.985}
    held_out |= {"count_accuracy": 0.97, "mean_average_precision": 0.998}
    distances = {"kernel_distance": 0.1, "precision": 0.7, "recall": 0.6, "density": 0.8, "coverage": 0.5}
    results = {
        "schema_version": 2,
        "pipeline": {"name": name, "class": "MadeUpPipeline", "weights_sha256": f"{name:0<64}", "num_parameters": 5_970_000, "data_sha256": None, "label_names": list(labels)},
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
            "diversity": {"pixels": {"value": 0.875, "num_conditions": 40, "num_real": 300}},
        },
        "cost": {
            "images_per_second": speed, "seconds_for_one_image": 0.25, "batch_size": 64, "machine": machine, "device": "cpu",
            "dtype": "float32", "num_threads": 1, "num_parameters": 5_970_000, "network_calls_per_image": 40,
        },
        "environment": {"machine": "the one that drew", "git_commit": "0123456789abcdef0123-dirty"},
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
    results = changed(changed(make_results(name), "protocols", to={}), "pipeline", "label_names", to=None)
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


def with_negation(results, both=0.6, protocol="negated"):
    negation = {"num_images": 960, "present": estimate(0.8), "absent": estimate(0.7), "both": estimate(both)}
    results["protocols"][protocol]["judges"]["judge-a"]["negation"] = negation | {"ceiling": 0.9}
    return results


def with_best_of(results, top_k=0.95, protocol="test"):
    best = {"num_candidates": 4, "all": make_scores(top_k)}
    results["protocols"][protocol]["judges"]["judge-a"]["best_of"] = best
    return results


def written(tmp_path, *results):
    comparison = Comparison([save(tmp_path, part) for part in results], out=tmp_path)
    return comparison.texts[tmp_path / "leaderboard.md"], list(
        csv.DictReader(comparison.texts[tmp_path / "leaderboard.csv"].splitlines())
    )


def test_negation_is_shown_of_the_systems_that_have_drawn_it_though_others_cannot(tmp_path):
    lists = ("test", "new_test", "negated")
    three = [with_negation(make_results(name, protocols=lists), both) for name, both in (("a", 0.5), ("b", 0.6))]
    text, rows = written(tmp_path, *three, make_results("gan"))
    table = rows_of(text, "What was not to be shown")
    assert list(table) == ["*real images, held out*", "a", "b"]
    assert table["b"] == {
        "system": "b",
        "all asked for seen": "0.800 [0.790, 0.810]",
        "nothing negated seen": "0.700 [0.690, 0.710]",
        "both": "**0.600 [0.590, 0.610]**",
    }
    assert [table["*real images, held out*"][title] for title in ("nothing negated seen", "both")] == ["-", "0.900"]
    found = [row for row in rows if row["part"] == "negation" and row["system"] == "b"]
    assert {(row["protocol"], row["metric"], row["value"], row["low"]) for row in found} == {
        ("negated", "present", "0.8", "0.79"),
        ("negated", "absent", "0.7", "0.69"),
        ("negated", "both", "0.6", "0.59"),
    }
    assert "What was not to be shown" not in render_markdown(board_of(make_results()), Path())


def test_images_that_the_model_picked_are_marked_and_neither_rank_nor_are_best(tmp_path):
    text, rows = written(tmp_path, with_best_of(make_results("a", 0.7)), make_results("b", 0.9))
    assert list(rows_of(text, "As judge-a sees it")) == ["*real images, held out*", "b", "a"]
    table = rows_of(text, "Images that the model picked")
    assert table == {
        "a": {
            "system": "a",
            "n": "4",
            "top-k, one image": "0.720 [0.710, 0.730]",
            "top-k, best of n §": "0.950 [0.940, 0.960]",
            "exact match, one image": "0.520 [0.510, 0.530]",
            "exact match, best of n §": "0.750 [0.740, 0.760]",
        }
    }
    best = [row for row in rows if row["part"] == "best of 4"]
    assert {row["metric"]: row["value"] for row in best}["top_k"] == "0.95" and len(best) == 6
    both = [with_best_of(make_results("a", 0.5)), with_best_of(make_results("b", 0.6), 0.7)]
    table = rows_of(written(tmp_path / "both", *both)[0], "Images that the model picked")
    assert [table["a"]["top-k, best of n §"][0], table["b"]["top-k, one image"][:2]] == ["0", "**"]


def test_asides_are_shown_of_the_protocols_asked_for_alone_and_apart_where_conditions_differ(tmp_path):
    lists = ("test", "new_test", "negated")
    one, other = (with_negation(make_results(name, protocols=lists)) for name in ("a", "b"))
    chosen = Comparison([save(tmp_path, one)], out=tmp_path, protocols=["test"])
    assert "What was not to be shown" not in chosen.texts[tmp_path / "leaderboard.md"]
    other["protocols"]["negated"]["sha256"] = "0" * 64
    text, _ = written(tmp_path / "both", one, other)
    assert "The list `negated`, with the conditions negated0:" in text
    assert "The list `negated`, with the conditions 00000000:" in text


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"best_of": {"num_candidates": -1, "all": make_scores(0.5)}},
            "best_of.num_candidates must be a whole number",
        ),
        ({"negation": {"present": estimate(0.5), "absent": estimate(0.5)}}, "negation.both is missing"),
    ],
)
def test_asides_of_another_form_are_refused(tmp_path, part, message):
    results = make_results()
    results["protocols"]["test"]["judges"]["judge-a"] |= part
    with pytest.raises(ValueError, match=f"malformed: protocols.test.judges.judge-a.{message}"):
        load_system(save(tmp_path, results))


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


def test_a_rival_without_an_interval_keeps_the_best_from_being_bold():
    boards = []
    for value in (1.0, 0.5):
        rival = make_results("c", 0.6)
        rival["mean_of_test_and_new_test"]["judge-a"]["precision"] = {"value": value, "low": None, "high": None}
        markdown = render_markdown(board_of(make_results("a", 0.80), make_results("b", 0.60), rival), Path())
        boards.append(rows_of(markdown, "As judge-a sees it"))
    assert [boards[0][name]["precision"] for name in "ac"] == ["0.700 [0.690, 0.710]", "1.000"]
    assert [boards[1][name]["precision"] for name in "ac"] == ["**0.700 [0.690, 0.710]**", "0.500"]


def test_quick_systems_are_left_out_by_name():
    quick = changed(make_results("hasty"), "protocols", "test", "quick", to=True)
    board = board_of(quick, make_results("a"))
    assert [system.name for system in board.ranked] == ["a"]
    assert "Left out: hasty drew too few images (quick)." in render_markdown(board, Path())
    assert [system.name for system in board_of(quick, make_results("a"), protocols=["new_test"]).ranked] == [
        "a",
        "hasty",
    ]


def test_systems_that_were_trained_on_the_held_out_images_are_left_out_by_name():
    greedy, unlabelled = make_results("greedy", 0.99), without_labels()
    for results in (greedy, unlabelled):
        changed(results, "pipeline", "trained_on_held_out", to=True)
    fair = changed(make_results("a"), "pipeline", "trained_on_held_out", to=False)
    board = board_of(greedy, unlabelled, fair)
    assert [[system.name for system in part] for part in (board.ranked, board.without_labels)] == [["a"], []]
    reason = "was trained on all images, with none held out"
    assert f"Left out: greedy {reason}; unlabelled {reason}." in render_markdown(board, Path())


def test_matched_images_bar_no_system_and_have_no_column_unless_asked_for():
    lists = ("test", "new_test", "matched")
    systems = [changed(make_results(name, protocols=lists), "protocols", "matched", "quick", to=True) for name in "ab"]
    board = board_of(*systems)
    assert board.protocols == ("test", "new_test") and not board.left_out
    changed(systems[0], "protocols", "matched", "quick", to=False)
    board = board_of(*systems, protocols=["matched"])
    assert [board.protocols, [system.name for system in board.ranked]] == [("matched",), ["a"]]
    assert "top-k, matched" in render_markdown(board, Path())


def test_systems_trained_on_held_out_sets_are_marked_there_and_not_held_against_the_others():
    lists = ("test", "new_test", "held-out")
    results = [make_results(name, top_k, protocols=lists) for name, top_k in (("a", 0.9), ("b", 0.8), ("c", 0.7))]
    for part in results[1:]:
        for scores in part["protocols"]["held-out"]["judges"].values():
            del scores["by_seen"]["seen"]
    board = board_of(*results)
    table = rows_of(render_markdown(board, Path()), "As judge-a sees it")
    assert [table[name]["top-k, held-out"] for name in "abc"] == [
        "0.880 [0.870, 0.890]‡",
        "**0.780 [0.770, 0.790]**",
        "0.680 [0.670, 0.690]",
    ]
    assert table["a"]["top-k, test"] == "**0.920 [0.910, 0.930]**"
    assert "‡ This system was trained on some of the label sets of `held-out`" in render_markdown(board, Path())
    assert "‡" not in render_summary(board, "results")
    assert "‡ This system" in render_summary(board_of(*results, protocols=["held-out"]), "results")
    assert "‡" not in render_markdown(board_of(*results[1:]), Path())


def test_protocols_whose_conditions_differ_are_left_out_by_name_unless_asked_for():
    lists = ("test", "new_test", "all")
    results = [make_results(name, protocols=lists) for name in "ab"]
    changed(results[1], "protocols", "all", "sha256", to="0" * 64)
    board = board_of(*results)
    assert board.protocols == ("test", "new_test") and board.differing == ("all",)
    note = "Not shown, as their conditions differ from system to system: `all`."
    assert note in render_markdown(board, Path())
    with pytest.raises(ValueError, match="the conditions of the protocol all, asked for by `--protocols`"):
        board_of(*results, protocols=["all"])


def test_systems_of_other_labels_have_a_table_of_their_own():
    other = ["cone", "cylinder", "torus", "star"]
    mine = [make_results("a", 0.9), make_results("z", 0.8)]
    others = [
        make_results(name, top_k, labels=other, protocols=["crowded"], machine="Machine Y")
        for name, top_k in (("b", 0.7), ("c", 0.95))
    ]
    assert [system.name for system in board_of(*mine, *others).ranked] == ["a", "z"]  # as many: the first by name
    mine.append(make_results("y", 0.7))
    board = board_of(*others, *mine)
    assert [system.name for system in board.ranked] == ["a", "z", "y"]
    assert [[system.name for system in part.ranked] for part in board.others] == [["c", "b"]]
    assert [board.machines, board.others[0].machines] == [("Machine X, cpu, 1 thread",), ("Machine Y, cpu, 1 thread",)]
    markdown = render_markdown(board, Path())
    table = rows_of(markdown, "Systems of other labels: cone, cylinder, star, ... (4 labels)")
    assert list(table) == ["*real images, held out*", "c", "b"]
    assert table["b"]["top-k, crowded"] == "0.680 [0.670, 0.690]" and "top-k, test" not in table["b"]
    assert "[c](c/results.json)" in markdown
    rows = [tuple(row[:6]) for row in csv.reader(render_csv(board).splitlines())]
    assert len(set(rows)) == len(rows)
    assert ("c", "judge-a", "False", "crowded", "all", "top_k") in rows
    assert [system.name for system in board_of(*others, *mine, protocols=["test"]).others[0].ranked] == ["c", "b"]


def test_the_order_of_the_labels_makes_no_other_vocabulary():
    assert board_of(make_results("a"), make_results("b", labels=LABELS[::-1])).others == ()


def with_inception(results, fid):
    distances = {"generated": {"fid": fid, "kid": 0.0123}, "real": {"fid": 7.5, "kid": -0.001}}
    return changed(results, "distribution", "inception", to=distances)


def test_standard_fid_and_kid_have_columns_where_all_systems_have_them():
    one, other = with_inception(make_results("a"), 23.456), make_results("b")
    assert "| FID" not in render_markdown(board_of(one, other), Path())
    with_inception(other, 30)
    table = rows_of(render_markdown(board_of(one, other), Path()), "As judge-a sees it")
    assert [table["a"]["FID"], table["b"]["FID"], table["b"]["KID"]] == ["23.5", "30", "0.0123"]
    assert [table["*real images, held out*"][title] for title in ("FID", "KID")] == ["7.5", "-0.001"]
    board = board_of(make_results("a"), with_inception(without_labels(), 40))
    table = rows_of(render_markdown(board, Path()), "Systems that are not told what to draw")
    assert [table["unlabelled"]["FID"], table["*real images, held out*"]["FID"]] == ["40", "7.5"]
    assert ["unlabelled", "", "", "matched", "generated", "fid", "40", "", ""] in list(
        csv.reader(render_csv(board).splitlines())
    )


def test_what_a_file_says_ends_no_cell_and_is_no_formula():
    results = make_results("a|b $x$", machine="one|two $y$", protocols=("a|b",), labels=["$red|cube$"])
    changed(results, "settings", "options", to={"prompt": "first\nsecond|third"})
    board = board_of(results)
    markdown = render_markdown(board, Path())
    assert "| a\\|b \\$x\\$ | 0." in markdown and "| top-k, a\\|b |" in markdown.replace("system |", "|")
    assert "on: one\\|two \\$y\\$, cpu" in markdown
    assert "prompt first second\\|third" in markdown
    assert "[a\\|b \\$x\\$](a%7Cb%20%24x%24/results.json)" in markdown
    for figure in (plot_quality_against_speed(board), plot_labels(board)):
        figure.draw_without_rendering()
        texts = [text for text in figure.findobj(Text) if "$" in text.get_text()]
        assert texts and not any(text.get_parse_math() for text in texts)


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
    other["distribution"]["diversity"]["pixels"]["num_conditions"] = 41
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
    assert found["a", "", "", "", "diversity", "relative_diversity"] == ["0.875", "", ""]
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
    other["pipeline"]["label_names"] = results["pipeline"]["label_names"]  # it knows both, and was asked for one
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
        (("pipeline", "name"), 3, r"pipeline\.name must be a line of text, got 3"),
        (("pipeline", "name"), "two\nlines", r"pipeline\.name must be a line of text, got 'two\\nlines'"),
        (("pipeline", "label_names"), ["a\nb"], r"label_names must be a list of lines of text, or null, got"),
        (("pipeline", "trained_on_held_out"), "no", r"trained_on_held_out must be true or false, or null, got 'no'"),
        (("protocols", "test", "sha256"), None, r"protocols\.test\.sha256 must be a line of text, got None"),
        (("protocols", "test", "judges", "judge-a", "all"), {}, r"protocols\.test\.judges\.judge-a\.all\.top_k is missing"),
        (("protocols", "test", "judges", "judge-a", "all", "recall"), {"value": 1}, r"all\.recall must be `value`, `low`"),
        (("protocols", "test", "judges", "judge-a", "all", "recall"), estimate(float("nan")), r"all\.recall must .*nan"),
        (("protocols", "test", "judges", "judge-a", "all", "recall"), estimate(0.5, -0.1), r"all\.recall must be"),
        (("protocols", "test", "judges", "judge-a", "ceiling", "top_k"), -0.5, r"judge-a\.ceiling\.top_k must be a number from 0 to 1"),
        (("protocols", "a\nb"), {}, r"the names in protocols must be lines of text, got 'a\\nb'"),
        (("mean_of_test_and_new_test", "judge-a", "top_k"), estimate(1.5), r"mean_of_test_and_new_test\.judge-a\.top_k must be"),
        (("cost",), [], r"cost must be a mapping, got \[\]"),
        (("cost", "images_per_second"), 0, r"cost\.images_per_second must be a finite number above 0, got 0"),
        (("cost", "images_per_second"), float("inf"), r"cost\.images_per_second must be .* above 0, got inf"),
        (("cost", "images_per_second"), True, r"cost\.images_per_second must be .* above 0, got True"),
        (("cost", "seconds_for_one_image"), float("nan"), r"cost\.seconds_for_one_image must be .* above 0, got nan"),
        (("cost", "num_parameters"), -1, r"cost\.num_parameters must be a whole number of at least 0, got -1"),
        (("cost", "network_calls_per_image"), 10**400, r"cost\.network_calls_per_image must be a finite number"),
        (("cost", "machine"), None, r"cost\.machine must be a line of text, got None"),
        (("settings", "judges", "judge-a", "threshold"), "0", "threshold must be a finite number, got '0'"),
        (("distribution", "judges", "judge-a", "generated", "frechet_distance"), -1, "frechet_distance must be a finite number of at least 0"),
        (("distribution", "inception"), {"generated": {"fid": 3}}, r"distribution\.inception\.generated\.kid is missing"),
        (("held_out_images", "judges", "judge-a", "exact_match"), "all", r"held_out_images\.judges\.judge-a\.exact_match must be"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_of_this_form_is_refused_by_name(keys, value, message, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(make_results()))
    load_system(path)
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
        (("mean_of_test_and_new_test", "judge-a", "top_k"), dict.fromkeys(("value", "low", "high")), r"b/results.json is malformed: mean.*\.top_k must be"),
        (("protocols", "test", "resampled"), "conditions", "what the intervals of test draw again"),
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
    with pytest.raises(
        ValueError,
        match="of the same conditions, and share none: a/results.json has test; b/results.json has all, crowded",
    ):
        board_of(make_results("a", protocols=["test"]), make_results("b", protocols=["all", "crowded"]))


def test_why_protocols_of_one_name_do_not_count_is_said():
    results = [make_results(name, protocols=("seen", "matched")) for name in "ab"]
    changed(results[0], "protocols", "seen", "sha256", to="0" * 64)
    changed(results[1], "protocols", "matched", "quick", to=True)
    expected = "share none: .* Of what all have drawn, seen asks each for other label sets; matched ranks only where `--protocols` asks for it and was drawn too few times"
    with pytest.raises(ValueError, match=expected):
        board_of(*results)


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


def test_what_was_measured_otherwise_has_its_place_in_the_leaderboard(evaluations, tmp_path):
    def text():
        (text, *_) = Comparison(evaluations[:2], out=tmp_path).texts.values()
        return text

    assert "## Sampling time" not in text() and "baselines.md" not in text()
    (tmp_path / "baselines.md").write_text("")
    assert "Each beside what was reported of it: [the table](baselines.md)." in text()
    (tmp_path / "sampling.json").write_text("{}")
    with pytest.raises(ValueError, match="sampling.json must have schema_version 1"):
        text()


def test_other_protocols_make_other_pictures():
    systems = [System(Path("a", "results.json"), make_results("a"))]
    hashes = {make_leaderboard(systems, lists).inputs_sha256 for lists in (None, ["test"], ["new_test"])}
    assert len(hashes) == 3
    assert make_leaderboard(systems, ["test", "new_test"]).inputs_sha256 in hashes


def test_a_file_that_cannot_be_written_wholly_stays_as_it_was(evaluations, tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    before = readme.read_text()
    comparison = Comparison(evaluations[:2], out=tmp_path, readme=readme)
    comparison.pictures = {}  # texts alone

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        comparison.write()
    assert readme.read_text() == before
    monkeypatch.undo()
    comparison.write()
    assert readme.read_text() != before


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
    save_png(Image.new("RGB", (32, 16)), path.with_name("samples.png"), {"labels": [["red cube"], [3]]})
    with pytest.raises(ValueError, match="samples.png must be square images side by side"):
        open_samples(board)


def test_without_matplotlib_the_command_says_what_to_install(evaluations, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"iclevr-compare: .* pip install matplotlib"):
        main(evaluations)
    assert not (tmp_path / "out").exists()


def test_the_leaderboard_of_this_repository_is_what_its_results_give(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert Comparison(readme="README.md").stale_files() == [], "run iclevr-compare --readme README.md"

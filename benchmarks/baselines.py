"""Trains, exports and scores every system that was reported on i-CLEVR, and its cures, and writes the table.

    python benchmarks/baselines.py --out outputs/baselines --minutes 8
    python benchmarks/baselines.py --out outputs/baselines --minutes 8 --only dcgan sagan-evaluator
    python benchmarks/baselines.py --table

The rows are those of `baselines.yaml`. Each is trained by its script in a process of its own, for its whole recipe or
for `--minutes` of training, exported in half precision and scored by `iclevr-evaluate`; what is done is not done
again, what was stopped goes on where it was, and other judges or seeds score anew. A row that fails leaves the others
alone. In `--out` lie the runs, what they printed (`logs/`), the exported pipelines and their evaluations; what the table
is made of is copied to `--records`.
With `--table` nothing is run: the table is made of the records alone, and names the rows that are missing.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from iclevr_diffusion.files import write_text
from iclevr_diffusion.hub import export_pipeline, write_card
from iclevr_diffusion.leaderboard_reports import Row, load_records, make_run_record, read_rows, render_reports
from iclevr_diffusion.loading import DEFAULT_JUDGES, load_pipeline

REPOSITORY = Path(__file__).resolve().parents[1]
ROWS = Path(__file__).with_name("baselines.yaml")
RECORDS = Path(__file__).with_name("results") / "baselines"
JUDGE = "judge-resnet18-half"  # scores the table; none of the recipes has it for a teacher
PROTOCOLS = ("test", "new_test", "matched")
NUM_LINES = 15  # of what a failed process printed last


class Baselines:
    """The rows of the table, where their runs lie, and where their records go.

    Args:
        rows: The rows, by name.
        out: Folder of runs, logs, exported pipelines and evaluations.
        records: Folder of the records.
        minutes: Time that a row may train; None trains every recipe to its end.
        data: Folder of the images in the place of the one that the recipes name, for training and scores.
        device: Where everything runs, such as cpu; None takes the best there is.
        dtype: Type of the weights while they are scored.
        seeds: Images of each condition; None is what `iclevr-evaluate` takes by itself.
        judges: Judges that score.
        sampling_steps: Steps of DDIM with which those diffusion models are scored that would take more by themselves;
            None leaves them theirs.
    """

    def __init__(
        self,
        rows: Mapping[str, Row],
        out: Path,
        records: Path = RECORDS,
        *,
        minutes: float | None = None,
        data: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        seeds: int | None = None,
        judges: Sequence[str] = DEFAULT_JUDGES,
        sampling_steps: int | None = None,
    ) -> None:
        self.rows, self.out, self.records = rows, out, records
        self.minutes, self.data, self.device = minutes, data, device
        self.dtype, self.seeds, self.judges, self.sampling_steps = dtype, seeds, judges, sampling_steps

    def run(self, name: str) -> None:
        """Does what is not done of a row, and writes its record.

        Raises:
            ValueError: If a process fails, or the row was trained with other settings before.
        """
        row = self.rows[name]
        exported, scores = self.out / "pipelines" / name, self.out / "scores" / name
        self._check_settings(row)
        if not exported.is_dir():
            self._call(name, "training", self.training_command(row))
            run_folder = self.out / "runs" / name
            best = run_folder / "best_pipeline"
            weights = best if best.is_dir() else run_folder / "pipeline"
            export_pipeline(load_pipeline(weights), exported, facts=card_facts(row), training=run_folder)
        options = json.dumps(self._scoring_options(row))
        asked = scores.with_name(f"{name}.json")
        if not (scores / "results.json").is_file() or not asked.is_file() or asked.read_text() != options:
            self._call(name, "evaluation", self.evaluation_command(row))
            write_text(asked, options)
        self._write_record(row)

    def training_command(self, row: Row) -> list[str]:
        """Returns the command that trains a row, or goes on with it."""
        fields = {"output_dir": str(self.out / "runs" / row.name), **row.overrides}
        if self.minutes is not None:
            fields["max_minutes"] = self.minutes
        if self.data is not None:
            fields["data"] = self.data
        command = [sys.executable, str(REPOSITORY / "train_scripts" / row.script)]
        command += ["--config", str(REPOSITORY / "train_scripts" / "recipes" / f"{row.recipe}.yaml")]
        for name, value in fields.items():
            command += [f"--{name}", *(map(_word, value) if isinstance(value, list) else [_word(value)])]
        return command

    def evaluation_command(self, row: Row) -> list[str]:
        """Returns the command that scores a row's exported pipeline."""
        options = {
            "--pipeline": [str(self.out / "pipelines" / row.name)],
            "--out": [str(self.out / "scores" / row.name)],
            "--name": [row.name],
            "--device": [] if self.device is None else [self.device],
            **self._scoring_options(row),
        }
        command = [sys.executable, "-m", "iclevr_diffusion.evaluate"]
        return command + [word for name, words in options.items() if words for word in (name, *words)]

    def _scoring_options(self, row: Row) -> dict[str, list[str]]:
        """Returns the flags that the scores of a row's exported pipeline depend on."""
        has_real = bool(self.data or os.environ.get("ICLEVR_ROOT"))
        few = {}
        if self.sampling_steps is not None:
            index = json.loads((self.out / "pipelines" / row.name / "model_index.json").read_text(encoding="utf-8"))
            if index.get("default_num_inference_steps", 1) > self.sampling_steps:
                few = {"--num_inference_steps": [str(self.sampling_steps)], "--scheduler": ["DDIMScheduler"]}
        return few | {
            "--judges": list(self.judges),
            "--protocols": [name for name in PROTOCOLS if name != "matched" or has_real],
            "--data": [] if self.data is None else [self.data],
            "--dtype": [] if self.dtype is None else [self.dtype],
            "--seeds": [] if self.seeds is None else [str(self.seeds)],
        }

    def _check_settings(self, row: Row) -> None:
        """Refuses to go on with a run of other settings, and writes those of a new one down."""
        path = self.out / "runs" / f"{row.name}.json"
        settings = {
            "script": row.script,
            "recipe": row.recipe,
            "overrides": dict(row.overrides),
            "minutes": self.minutes,
            "data": self.data,
        }
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
        if differing := [key for key, value in settings.items() if before[key] != value]:
            key = differing[0]
            raise ValueError(
                f"`out` {self.out} holds a run of {row.name} with {key} {before[key]!r}, and now it is"
                f" {settings[key]!r}; take another folder, or delete {path} and the row's folders in {self.out}."
            )
        write_text(path, json.dumps(settings, indent=2) + "\n")

    def _call(self, name: str, what: str, command: Sequence[str]) -> None:
        """Runs a command to its end; what it prints goes to a log."""
        log = self.out / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if self.device == "cpu" else {})
        print(f"{name}: {what}; see {log}", flush=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            try:
                status = process.wait()
            except BaseException:  # a training that is told to stop writes a checkpoint first
                process.terminate()
                process.wait()
                raise
        if status != 0:
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-NUM_LINES:]
            raise ValueError(f"the {what} of {name} ended with status {status}:\n" + "\n".join(last))

    def _write_record(self, row: Row) -> None:
        """Copies what the table is made of, the results last, as they tell that the record is there."""
        exported, scores = self.out / "pipelines" / row.name, self.out / "scores" / row.name
        run_folder, record = self.out / "runs" / row.name, self.records / row.name
        write_card(exported, card_facts(row), results=scores / "results.json")
        training = json.loads((exported / "training.json").read_text(encoding="utf-8"))
        weights = "best_pipeline" if (run_folder / "best_pipeline").is_dir() else "pipeline"
        run = make_run_record(row, run_folder, weights=weights, training=training)
        write_text(record / "run.json", json.dumps(run, indent=2) + "\n")
        write_text(record / "card.yaml", yaml.safe_dump(card_facts(row), sort_keys=False))
        shutil.copyfile(exported / "training.json", record / "training.json")
        shutil.copyfile(scores / "samples.png", record / "samples.png")
        write_text(record / "results.json", (scores / "results.json").read_text(encoding="utf-8"))


def card_facts(row: Row) -> dict[str, Any]:
    """Returns the words of a row's model card."""
    changed = "".join(f", {name} {value}" for name, value in row.overrides.items())
    summary = f"{row.paper}, {row.kind}{changed}, on the real i-CLEVR images."
    if row.reported:
        scores = " and ".join(f"{value:.4f} on `{name}`" for name, value in row.reported.items())
        summary += f" Reported for it: {scores}."
    return {
        "title": row.name,
        "summary": f"{summary} {row.remark}".strip(),
        "recipe": f"train_scripts/recipes/{row.recipe}.yaml",
        "intended_use": "A baseline to compare other systems with.",
    }


def _word(value: Any) -> str:  # noqa: ANN401 -- any value of a recipe
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def make_table(rows: Mapping[str, Row], records: Path) -> str:
    """Makes the table of the records alone."""
    summary = (
        "Written by `python benchmarks/baselines.py --table` from the records in"
        f" [{records.name}]({records.name}); the rows are those of [baselines.yaml](../baselines.yaml)."
    )
    return render_reports(rows, load_records(rows, records), JUDGE, summary)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/baselines"), help="folder of everything that is run")
    parser.add_argument("--minutes", type=float, default=None, help="training time of a row; by default whole recipes")
    parser.add_argument("--only", nargs="+", metavar="ROW", default=None, help="rows to run; by default all")
    parser.add_argument("--table", action="store_true", help="run nothing, and write the table of the records")
    parser.add_argument("--data", default=None, help="folder of the real images; by default what the recipes name")
    parser.add_argument("--device", default=None, help="cpu, or cuda; by default the best there is")
    parser.add_argument("--dtype", default=None, help="type of the weights while they are scored, such as bfloat16")
    parser.add_argument("--seeds", type=int, default=None, help="images of each condition; by default 30")
    parser.add_argument("--judges", nargs="+", default=list(DEFAULT_JUDGES), help="folders or names of judges")
    parser.add_argument(
        "--sampling_steps",
        type=int,
        default=None,
        help="score diffusion models that take more steps with so many of DDIM; the table says so",
    )
    parser.add_argument("--rows", type=Path, default=ROWS, help="the list of rows")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of records; the table lies beside it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; what a user gave wrongly ends it with one line, a failed row with status 1 after the others."""
    signal.signal(signal.SIGTERM, _leave)
    args = parse_arguments(argv)
    failed = []
    try:
        rows = read_rows(args.rows)
        names = list(rows) if args.only is None else args.only
        if strangers := [name for name in names if name not in rows]:
            raise ValueError(f"`only` must name rows of {args.rows} ({', '.join(rows)}), got {', '.join(strangers)}.")
        settings = {
            name: getattr(args, name)
            for name in ("minutes", "data", "device", "dtype", "seeds", "judges", "sampling_steps")
        }
        baselines = Baselines(rows, args.out, args.records, **settings)
        for name in [] if args.table else names:
            try:
                baselines.run(name)
            except Exception as error:  # of whatever kind, it must not cost the other rows their night
                failed.append(name)
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        table = args.records.with_suffix(".md")
        write_text(table, make_table(rows, args.records))
    except (ValueError, OSError) as error:
        sys.exit(f"baselines: {error}")
    except KeyboardInterrupt:
        sys.exit("baselines: interrupted; the same command goes on.")
    print(f"Written to {table}")
    if failed:
        sys.exit(f"baselines: {', '.join(failed)} failed; the same command tries again.")


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()

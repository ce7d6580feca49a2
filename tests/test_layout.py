import ast
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "iclevr_diffusion"
ANY = {"*"}

# Which modules of the package each module may import. A folder stands for all its files, which may import each other.
ARROWS = {
    "": {"labels", "loading", "models", "pipelines", "hub"},  # the package itself: its public names
    "pipelines": set(),
    "models": set(),
    "labels": {"pipelines.label_vocabulary"},
    "data": {"files", "labels"},
    "rendering": {"environment", "labels"},
    "augmentation": set(),
    "checkpoint": set(),
    "config": set(),
    "diffusion": set(),
    "ema": set(),
    "images": set(),
    "scores": set(),
    "score_tables": {"scores"},
    "environment": set(),
    "files": set(),
    "conversion": {"labels", "models"},
    "flow_solver": set(),
    "first_weights": {"files", "loading"},
    "training": {"checkpoint", "config", "environment", "files", "first_weights", "provenance"},
    "training_data": {"config", "data", "protocols", "rendering", "training"},
    "protocols": {"data", "labels"},
    "judging": {"conversion", "data", "images", "loading", "models", "scores"},
    "validation": {"distribution", "files", "images", "judging", "scores", "training", "training_data"},
    "distribution": set(),
    "inception": {"distribution"},
    "reference": {"data", "distribution", "images", "inception", "judging", "scores"},
    "call_options": set(),
    "losses": set(),
    "drawings": {"images"},
    "cost": set(),
    "pictures": {"", "call_options", "images"},
    "gan_networks": {"config", "models", "training_data"},
    "denoiser": {"config", "flow_solver", "models", "training_data"},
    "distillation": {"flow_solver", "labels", "models", "pipelines"},
    "domains": {"data", "training", "training_data"},
    "lift": {"diffusion", "pipelines"},
    "evaluation": {
        "",
        "call_options",
        "cost",
        "data",
        "drawings",
        "environment",
        "files",
        "images",
        "inception",
        "judging",
        "lift",
        "protocols",
        "reference",
        "scores",
    },
    "leaderboard": set(),
    "leaderboard_tables": {"leaderboard"},
    "leaderboard_asides": {"leaderboard", "leaderboard_tables"},
    "leaderboard_plots": {"leaderboard"},
    "leaderboard_reports": {"leaderboard", "leaderboard_tables"},
    "leaderboard_sampling": {"leaderboard_tables"},
    "card": {"files"},
    "loading": {"files", "models", "onnx_backend", "pipelines"},
    "provenance": {"files", "loading"},
    "hub": {"card", "files", "judging", "loading", "models", "pipelines", "provenance"},
    "onnx_backend": {"", "files", "judging", "pipelines"},
    "command_line": {"environment", "flow_solver", "loading"},
    "inspection": {"data", "images"},
    "digit_pairs": {"data", "files"},
    "compare": ANY,
    "evaluate": ANY,
    "inspect_data": ANY,
    "render": ANY,
    "picture": ANY,
    "sample": ANY,
}

# The files that are published beside a model's weights: what they import, a stranger must have.
PUBLISHED_FOLDERS = ("models", "pipelines")
STRANGERS_PACKAGES = {"PIL", "diffusers", "numpy", "safetensors", "torch", "transformers"}


def module_name(path: Path) -> str:
    """`data.store` for iclevr_diffusion/data/store.py, `data` for its `__init__.py`, an empty name for the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def absolute_imports(source: str, module: str = "", is_package: bool = False) -> Iterator[str]:
    """Every imported name of `source` with all its dots, wherever in the file the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                here = ["iclevr_diffusion", *filter(None, module.split("."))]
                here = here[: len(here) - node.level + is_package]
                origin = ".".join([*here, *filter(None, [origin])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def imports_of_ours(source: str, module: str, is_package: bool = False) -> set[str]:
    """The modules of the package that `source` imports, without the names that it takes from them."""
    imported = set()
    for name in absolute_imports(source, module, is_package):
        root, *parts = name.split(".")
        if root == "iclevr_diffusion":
            while parts and not (
                PACKAGE.joinpath(*parts).is_dir() or PACKAGE.joinpath(*parts).with_suffix(".py").is_file()
            ):
                parts.pop()
            imported.add(".".join(parts))
    return imported


def unlisted_arrows(source: str, module: str, is_package: bool = False) -> set[str]:
    noun = module.split(".")[0]
    if noun not in ARROWS:
        raise KeyError(f"{module} is a new module: say in ARROWS what it may import")
    if ARROWS[noun] == ANY:
        return set()
    allowed = ARROWS[noun] | ({noun} if noun not in ("", *PUBLISHED_FOLDERS) else set())
    return {
        imported
        for imported in imports_of_ours(source, module, is_package)
        if imported not in allowed and imported.split(".")[0] not in allowed - {""}
    }


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


@pytest.mark.parametrize("path", python_files("iclevr_diffusion"), ids=module_name)
def test_a_module_imports_only_what_the_table_lists(path):
    module, is_package = module_name(path), path.name == "__init__.py"
    source = path.read_text(encoding="utf-8")
    if module.startswith("pipelines."):  # published side by side in one folder, without the package around them
        source = "\n".join(
            line
            for line in source.splitlines()
            if not re.match(r"from \.(label_vocabulary|labelled_pipeline|latent_pipeline|composition) import ", line)
        )
    assert unlisted_arrows(source, module, is_package) == set()


@pytest.mark.parametrize(
    ("module", "line", "unlisted"),
    [
        ("models.made_up", "from iclevr_diffusion.labels import ICLEVR_LABELS", {"labels"}),
        ("models.made_up", "from ..labels import ICLEVR_LABELS", {"labels"}),
        ("models.made_up", "from . import classifier", {"models.classifier"}),
        (
            "pipelines.made_up",
            "from iclevr_diffusion.pipelines import label_vocabulary",
            {"pipelines.label_vocabulary"},
        ),
        ("labels", "from .hub import load_pipeline", {"hub"}),
        (
            "labels",
            "from iclevr_diffusion.pipelines.pipeline_conditional_ddpm import x",
            {"pipelines.pipeline_conditional_ddpm"},
        ),
        ("labels", "def late():\n    import iclevr_diffusion.data.store", {"data.store"}),
        ("data.made_up", "from iclevr_diffusion import LabelVocabulary", {""}),
        ("data.made_up", "from iclevr_diffusion.data.store import ImageStore", set()),
        ("labels", "from iclevr_diffusion.pipelines.label_vocabulary import LabelVocabulary", set()),
        ("sample", "from iclevr_diffusion.hub import load_pipeline", set()),
    ],
)
def test_an_arrow_that_the_table_lacks_is_found(module, line, unlisted):
    assert unlisted_arrows(line, module) == unlisted


def test_a_module_that_the_table_lacks_is_found():
    with pytest.raises(KeyError, match="made_up is a new module"):
        unlisted_arrows("import torch", "made_up")


def test_the_table_lists_only_modules_that_exist():
    modules = {module_name(path).split(".")[0] for path in python_files("iclevr_diffusion")}
    assert set(ARROWS) <= modules


@pytest.mark.parametrize(
    "path", python_files(*(f"iclevr_diffusion/{name}" for name in PUBLISHED_FOLDERS)), ids=module_name
)
def test_published_code_imports_only_what_a_stranger_has(path):
    names = {name.split(".")[0] for name in absolute_imports(path.read_text(encoding="utf-8"), module_name(path))}
    assert names - sys.stdlib_module_names - {"iclevr_diffusion"} <= STRANGERS_PACKAGES


def test_nothing_imports_the_train_scripts():
    scripts = {path.stem for path in python_files("train_scripts")} | {"train_scripts"}
    for path in python_files("iclevr_diffusion", "train_scripts", "benchmarks", "tests"):
        roots = {name.split(".")[0] for name in absolute_imports(path.read_text(encoding="utf-8"))}
        assert not roots & scripts, path


def test_code_in_published_folders_is_a_copy_of_the_package():
    sources = {path.read_bytes() for path in python_files(*(f"iclevr_diffusion/{name}" for name in PUBLISHED_FOLDERS))}
    changed = [
        str(path.relative_to(REPOSITORY)) for path in python_files("pipelines") if path.read_bytes() not in sources
    ]
    assert not changed, "export these folders again, with export_pipeline"


def recipes() -> list[Path]:
    return sorted((REPOSITORY / "train_scripts").rglob("*.yaml"))


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.stem)
def test_a_recipe_is_a_mapping_that_begins_with_a_comment(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    recipe = yaml.safe_load(text)
    assert isinstance(recipe, dict)
    assert all(isinstance(key, str) for key in recipe)


def commands_of(markdown: str) -> list[list[str]]:
    """The shell commands in the code blocks of a text, as lists of words from the program's own name on."""
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)
    commands = []
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        for start, word in enumerate(words):
            if re.fullmatch(r"make|iclevr-[a-z]+|(train_scripts|benchmarks)/\w+\.py", word):
                commands.append(words[start:])
                break
    return commands


@pytest.fixture
def help_of(monkeypatch, capsys):
    """Asks a program of this project for its `--help`, in this process because importing torch anew takes seconds."""
    programs = {entry.name: entry for entry in entry_points(group="console_scripts")}

    def help_of(program: str) -> str:
        monkeypatch.setattr(sys, "argv", [program, "--help"])
        with pytest.raises(SystemExit) as end:
            if program.endswith(".py"):
                runpy.run_path(str(REPOSITORY / program), run_name="__main__")
            else:
                import_module(programs[program].module)
                programs[program].load()()
        assert end.value.code in (0, None)
        return capsys.readouterr().out

    return help_of


def unknown_flags(command: list[str], help_text: str) -> set[str]:
    flags = {word.split("=")[0] for word in command[1:] if word.startswith("--")}
    return flags - set(re.findall(r"--[a-zA-Z][\w-]*", help_text))


def test_commands_are_found_in_a_text():
    text = "```bash\n$ accelerate launch --cpu train_scripts/a.py --config x \\\n  --lr=1 # --no\niclevr-sample 'a b' --seed 1\n```\n`make x`\n```python\nmake = 1\n```"
    assert commands_of(text) == [
        ["train_scripts/a.py", "--config", "x", "--lr=1"],
        ["iclevr-sample", "a b", "--seed", "1"],
    ]
    assert unknown_flags(["x", "--seed", "--lr=1", "--made_up", "3"], "usage: x [--seed SEED] --lr LR") == {
        "--made_up"
    }


TEXTS = ["README.md", ".github/CONTRIBUTING.md", "pipelines/**/*.md", "model_cards/*.md"]


@pytest.mark.parametrize("text", sorted(path for pattern in TEXTS for path in REPOSITORY.glob(pattern)), ids=str)
def test_every_flag_in_a_text_is_one_that_the_command_knows(text, help_of):
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for program, *arguments in commands_of(text.read_text(encoding="utf-8")):
        if program == "make":
            assert {word for word in arguments if "=" not in word} <= set(targets)
        else:
            assert unknown_flags([program, *arguments], help_of(program)) == set(), program


def test_no_file_names_a_folder_of_its_author():
    home = re.compile(r"(?<![\w.-])/(?:home/(?!me/)|root/|Users/|work/)\w")
    folders = (
        "iclevr_diffusion",
        "train_scripts",
        "pipelines",
        "model_cards",
        "benchmarks",
        "tests",
        ".ci",
        ".github",
    )
    files = [*REPOSITORY.glob("*"), *(path for folder in folders for path in (REPOSITORY / folder).rglob("*"))]
    for path in files:
        if path.is_file() and path.suffix not in (".gif", ".png", ".pyc", ".safetensors"):
            assert not home.search(path.read_text(encoding="utf-8")), path

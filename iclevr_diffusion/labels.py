import json
from pathlib import Path

from iclevr_diffusion.pipelines.label_vocabulary import LabelVocabulary

ASSETS = Path(__file__).parent / "assets"

# i-CLEVR: 8 colours times cube, sphere and cylinder.
ICLEVR_LABELS = LabelVocabulary.from_json(ASSETS / "objects.json")


def read_label_lists(path: str | Path, vocabulary: LabelVocabulary = ICLEVR_LABELS) -> list[list[str]]:
    """Reads lists of labels to draw, in the form of i-CLEVR's `test.json`: `[["red cube"], ["blue cube", ...], ...]`.

    Args:
        path: The file, or one of the packaged lists by name: `test`, `new_test`.
        vocabulary: The labels that may occur.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no such list, or names a label that `vocabulary` does not hold.
    """
    path = ASSETS / f"{path}.json" if str(path) in ("test", "new_test") else Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} must be a JSON file with lists of labels, or `test` or `new_test`; there is none."
        )
    try:
        label_lists = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the JSON or of its encoding
        raise ValueError(f"{path} must be JSON in UTF-8: {error}.") from error
    if not isinstance(label_lists, list) or not label_lists:
        raise ValueError(f'{path} must hold a list of label lists such as [["red cube"], ["gray cube"]].')
    try:
        vocabulary.encode(label_lists)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return [[vocabulary.names[vocabulary.index(label)] for label in labels] for labels in label_lists]

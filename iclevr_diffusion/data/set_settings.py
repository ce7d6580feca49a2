import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from iclevr_diffusion.labels import LabelVocabulary


@dataclass(frozen=True, kw_only=True)
class SetSettings:
    """How someone's images are read, where it does not go without saying; a YAML file of these keys says it.

    A file, and not flags, as training, judging and evaluation must all read the set alike.

    Args:
        images: The folder, relative to the YAML file, or `hub:user/name`.
        label_column: The column of what an image shows. By default `labels`, `label`, or the only one that is left.
        label_separator: What stands between the labels in a cell of text; `None` makes it one label.
        image_column: The column of the image files' names, or of the images. By default `file_name`, or the only one
            that holds images.
        scene_column: A column whose images of one value must fall into one split, such as those of one scene. By
            default `scene`, where there is one.
        split_column: A column that says train, validation or held-out (or test). By default `split`, where there is one.
        vocabulary: A JSON file, relative to the YAML file, with the labels in their order. By default those that occur,
            sorted.
        center_crop: Whether the largest square in an image's middle is taken; otherwise it is resized directly.
        channels: 1 for grey, 3 for RGB, 4 for RGBA. By default 1 if all images are grey, 4 if all have alpha, else 3.
        config: Name of the configuration of a set of the Hub.
    """

    images: str
    label_column: str | None = None
    label_separator: str | None = ","
    image_column: str | None = None
    scene_column: str | None = None
    split_column: str | None = None
    vocabulary: str | None = None
    center_crop: bool = False
    channels: int | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "center_crop":
                if not isinstance(value, bool):
                    raise ValueError(f"`center_crop` must be true or false, got {value!r}.")
            elif field.name == "channels":
                if value is not None and (isinstance(value, bool) or value not in (1, 3, 4)):
                    raise ValueError(f"`channels` must be 1, 3 or 4, got {value!r}; leave it out to have it found.")
            elif not (value is None and field.name != "images" or isinstance(value, str) and value):
                raise ValueError(f"`{field.name}` must be text, got {value!r}; put quotes around it.")

    @classmethod
    def read(cls, path: Path) -> "SetSettings":
        """Reads a YAML file; its paths become relative to where the process runs.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no such file.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"`{path}` does not exist; expected a YAML file with the key `images`.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"`{path}` must be a YAML file of keys and values: {error}") from None
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict) or "images" not in values:
            raise ValueError(
                f"`{path}` must hold the key `images`, a folder or hub:user/name, such as `images: photos`; the others"
                f" are {', '.join(known[1:])}."
            )
        for key in values:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
                raise ValueError(f"`{path}`: unknown key {key!r}.{hint} The known ones are {', '.join(known)}.")
        if values.get("label_separator") == "none":
            values["label_separator"] = None
        try:
            settings = cls(**values)
        except ValueError as error:
            raise ValueError(f"`{path}`: {error}") from None
        paths = {"vocabulary": settings.vocabulary}
        if not settings.images.startswith("hub:"):
            paths["images"] = settings.images
        places = {name: str(path.parent / value) for name, value in paths.items() if value is not None}
        return dataclasses.replace(settings, **places)

    def read_vocabulary(self) -> LabelVocabulary | None:
        """Reads the file of `vocabulary`, a list of names or the form of `objects.json`; `None` where none is named."""
        if self.vocabulary is None:
            return None
        path = Path(self.vocabulary)
        if not path.is_file():
            raise FileNotFoundError(
                f"`vocabulary` must name a JSON file of labels, got `{path}`, which does not exist."
            )
        try:
            names = json.loads(path.read_text(encoding="utf-8"))
            return LabelVocabulary(names) if isinstance(names, list) else LabelVocabulary.from_json(path)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`{path}`: {error}") from None

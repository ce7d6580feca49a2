import dataclasses
from pathlib import Path

from iclevr_diffusion.data.digits import load_digits, load_mnist
from iclevr_diffusion.data.folder import IMAGE_FOLDER, IclevrFolder
from iclevr_diffusion.data.hub_set import PREFIX, HubSet
from iclevr_diffusion.data.image_table import ImageTable
from iclevr_diffusion.data.labelled_images import LabelledImages
from iclevr_diffusion.data.metadata_file import SUFFIXES
from iclevr_diffusion.data.metadata_folder import MetadataFolder, find_metadata
from iclevr_diffusion.data.parquet_folder import ParquetFolder, find_parquet
from iclevr_diffusion.data.set_settings import SetSettings
from iclevr_diffusion.data.source import ImageSource
from iclevr_diffusion.labels import LabelVocabulary

# Sources that have a name instead of a folder.
NAMED_SOURCES = {"digits": load_digits, "mnist": load_mnist}


def open_source(
    source: str | Path | None, vocabulary: LabelVocabulary | None = None, *, skip_faults: bool = False
) -> ImageSource:
    """Opens labelled images by where they lie; the images themselves are not read yet.

    Args:
        source: One of
            - a folder in the course's layout, see `IclevrFolder`; `None` or `"ICLEVR_ROOT"` takes that variable's;
            - a folder of images with metadata.jsonl, .csv or .parquet, see `MetadataFolder`;
            - a folder of Parquet files with the images inside, see `ParquetFolder`;
            - `"hub:user/name"` or `"hub:user/name@revision"`, see `HubSet`;
            - a YAML file that names one of the last three, and how it is read, see `SetSettings`;
            - `"digits"`, those of scikit-learn, or `"mnist"`, of the Hub (a folder of that name is `"./digits"`).
        vocabulary: Label names and their indices, by default those of the source.
        skip_faults: Whether rows of someone's own table that are wrong are left out and noted, as `LabelledImages` does;
            otherwise the set is refused.

    Raises:
        FileNotFoundError: If there is nothing in that place.
        ValueError: If the source is not what it should be.
    """
    if isinstance(source, str) and source in NAMED_SOURCES:
        return NAMED_SOURCES[source](vocabulary)
    if source is None or source == "ICLEVR_ROOT":
        return IclevrFolder(None, vocabulary)
    settings = SetSettings(images=str(source))
    if Path(source).suffix in (".yaml", ".yml") and not Path(source).is_dir():
        settings = SetSettings.read(Path(source))
    if settings.images.startswith(PREFIX):
        table = HubSet(settings.images, settings.image_column, settings.config)
        return LabelledImages(table, settings, vocabulary, skip_faults=skip_faults)
    root = Path(settings.images)
    if settings.config is not None:
        raise ValueError(f"`config` must be left out for a folder, got {settings.config} for `{root}`.")
    has_table = any((root / f"metadata{suffix}").is_file() for suffix in SUFFIXES)
    if not has_table and ((root / "train.json").exists() or (root / IMAGE_FOLDER).is_dir()):
        given = [
            field.name for field in dataclasses.fields(settings) if getattr(settings, field.name) != field.default
        ]
        if given != ["images"]:
            raise ValueError(
                f"`{root}` is in i-CLEVR's layout, which has no settings, got {', '.join(given[1:])}; give the folder."
            )
        return IclevrFolder(root, vocabulary)
    table = _open_table(root, settings.image_column)
    return LabelledImages(table, settings, vocabulary, skip_faults=skip_faults)


def _open_table(root: Path, image_column: str | None) -> ImageTable:
    if root.is_dir():
        if find_metadata(root):
            return MetadataFolder(root) if image_column is None else MetadataFolder(root, image_column)
        if find_parquet(root):
            return ParquetFolder(root, image_column)
    raise FileNotFoundError(
        f"`{root}` {'holds no labelled images' if root.is_dir() else 'is not a folder'}; expected a folder with"
        " metadata.jsonl, .csv or .parquet (columns `file_name` and `labels`) beside the images, one of Parquet files with"
        f" images inside, one with objects.json, train.json and {IMAGE_FOLDER}/, a YAML file that names one of them, or"
        f" {PREFIX}user/name."
    )

from iclevr_diffusion.data.batches import BatchLoader, normalize
from iclevr_diffusion.data.builder import IclevrBuilder, export_parquet
from iclevr_diffusion.data.digits import DigitImages, load_digits, load_mnist
from iclevr_diffusion.data.folder import IclevrFolder
from iclevr_diffusion.data.image_set import ImageSet
from iclevr_diffusion.data.labelled_images import LabelledImages
from iclevr_diffusion.data.opening import open_source
from iclevr_diffusion.data.source import ImageSource
from iclevr_diffusion.data.split import SPLITS, scene_of_file, split_of_scene
from iclevr_diffusion.data.store import ImageStore, open_store
from iclevr_diffusion.data.streaming import StreamedImages

__all__ = [
    "SPLITS",
    "BatchLoader",
    "DigitImages",
    "IclevrBuilder",
    "IclevrFolder",
    "ImageSet",
    "ImageSource",
    "ImageStore",
    "LabelledImages",
    "StreamedImages",
    "export_parquet",
    "load_digits",
    "load_mnist",
    "normalize",
    "open_source",
    "open_store",
    "scene_of_file",
    "split_of_scene",
]

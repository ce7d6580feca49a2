"""Multi-label conditional image generation on the Hugging Face stack."""

# Every component class is imported here, eagerly: diffusers loads a saved folder only if its classes already are.
from iclevr_diffusion.labels import ICLEVR_LABELS, LabelVocabulary, read_label_lists
from iclevr_diffusion.models.unet_multilabel import MultiLabelUNet2DModel
from iclevr_diffusion.pipelines.pipeline_conditional_ddpm import ConditionalDDPMPipeline

__version__ = "0.1.0"

__all__ = [
    "ICLEVR_LABELS",
    "ConditionalDDPMPipeline",
    "LabelVocabulary",
    "MultiLabelUNet2DModel",
    "read_label_lists",
]

"""Multi-label conditional image generation on the Hugging Face stack."""

__version__ = "0.1.0"

# Every component class is imported here, eagerly: diffusers loads a saved folder only if its classes already are.
from iclevr_diffusion.hub import export_pipeline, push_to_hub
from iclevr_diffusion.labels import ICLEVR_LABELS, LabelVocabulary, read_label_lists
from iclevr_diffusion.loading import load_pipeline
from iclevr_diffusion.models.cgan import CGANEmbeddingGenerator, CGANGenerator
from iclevr_diffusion.models.classifier import LabelClassifier
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier
from iclevr_diffusion.models.cyclegan import CycleGANGenerator
from iclevr_diffusion.models.dcgan import DCGANGenerator
from iclevr_diffusion.models.sagan import SAGANGenerator
from iclevr_diffusion.models.unet_multilabel import MultiLabelUNet2DModel
from iclevr_diffusion.models.unet_small import SmallMultiLabelUNet
from iclevr_diffusion.models.vae_multilabel import MultiLabelVAE
from iclevr_diffusion.pipelines.composition import Condition
from iclevr_diffusion.pipelines.labelled_pipeline import ConditionalImageOutput
from iclevr_diffusion.pipelines.pipeline_conditional_ddpm import ConditionalDDPMPipeline
from iclevr_diffusion.pipelines.pipeline_conditional_gan import ConditionalGANPipeline
from iclevr_diffusion.pipelines.pipeline_conditional_vae import ConditionalVAEPipeline
from iclevr_diffusion.pipelines.pipeline_cyclegan import CycleGANPipeline

__all__ = [
    "ICLEVR_LABELS",
    "CGANEmbeddingGenerator",
    "CGANGenerator",
    "Condition",
    "ConditionalDDPMPipeline",
    "ConditionalGANPipeline",
    "ConditionalImageOutput",
    "ConditionalVAEPipeline",
    "CycleGANGenerator",
    "CycleGANPipeline",
    "DCGANGenerator",
    "LabelClassifier",
    "LabelVocabulary",
    "MultiLabelUNet2DModel",
    "MultiLabelVAE",
    "SAGANGenerator",
    "SmallLabelClassifier",
    "SmallMultiLabelUNet",
    "export_pipeline",
    "load_pipeline",
    "push_to_hub",
    "read_label_lists",
]

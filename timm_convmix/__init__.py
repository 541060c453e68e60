"""ConvMix twins of timm's architectures: importing this package registers ``convmix_<arch>`` with timm.

``timm.create_model('convmix_resnet50', pretrained=True)`` then works wherever timm is used.
"""

from timm_convmix.convmix import list_weights
from timm_convmix.errors import (
    ChecksumError,
    ConvMixError,
    DatasetError,
    ExportError,
    ExtraError,
    FeatureError,
    HubError,
    InputError,
    ManifestError,
    MixerError,
    PackingError,
    StageError,
    WeightsError,
)
from timm_convmix.mixers import MIXERS, Mixer
from timm_convmix.model import ConvMixNet
from timm_convmix.prediction import predict
from timm_convmix.version import __version__

__all__ = [
    "MIXERS",
    "ChecksumError",
    "ConvMixError",
    "ConvMixNet",
    "DatasetError",
    "ExportError",
    "ExtraError",
    "FeatureError",
    "HubError",
    "InputError",
    "ManifestError",
    "Mixer",
    "MixerError",
    "PackingError",
    "StageError",
    "WeightsError",
    "__version__",
    "list_weights",
    "predict",
]

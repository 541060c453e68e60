"""Every error that timm_convmix raises on purpose, in one tree.

ConvMixError
├── StageError      (ValueError)    the backbone has no such stage, or too few stages
├── MixerError      (ValueError)    no mixer of that name
├── InputError      (ValueError)    an image batch that does not fit the model
├── FeatureError    (ValueError)    a way of extracting features that is not supported
├── WeightsError    (RuntimeError)  weights that are unreadable, absent, or of another architecture
│   └── ChecksumError               weights whose bytes are not those that were recorded
├── ManifestError   (ValueError)    a weights_manifest.json, or an entry, that is not as it must be
├── PackingError    (RuntimeError)  a trained model that cannot be packed, or did not prove itself
├── ExportError     (RuntimeError)  a model that cannot be exported, or whose file does not compute the same
├── HubError        (OSError)       weights that could not be fetched or published
├── DatasetError    (OSError)       a data set that could not be fetched, or is not the official one
└── ExtraError      (ImportError)   an optional dependency that is not installed

Each is also the builtin that a caller would catch without knowing this package.
"""


class ConvMixError(Exception):
    """Root of every error raised here on purpose."""


class StageError(ConvMixError, ValueError):
    """The backbone has no such stage, or too few stages to mix."""


class MixerError(ConvMixError, ValueError):
    """There is no mixer of that name."""


class InputError(ConvMixError, ValueError):
    """The image batch does not fit the model."""


class FeatureError(ConvMixError, ValueError):
    """Features were asked for in a way that is not supported."""


class WeightsError(ConvMixError, RuntimeError):
    """The weights are unreadable, absent, or belong to another architecture."""


class ChecksumError(WeightsError):
    """The bytes of a weight file are not those that were recorded; nothing of it was loaded."""


class ManifestError(ConvMixError, ValueError):
    """A weights_manifest.json, or an entry of it, is not as it must be."""


class PackingError(ConvMixError, RuntimeError):
    """A trained model cannot be packed, or did not prove itself when it was reloaded."""


class ExportError(ConvMixError, RuntimeError):
    """A model cannot be exported, or the file that was written does not compute the same."""


class HubError(ConvMixError, OSError):
    """The weights could not be fetched or published."""


class DatasetError(ConvMixError, OSError):
    """A data set could not be fetched, is not the official one, or cannot go where it was to go."""


class ExtraError(ConvMixError, ImportError):
    """An optional dependency is not installed."""

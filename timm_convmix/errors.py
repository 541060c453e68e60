"""Every error that timm_convmix raises on purpose, in one tree.

ConvMixError
├── StageError      (ValueError)    the backbone has no such stage, or too few stages
├── MixerError      (ValueError)    no mixer of that name
├── InputError      (ValueError)    an image batch that does not fit the model
├── FeatureError    (ValueError)    a way of extracting features that is not supported
├── WeightsError    (RuntimeError)  weights that are unreadable, absent, or of another architecture
└── HubError        (OSError)       weights that could not be fetched

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


class HubError(ConvMixError, OSError):
    """The weights could not be fetched."""

"""The exceptions that this package raises where a model, a cache or a library version cannot be used."""


class UnsupportedModelError(ValueError):
    """The model has no decoder stack that multimodal tokens could enter late, or one not handled yet."""


class UnsupportedCacheError(TypeError):
    """The cache in use cannot hold layers of different lengths."""


class UntriedVersionError(RuntimeError):
    """The installed versions of transformers and torch do not give the right numbers."""

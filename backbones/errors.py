"""Exceptions that are raised where a model, a KV cache or a library version cannot be used."""


class UnsupportedModelError(ValueError):
    """The model has no decoder stack that multimodal tokens can enter late, or one not supported yet."""


class UnsupportedCacheError(TypeError):
    """The KV cache in use cannot hold decoder layers of different lengths."""


class UntriedVersionError(RuntimeError):
    """The installed versions of transformers and torch were not tested before, and give wrong numbers."""

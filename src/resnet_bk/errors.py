"""The exceptions this library raises on purpose.

Every message names the field, the value found, the value expected and the remedy. The command line prints
the message of any `ResNetBKError` on one line and exits with status 2; any other exception is a bug.
"""


class ResNetBKError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(ResNetBKError, ValueError):
    """A configuration field has an unknown name, a wrong type or a value outside its domain."""


class ShapeError(ResNetBKError, ValueError):
    """Tensors whose shapes or dtypes do not fit together."""


class DomainError(ResNetBKError, ValueError):
    """A value outside the domain of an operator: absorption <= 0, NaN, a token id beyond the vocabulary."""


class InstabilityError(DomainError):
    """A training step that must not be taken: something is not finite, or far from what the run showed before."""


class RecoveryError(ResNetBKError, RuntimeError):
    """A run that stayed unstable after every allowed try to recover; the message says what was tried."""


class DataError(ResNetBKError, ValueError):
    """A corpus, prompt or tokenizer file that cannot be used; the message locates the fault."""


class CheckpointError(ResNetBKError, ValueError):
    """A checkpoint folder that is missing, truncated or does not fit the model."""


class BackendError(ResNetBKError, RuntimeError):
    """A backend was asked for by name and cannot run here."""


class MemoryLimitError(ResNetBKError, MemoryError):
    """The request needs more memory than this machine has; the message says how much and what to lower."""


class MissingDependencyError(ResNetBKError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""

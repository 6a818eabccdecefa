"""Exceptions of fastres: one base class, each also the built-in that callers already catch."""


class FastresError(Exception):
    """Base class of every error that fastres raises on purpose."""


class UnknownModelError(FastresError, ValueError):
    """A model name that is not in the table of variants."""


class CheckpointError(FastresError, RuntimeError):
    """A checkpoint that cannot be read, or that does not fit the model."""


class WeightsError(FastresError, RuntimeError):
    """Pretrained weights that cannot be fetched or whose hash is wrong."""


class FoldError(FastresError, ValueError):
    """Batch-norm statistics or parameters that cannot be folded, e.g. a negative variance."""


class VerificationError(FastresError, RuntimeError):
    """An optimised model whose answers differ too much from its source's."""


class QuantizationError(FastresError, RuntimeError):
    """A network that 8 bits cannot compute, or whose answers they change too often."""


class FrozenError(FastresError, AttributeError):
    """An attribute that cannot be set on a fused copy, because its plan is made."""


class BackendError(FastresError, RuntimeError):
    """A backend that this machine cannot run, e.g. Triton without a GPU."""


class MissingDependencyError(FastresError, ImportError):
    """An optional package that a feature needs and that is not installed."""


class InputError(FastresError, ValueError, RuntimeError):
    """An input that the model cannot take: rank, channels, size or device."""


class InputTypeError(FastresError, TypeError, RuntimeError):
    """An input of the wrong type or dtype."""


class TrainingError(FastresError, RuntimeError):
    """A training run that cannot go on: its loss is no finite number."""


def one_line(error: Exception) -> str:
    """The type of an exception and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"

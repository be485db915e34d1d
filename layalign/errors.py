"""The errors layalign raises. Each is also the builtin a caller would expect to catch."""


class LayAlignError(Exception):
    """Base of every error raised by layalign; its text is one line that names the argument and what was expected."""


class ArgumentError(LayAlignError, ValueError):
    """An argument has the wrong shape, dtype, device or value."""


class DataError(LayAlignError, ValueError):
    """A data file cannot be used; the text starts with `file:line` where one is to blame."""


class BackendError(LayAlignError, RuntimeError):
    """An explicitly requested backend cannot serve the call; the text gives the reason."""


class CheckpointError(LayAlignError, ValueError):
    """A checkpoint is missing, foreign, or does not fit the model."""


class OutputError(LayAlignError, OSError):
    """Something cannot be written (disk full, no permission); the text says what is left on the disk."""


class NonFiniteError(LayAlignError, ArithmeticError):
    """A loss or a gradient is NaN or infinite; the text names the step and the tensor."""

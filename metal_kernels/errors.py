"""The two ways a kernel call can fail."""


class KernelError(RuntimeError):
    """A kernel that was asked for cannot run here; the text says why and what can."""


class ShapeError(ValueError):
    """Arguments whose shapes, widths or dtypes do not fit together; the text gives what came and what fits."""

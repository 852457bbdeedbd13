"""Every failure that a user can cause or meet, each with a message that says what to do next."""

import errno

DISK_ERRORS = {
    errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "a file got too large",
    errno.EACCES: "permission denied", errno.EPERM: "permission denied", errno.EROFS: "the disk is read-only",
    errno.ENAMETOOLONG: "the name is too long",
}  # fmt: skip
"""What can be wrong with a disk, in words."""


class TurboQuantError(Exception):
    """Base of all expected failures; the text names what was given, what is allowed, what to do."""


class SourceError(TurboQuantError):
    """The model cannot be reached: missing path, no network, or not a model at all."""


class DownloadError(SourceError):
    """The network was lost on the way. What came and what was made of it is kept: the same work goes on from there."""


class UnsafeModelError(TurboQuantError):
    """The model asks for code to be run, or is stored in a format that can run code."""


class UnsupportedModelError(TurboQuantError):
    """The architecture, or the way the checkpoint is already quantized, is not handled."""


class CorruptCheckpointError(TurboQuantError):
    """The files contradict themselves: truncated or lying tensors, NaN or infinite weights."""


class RecipeError(TurboQuantError):
    """Bits, group size, rotation or cache settings that do not exist or do not fit the model."""


class OutputError(TurboQuantError):
    """The result cannot be written: it exists already, or the disk is full."""


class InputError(TurboQuantError):
    """A prompt, text or option that cannot be used."""

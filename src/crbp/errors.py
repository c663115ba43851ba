"""The errors and warnings that crbp raises by name."""

from __future__ import annotations

from pathlib import Path


class CrbpError(Exception):
    """Base of the errors that crbp raises by a name of its own."""


class DivergenceError(CrbpError, RuntimeError):
    """The dynamics or the backward solve did not converge, and the policy says to raise."""


class StateError(CrbpError, ValueError):
    """A state, or what a step returned for it, is not something that can be evolved."""


class SettingsError(CrbpError, ValueError):
    """Settings do not go together with the data or with each other, which shows only once a run starts."""


class StorageError(CrbpError, OSError):
    """A file cannot be written: the disk is full, or its folder may not be written to."""

    @classmethod
    def at(cls, path: str | Path, error: OSError) -> StorageError:
        """The error of a file, from what the system says about it."""
        return cls(
            f"{path} cannot be written ({error.strerror or error}); make room on its disk or choose another folder, "
            "and run the command again: what was written before is whole"
        )


class NonFiniteError(CrbpError, FloatingPointError):
    """A NaN or an infinity has come up in training; says at which step and where from."""


class DivergenceWarning(UserWarning):
    """The dynamics or the backward solve did not converge, and the policy says to go on."""


class NonFiniteWarning(UserWarning):
    """A NaN or an infinity has come up in training, and the policy says to go on."""


class LearningWarning(UserWarning):
    """Training goes on, but has learnt nothing."""

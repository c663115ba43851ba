"""The errors and warnings that crbp raises by name."""


class CrbpError(Exception):
    """Base of the errors that crbp raises by a name of its own."""


class DivergenceError(CrbpError, RuntimeError):
    """The dynamics or the backward solve did not converge, and the policy says to raise."""


class StateError(CrbpError, ValueError):
    """A state, or what a step returned for it, is not something that can be evolved."""


class SettingsError(CrbpError, ValueError):
    """Settings do not go together with the data or with each other, which shows only once a run starts."""


class DivergenceWarning(UserWarning):
    """The dynamics or the backward solve did not converge, and the policy says to go on."""

"""The ways a run, or a training, ends early on purpose."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend.

    The message names the setting or file, its value and the remedy. The command line prints it
    without a traceback and exits with code 2.
    """


class RunStopped(Exception):
    """Training cannot go on and trying again would end the same way. State on disk is kept."""


class Agreed(RunStopped):
    """Raised on every rank at the same step, so that no rank is left waiting for another.

    Examples: a failed guard, a gradient that is not finite, too many unreadable images.
    """


class Leaving(Exception):
    """Raised on every rank at the same step: a machine is about to be taken away, and a step checkpoint is saved.

    The caller that started the ranks starts them again elsewhere.
    """

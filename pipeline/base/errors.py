"""The ways a run, or a training, ends early on purpose."""

from __future__ import annotations

import re

MOST_WORD, MOST_TEXT = 500, 2000  # characters of a message


class UserError(Exception):
    """A mistake that the user can mend.

    The message names the setting or file, its value and the remedy. The command line prints it
    without a traceback and exits with code 2. It is one line of at most MOST_TEXT characters: values in it are cut.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class Away(UserError):
    """What a run needs was not there: a store, a server, a cluster, room on it. The same command may work later.

    The command line exits with code 75, which tells whatever started it to try again.
    """


def one_line(message: str) -> str:
    """A message on one line. Long words, and the middle of a long text, are left out: the remedy comes at the end."""
    line = re.sub(r"\s*[\n\r\v\f\x85\u2028\u2029]\s*", " ", message)
    line = re.sub(rf"\S{{{MOST_WORD + 1},}}", lambda word: _cut(word[0], MOST_WORD), line)
    return _cut(line, MOST_TEXT)


def _cut(text: str, most: int) -> str:
    """The first two thirds and the last third of what may be kept of a text."""
    if len(text) <= most:
        return text
    last = (most - 5) // 3
    return f"{text[: most - 5 - last]} ... {text[-last:]}"


class RunStopped(Exception):
    """Training cannot go on and trying again would end the same way. State on disk is kept."""


class Lost(RunStopped):
    """Processes or machines were lost too often. The same command goes on from what is kept, and exits as for Away."""


class Agreed(RunStopped):
    """Raised on every rank at the same step, so that no rank is left waiting for another.

    Examples: a failed guard, a gradient that is not finite, too many unreadable images.
    """


class Leaving(Exception):
    """Raised on every rank at the same step: a machine is about to be taken away, and a step checkpoint is saved.

    The caller that started the ranks starts them again elsewhere.
    """

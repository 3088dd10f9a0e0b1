"""URLs without their secrets: passwords and signatures never reach a message, a log or a file."""

from __future__ import annotations

import re

# User and password before the host. A password may hold / or @ that should have been escaped; a port is no password.
_PASSWORD = re.compile(r"(\w://)[^\s/:@'\"]*:(?!\d+(?:[/?#'\"\s]|$))[^\s'\"]*@")
_USER = re.compile(r"(https?://)[^\s/@'\"]+@")  # of a web server a name alone may be a token
_SIGNATURE = re.compile(
    r"([?&](?:[\w.-]*(?:signature|credential|token|secret|password|accesskeyid|api[_-]?key)|sig)=)[^\s&#'\"]+",
    re.IGNORECASE,
)


def hide(text: str) -> str:
    """A text whose URLs show neither user and password nor the signature and tokens of their queries."""
    return _SIGNATURE.sub(r"\1***", _USER.sub(r"\1", _PASSWORD.sub(r"\1", text)))

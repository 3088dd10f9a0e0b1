"""`python -m cluster.spot`: waits until AWS takes this spot machine away, and tells Ray, so that trainings leave it.

For nodes that `ray up` starts (infra/aws). On Kubernetes the pods' preStop hook does the same.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable

LOOK_EVERY_S = 5.0  # AWS gives two minutes, and recommends this
LEFT_S = 110  # what of them is left for Ray when it has been told at once
TELL_S = 30.0  # how long one try to tell Ray may take: a busy machine takes seconds to start the command
REASON = "DRAIN_NODE_REASON_PREEMPTION"
_TIMEOUT_S = 5.0


def endpoint() -> str:
    """Where the machine's metadata service is; AWS's own variable may say otherwise."""
    return os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")


def notice() -> str | None:
    """What AWS is about to do with this machine ("terminate", "stop", "hibernate"), or None. Raises OSError."""
    # No proxy may stand between a machine and its metadata.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    asked = urllib.request.Request(
        f"{endpoint()}/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    )
    with opener.open(asked, timeout=_TIMEOUT_S) as answer:
        token = answer.read().decode()
    asked = urllib.request.Request(
        f"{endpoint()}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
    )
    try:
        with opener.open(asked, timeout=_TIMEOUT_S) as answer:
            return str(json.loads(answer.read()).get("action", "terminate"))
    except urllib.error.HTTPError as error:
        if error.code == 404:  # as long as nothing is planned
            return None
        raise


def drain(action: str, left: float = LEFT_S) -> list[str]:
    """The command that tells Ray that this node goes away in so many seconds."""
    said = f"AWS will {action} this spot instance"
    options = ["--reason", REASON, "--reason-message", said, "--deadline-remaining-seconds", str(math.ceil(left))]
    return [sys.executable, "-m", "ray.scripts.scripts", "drain-node", *options]


def watch(look: Callable[[], str | None] = notice) -> str:
    """Look until there is a notice, and return it. A metadata service that does not answer is asked again."""
    told = False
    while True:
        try:
            found = look()
            told = False
        except (OSError, ValueError) as error:
            found = None
            if not told:
                print(f"{endpoint()} does not answer ({error}); asking on", flush=True)
            told = True
        if found is not None:
            return found
        time.sleep(LOOK_EVERY_S)


def tell(action: str) -> bool:
    """Tell Ray, again and again until it has heard or the machine's time is over. Whether it has.

    AWS gives its notice once: a head that is busy, or away for a moment, must not lose it.
    """
    end = time.monotonic() + LEFT_S
    while (left := end - time.monotonic()) > 0:
        try:
            code = subprocess.run(drain(action, left), check=False, timeout=min(TELL_S, left)).returncode
            why = f"exit code {code}"
        except subprocess.TimeoutExpired:
            code, why = 1, "no answer"
        if code == 0:
            return True
        print(f"Ray could not be told ({why}); telling it again", flush=True)
        time.sleep(min(LOOK_EVERY_S, max(0.0, end - time.monotonic())))
    return False


def main() -> None:
    """Watch, and tell Ray; exit code 1 where it could not be told."""
    action = watch()
    print(f"AWS will {action} this instance: telling Ray", flush=True)
    raise SystemExit(0 if tell(action) else 1)


if __name__ == "__main__":
    main()

"""`python stop_job.py DASHBOARD CONFIG RUN [STAGE]`: run CONFIG as a job to its end, or stop it in a stage.

Prints the job's log, then a line of JSON: its status, and the seconds that it took to stop.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path

from faults.moments import MOMENTS
from ray.job_submission import JobSubmissionClient

from cluster import job_env, submit
from pipeline.settings.config import load_config

SECONDS = 300


def main(address: str, config: str, run: Path, stage: str | None = None) -> None:
    client = JobSubmissionClient(address)
    # Ray tells no exit code of a job that was stopped, so a shell that outlives the signal does.
    command = f'trap : TERM; {submit.entrypoint(config, [])}; echo "ended with $?"'
    environment = job_env.make(load_config(config), None, Path.cwd())
    job = client.submit_job(entrypoint=f"sh -c {shlex.quote(command)}", runtime_env=environment)

    def over() -> bool:
        return bool(client.get_job_status(job).is_terminal())

    deadline, looked = time.monotonic() + SECONDS, time.monotonic()
    while stage is not None and not MOMENTS[stage](run):
        time.sleep(0.001)
        if time.monotonic() - looked > 2:
            looked = time.monotonic()
            assert not over(), client.get_job_logs(job)
            assert looked < deadline, client.get_job_logs(job)
    started = time.monotonic()
    if stage is not None:
        client.stop_job(job)
    while not over():
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(0.2)
    took = time.monotonic() - started
    print(client.get_job_logs(job))
    print(json.dumps({"status": str(client.get_job_status(job).value), "seconds": took}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])

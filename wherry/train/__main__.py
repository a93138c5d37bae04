"""`torchrun --nproc-per-node N -m wherry.train JOB.json`: one rank of a run; the first speaks.

With WHERRY_TOLD in the environment, which `wherry train --ranks N` sets, the end of the run is written there as JSON:
its result, or the error that all ranks agreed on, and torchrun does not try again what cannot succeed.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path

from wherry.errors import Error
from wherry.report import write_atomic
from wherry.train import loop
from wherry.train.job import Job

EVERY_S = 10.0  # between lines of progress


def lines() -> loop.Progress:
    """A progress display of plain lines, on the first rank alone."""
    began, first, said = 0.0, -1, 0.0

    def line(done: int, total: int, text: str) -> None:
        nonlocal began, first, said
        now = time.monotonic()
        if first < 0:  # what was done before, by a run that this one resumes, took none of this run's time
            began, first = now, done
        if now - said > EVERY_S or done == total:
            said = now
            left = f", {(now - began) / (done - first) * (total - done):,.0f} s left" if done > first else ""
            print(f"{done}/{total} {text}{left}", file=sys.stderr, flush=True)

    return line if os.environ.get("RANK", "0") == "0" else loop.quiet


def main() -> int:
    """Run the job of the first argument; gives the exit code."""
    first, told = os.environ.get("RANK", "0") == "0", os.environ.get("WHERRY_TOLD")
    warnings.simplefilter("ignore")
    try:
        result = loop.run(Job.load(sys.argv[1]), lines())
    except Error as error:
        every = getattr(error, "agreed", False) or os.environ.get("WORLD_SIZE", "1") == "1"
        if first and told and every:
            write_atomic(Path(told), json.dumps({"error": type(error).__name__, "text": str(error)}))
        elif first or not every:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 0 if told and every else error.code
    if first and told:
        write_atomic(Path(told), json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`torchrun --nproc-per-node N -m wherry.train JOB.json`: one rank of a run."""

import sys

from wherry.errors import Error
from wherry.train import loop
from wherry.train.job import Job

if __name__ == "__main__":
    try:
        loop.run(Job.load(sys.argv[1]))
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)

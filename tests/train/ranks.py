"""Run several jobs one after the other in the processes of one torchrun: `torchrun ranks.py CASES.json`.

CASES: [{"name": ..., "job": {...}, "kill": [rank, update], "term": update}]; beside it NAME.result.json is written by
the first rank: the loop's result, or {"error": class, "text": ..., "agreed": ...}.
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch.distributed as dist

from wherry.errors import Error
from wherry.train import loop, mesh
from wherry.train.job import Job


def watched(case: dict, rank: int):
    """A progress display that kills or stops this process at an update, once."""

    def progress(done: int, total: int, text: str) -> None:
        for what, number in (("kill", signal.SIGKILL), ("term", signal.SIGTERM)):
            flag = Path(case["job"]["out"] + f".{what}")
            if what in case and rank == case[what][0] and done == case[what][1] and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), number)

    return progress


def main(path: Path) -> None:
    rank = int(os.environ["RANK"])
    cases = json.loads(path.read_text())
    told_of = {case["name"]: path.with_name(f"{case['name']}.result.json") for case in cases}
    done = {name for name, told in told_of.items() if told.exists()}  # in a round before a restart
    mesh.meet("gloo", 120.0)
    dist.barrier()
    for case in cases:
        if case["name"] in done:
            continue
        told = told_of[case["name"]]
        try:
            result = loop.run(Job.from_dict(case["job"]), watched(case, rank))
        except Error as error:
            if not getattr(error, "agreed", False):
                raise
            result = {"error": type(error).__name__, "text": str(error)}
        if rank == 0:
            told.with_suffix(".tmp").write_text(json.dumps(result))
            told.with_suffix(".tmp").rename(told)
        elif "error" in result:
            path.with_name(f"{case['name']}.rank{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))

"""Launch: a job on many ranks: torchrun here, or the file that a cluster's scheduler takes and that calls torchrun.

slurm:     a batch script: one torchrun for each node, rendezvous on the first, requeued and warned before its time ends
kubeflow:  a TrainJob of Kubeflow Trainer v2 (trainer.kubeflow.org/v1alpha1), runtime `torch-distributed`
ray:       a RayJob of KubeRay (ray.io/v1): as many workers as nodes, Ray's tasks start torchrun on each
"""

import json
import logging
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from wherry import errors
from wherry.errors import BadInput, Error, Exhausted
from wherry.train.job import Job

PORT = 29400
KINDS = ("slurm", "kubeflow", "ray")


def here(job: Job, ranks: int, restarts: int = 0) -> dict[str, Any]:
    """Run a job with torchrun on this machine; gives the loop's result.

    restarts: how often all ranks are started again when one dies; they go on at the newest checkpoint.

    Raises the error that the ranks agreed on; Exhausted when one died and no restart was left.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        job.save(Path(folder) / "job.json")
        threads = job.threads or max(1, (os.cpu_count() or 1) // ranks)
        given = {"WHERRY_TOLD": str(told), "OMP_NUM_THREADS": str(threads)}
        before = {name: os.environ.get(name) for name in given}
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=ranks, max_restarts=restarts, rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", run_id=f"wherry-{os.getpid()}", monitor_interval=0.5,
        )  # fmt: skip
        os.environ.update(given)
        try:
            elastic_launch(config, sys.executable)("-m", "wherry.train", str(Path(folder) / "job.json"))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise Exhausted(
                f"rank {rank} died ({_how(failure.exitcode)}), {restarts} restarts were allowed.\n"
                "The same command goes on at the newest checkpoint; --max-restarts N does so by itself."
            ) from error
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        found = json.loads(told.read_text(encoding="utf8"))
    if "error" in found:
        raise getattr(errors, found["error"], Error)(found["text"])
    return found


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def file(
    job_file: str, kind: str, name: str, nodes: int, ranks: int, *, image: str = "", restarts: int = 3,
    hours: float = 24.0, gpus: bool = True,
) -> str:  # fmt: skip
    """The text of a scheduler's file.

    Args:
        job_file: the job, as the nodes see it: on a file system that they share, as is the job's `out`.
        name: of the run. nodes, ranks: how many, and processes on each; gpus: each has a GPU of its own.
        image: a container with wherry, for kubeflow and ray. restarts: by torchrun. hours: at most, on slurm.

    Raises BadInput for a kind that is not known, names and numbers that a scheduler refuses, or a missing image.
    """
    if kind not in KINDS:
        raise BadInput(f"no launcher '{kind}'; there are: {', '.join(KINDS)}")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,44}[a-z0-9])?", name):
        raise BadInput(f"the name '{name}' must be small letters, digits and '-', 46 at most, beginning with a letter")
    if nodes < 1 or ranks < 1 or restarts < 0 or not 0 < hours < 10_000:
        raise BadInput("nodes and ranks must be 1 or more, restarts 0 or more, hours above 0")
    if kind != "slurm" and not image:
        raise BadInput(f"--on {kind} needs --image: a container that has wherry in it")
    if kind == "slurm":
        return slurm(job_file, name, nodes, ranks, restarts, hours, gpus)
    made = trainjob if kind == "kubeflow" else rayjob
    return yaml.safe_dump(made(job_file, name, nodes, ranks, restarts, image, gpus), sort_keys=False, width=1000)


def slurm(job_file: str, name: str, nodes: int, ranks: int, restarts: int, hours: float, gpus: bool) -> str:
    """A batch script for sbatch. Two minutes before its time ends the ranks get SIGTERM, save, and it is queued again.

    SLURM by itself queues a job again only when a node fails or another job takes its place.
    """
    minutes = round(hours * 60)
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={name}", f"#SBATCH --nodes={nodes}", "#SBATCH --ntasks-per-node=1",
        *([f"#SBATCH --gpus-per-node={ranks}"] if gpus else [f"#SBATCH --cpus-per-task={ranks}"]),
        f"#SBATCH --time={minutes // 60:02d}:{minutes % 60:02d}:00", "#SBATCH --signal=B:TERM@120", "#SBATCH --requeue",
        f"#SBATCH --output={name}-%j.log", "#SBATCH --open-mode=append",
        "set -euo pipefail",
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "srun --kill-on-bad-exit=1 torchrun \\",
        f'    --nnodes "$SLURM_NNODES" --nproc-per-node {ranks} --max-restarts {restarts} \\',
        f'    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:{PORT}" \\',
        f"    -m wherry.train {shlex.quote(job_file)} &",
        "running=$!",
        "again() {",
        '    scancel --signal=TERM "$SLURM_JOB_ID"  # the steps, not this script',
        '    if ! wait "$running"; then scontrol requeue "$SLURM_JOB_ID"; fi',
        "    exit",
        "}",
        "trap again TERM",
        'wait "$running"',
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def trainjob(
    job_file: str, name: str, nodes: int, ranks: int, restarts: int, image: str, gpus: bool
) -> dict[str, Any]:
    """Kubeflow's TrainJob; the runtime `torch-distributed` gives torchrun its PET_ variables."""
    resources = {"nvidia.com/gpu": ranks} if gpus else {"cpu": ranks}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": {"name": name},
        "spec": {
            "runtimeRef": {"name": "torch-distributed", "apiGroup": "trainer.kubeflow.org",
                           "kind": "ClusterTrainingRuntime"},
            "trainer": {
                "image": image, "numNodes": nodes, "numProcPerNode": ranks,
                "command": ["torchrun"],
                "args": [f"--max-restarts={restarts}", "-m", "wherry.train", job_file],
                "resourcesPerNode": {"limits": resources, "requests": dict(resources)},
            },
        },
    }  # fmt: skip


DRIVER = """import ray, subprocess, sys
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
ray.init()
share = {share}
group = placement_group([share] * {nodes}, strategy="STRICT_SPREAD")
ray.get(group.ready())
@ray.remote(num_cpus=share.get("CPU", 0), num_gpus=share.get("GPU", 0))
def node(head, first=False):
    if head is None:
        return ray.util.get_node_ip_address()
    line = [sys.executable, "-m", "torch.distributed.run",
            "--nnodes={nodes}", "--nproc-per-node={ranks}", "--max-restarts={restarts}",
            "--rdzv-id={name}", "--rdzv-backend=c10d", "--rdzv-endpoint=" + head + ":{port}",
            "--rdzv-conf=is_host=" + str(first).lower(), "-m", "wherry.train", {job}]
    return subprocess.run(line).returncode
at = lambda i: node.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, i))
head = ray.get(at(0).remote(None))
raise SystemExit(any(ray.get([at(i).remote(head, i == 0) for i in range({nodes})])))
"""


def rayjob(job_file: str, name: str, nodes: int, ranks: int, restarts: int, image: str, gpus: bool) -> dict[str, Any]:
    """KubeRay's RayJob: a cluster of its own, removed at the end; a driver that starts one torchrun on each node."""
    share = {"CPU": 1, "GPU": ranks} if gpus else {"CPU": ranks}
    driver = DRIVER.format(
        share=share, nodes=nodes, ranks=ranks, restarts=restarts, name=name, port=PORT, job=json.dumps(job_file)
    )
    resources: dict[str, Any] = {"cpu": ranks} | ({"nvidia.com/gpu": ranks} if gpus else {})

    def pod(kind: str, wants: dict[str, Any]) -> dict[str, Any]:
        container = {"name": f"ray-{kind}", "image": image, "resources": {"limits": wants, "requests": dict(wants)}}
        return {"spec": {"containers": [container]}}

    return {
        "apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name},
        "spec": {
            "entrypoint": f"python -c {shlex.quote(driver)}",
            "shutdownAfterJobFinishes": True, "backoffLimit": restarts,
            "rayClusterSpec": {
                "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": pod("head", {"cpu": 1})},
                "workerGroupSpecs": [{
                    "groupName": "ranks", "replicas": nodes, "minReplicas": nodes, "maxReplicas": nodes,
                    "rayStartParams": {}, "template": pod("worker", resources),
                }],
            },
        },
    }  # fmt: skip

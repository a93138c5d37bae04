"""Files for schedulers: they parse, name the job, and have the fields that the published API types name."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from wherry.errors import BadInput
from wherry.train import launch

# spec.trainer of trainer.kubeflow.org/v1alpha1 TrainJob (trainjob_types.go), and what a pod's container may have here
TRAINER = {"image": str, "command": list, "args": list, "env": list, "numNodes": int, "resourcesPerNode": dict,
           "numProcPerNode": int}  # fmt: skip

# ray.io/v1 RayJob of KubeRay 1.4 (rayjob_types.go, raycluster_types.go): {field: (type, whether it must be there)}
WORDS = dict[str, str]
RAYJOB: dict[str, dict[str, tuple[Any, bool]]] = {
    "spec": {
        "entrypoint": (str, False), "shutdownAfterJobFinishes": (bool, False), "backoffLimit": (int, False),
        "rayClusterSpec": (dict, False), "activeDeadlineSeconds": (int, False), "runtimeEnvYAML": (str, False),
        "submissionMode": (str, False), "ttlSecondsAfterFinished": (int, False), "suspend": (bool, False),
    },
    "cluster": {"headGroupSpec": (dict, True), "workerGroupSpecs": (list, False), "rayVersion": (str, False)},
    "head": {"rayStartParams": (WORDS, True), "template": (dict, True), "serviceType": (str, False)},
    "worker": {
        "groupName": (str, True), "replicas": (int, False), "minReplicas": (int, True), "maxReplicas": (int, True),
        "numOfHosts": (int, False), "rayStartParams": (WORDS, True), "template": (dict, True),
    },
}  # fmt: skip

# long options of sbatch 22.05 that a script of ours may have; SLURM itself takes these lines (sbatch --test-only)
SBATCH = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "requeue",
          "output", "open-mode"}  # fmt: skip


def fits(found: dict[str, Any], kind: str) -> None:
    """Only fields that the type has, of its types, and all that it must have."""
    known = RAYJOB[kind]
    for name, value in found.items():
        wanted = known[name][0]
        if wanted is WORDS:
            assert all(isinstance(word, str) for word in (*value, *value.values())), name
        else:
            assert type(value) is wanted, name
    assert {name for name, (_, must) in known.items() if must} <= set(found)


def test_slurm_is_a_script_that_bash_reads() -> None:
    text = launch.file("/shared/my job.json", "slurm", "run-1", 4, 8, hours=1.5)
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0
    assert "--time=01:30:00" in text
    assert "--gpus-per-node=8" in text
    words = shlex.split(text[text.index("srun") :].replace("\\\n", " "))
    at = words.index("-m")
    assert words[at + 1 : at + 4] == ["wherry.train", "/shared/my job.json", "&"]
    assert words[words.index("--nproc-per-node") + 1] == "8"


def test_slurms_options_are_sbatchs_and_come_first() -> None:
    for gpus in (True, False):
        lines = launch.file("job.json", "slurm", "run", 2, 8, gpus=gpus).splitlines()
        options = [line.removeprefix("#SBATCH --").partition("=")[0] for line in lines if line.startswith("#SBATCH")]
        assert set(options) <= SBATCH
        assert len(options) == len(set(options))
        assert all(line.startswith("#") for line in lines[: len(options) + 1])  # sbatch reads none after a command


@pytest.mark.parametrize(("code", "ends", "queued"), [(0, 0, 0), (3, 0, 0), (1, 1, 1), (0, 1, 0)])
def test_a_slurm_job_whose_time_ends_is_queued_again(tmp_path: Path, code: int, ends: int, queued: int) -> None:
    """The script itself, by bash; SLURM's commands here only note that they were called, and end as they do there."""
    calls, up = tmp_path / "calls", tmp_path / "up"
    work = f"trap 'exit {code}' TERM; echo $$ > {up}.part; mv {up}.part {up}; sleep 20 & wait" if ends else "true"
    for name, line in {
        "scontrol": f'echo "$@" >> {calls}; echo node1', "scancel": f"kill -TERM $(cat {up})",
        "srun": f"{work}; exit {code}",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1",
                        "SLURM_JOB_NODELIST": "node1"}  # fmt: skip
    script = launch.file("job.json", "slurm", "run", 1, 1, gpus=False)
    running = subprocess.Popen(["bash", "-c", script], env=env, stdout=subprocess.DEVNULL)
    if ends:
        while not up.exists():
            assert running.poll() is None
        running.terminate()
    assert running.wait(15) == (0 if ends else code)
    assert ("requeue 7" in calls.read_text()) == bool(queued)


def test_trainjob_has_the_fields_of_its_type() -> None:
    made = yaml.safe_load(launch.file("job.json", "kubeflow", "run", 2, 4, image="wherry:1"))
    assert (made["apiVersion"], made["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = made["spec"]["trainer"]
    for name, value in trainer.items():
        assert isinstance(value, TRAINER[name]), name
    assert set(made["spec"]["runtimeRef"]) == {"name", "apiGroup", "kind"}
    assert all(isinstance(word, str) for word in trainer["command"] + trainer["args"])


def test_trainjob_is_read_by_kubeflows_own_types() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")
    made = yaml.safe_load(launch.file("job.json", "kubeflow", "run", 2, 4, image="wherry:1"))
    assert models.TrainerV1alpha1TrainJob.from_dict(made).to_dict() == made  # a field that it has not is dropped


def test_rayjob_has_the_fields_of_its_types() -> None:
    for gpus in (True, False):
        made = yaml.safe_load(launch.file("job.json", "ray", "run", 2, 4, image="wherry:1", gpus=gpus))
        fits(made["spec"], "spec")
        cluster = made["spec"]["rayClusterSpec"]
        fits(cluster, "cluster")
        fits(cluster["headGroupSpec"], "head")
        (group,) = cluster["workerGroupSpecs"]
        fits(group, "worker")


def test_rayjobs_pods_are_pods() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    made = yaml.safe_load(launch.file("job.json", "ray", "run", 2, 4, image="wherry:1"))
    cluster = made["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
        validate.validate(pod, validate.latest_version(), strict=True)


def test_rays_command_line_gives_the_driver_to_python_unchanged(tmp_path: Path) -> None:
    """`ray job submit -- ENTRYPOINT` joins its words by list2cmdline, and a shell of the cluster runs the line."""
    made = yaml.safe_load(launch.file('a "b" it\'s.json', "ray", "run", 2, 4, image="wherry:1"))
    words = shlex.split(made["spec"]["entrypoint"])
    line = subprocess.list2cmdline(words)
    (tmp_path / "python").symlink_to("/bin/echo")
    done = subprocess.run(["/bin/sh", "-c", line], env={"PATH": f"{tmp_path}"}, capture_output=True, text=True)
    assert done.stdout == f"-c {words[2]}\n"


@pytest.mark.slow
def test_rays_driver_runs_the_job(tmp_path: Path, job_of: Any, tiny_llama: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'wherry[ray]'")
    from wherry.train.job import Job

    job = Job.from_dict(job_of(tiny_llama, "out", steps=4, held_out=""))
    job.save(tmp_path / "a job.json")
    made = yaml.safe_load(launch.file(str(tmp_path / "a job.json"), "ray", "run", 1, 2, image="w:1", gpus=False))
    words = shlex.split(made["spec"]["entrypoint"])
    done = subprocess.run([sys.executable, *words[1:]], timeout=300)
    assert done.returncode == 0
    assert len((Path(job.out) / "metrics.jsonl").read_text().splitlines()) == 4


def test_rayjob_runs_a_driver_that_python_reads() -> None:
    made = yaml.safe_load(launch.file("it's.json", "ray", "run", 2, 4, image="wherry:1", gpus=False))
    assert (made["apiVersion"], made["kind"]) == ("ray.io/v1", "RayJob")
    command, flag, driver = shlex.split(made["spec"]["entrypoint"])
    assert (command, flag) == ("python", "-c")
    compile(driver, "driver", "exec")
    assert "it's.json" in driver
    group = made["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 2
    assert "nvidia.com/gpu" not in group["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_says_what_a_scheduler_would_refuse() -> None:
    for kind, name, nodes, image, text in (
        ("pbs", "run", 1, "", "slurm, kubeflow, ray"), ("slurm", "My_Run", 1, "", "small letters"),
        ("ray", "run", 1, "", "--image"), ("slurm", "run", 0, "", "1 or more"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=text):
            launch.file("job.json", kind, name, nodes, 8, image=image)

"""Files for schedulers: they parse, name the job, and have the fields that the published API types name."""

import shlex
import subprocess

import pytest
import yaml

from wherry.errors import BadInput
from wherry.train import launch

# spec.trainer of trainer.kubeflow.org/v1alpha1 TrainJob (trainjob_types.go), and what a pod's container may have here
TRAINER = {"image": str, "command": list, "args": list, "env": list, "numNodes": int, "resourcesPerNode": dict,
           "numProcPerNode": int}  # fmt: skip


def test_slurm_is_a_script_that_bash_reads() -> None:
    text = launch.file("/shared/my job.json", "slurm", "run-1", 4, 8, hours=1.5)
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0
    assert "--time=01:30:00" in text
    assert "--gpus-per-node=8" in text
    words = shlex.split(text[text.index("srun") :].replace("\\\n", " "))
    assert words[words.index("-m") + 1 :] == ["wherry.train", "/shared/my job.json"]
    assert words[words.index("--nproc-per-node") + 1] == "8"


def test_trainjob_has_the_fields_of_its_type() -> None:
    made = yaml.safe_load(launch.file("job.json", "kubeflow", "run", 2, 4, image="wherry:1"))
    assert (made["apiVersion"], made["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = made["spec"]["trainer"]
    for name, value in trainer.items():
        assert isinstance(value, TRAINER[name]), name
    assert set(made["spec"]["runtimeRef"]) == {"name", "apiGroup", "kind"}
    assert all(isinstance(word, str) for word in trainer["command"] + trainer["args"])


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

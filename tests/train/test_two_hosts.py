"""Two hosts: two network namespaces with a cable between them, one torchrun in each; needs root."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import write_llama
from tests.train.conftest import HERE
from wherry.train import loop
from wherry.train.job import Job


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces, 10.77.0.1 and 10.77.0.2."""
    if os.geteuid() or subprocess.run(["ip", "netns"], capture_output=True).returncode:
        pytest.skip("network namespaces need root and ip")
    mark = uuid.uuid4().hex[:5]
    names = [f"wa{mark}", f"wb{mark}"]
    made: list[str] = []

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"ip {' '.join(words)}: {done.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for i, name in enumerate(names, 1):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.slow
def test_two_hosts_give_what_one_gives(tmp_path: Path, job_of: Callable, hosts: list[str]) -> None:
    model = write_llama(tmp_path / "m")
    more = {"optimizer": "sgd", "learning_rate": 1e-2}
    one = loop.run(Job.from_dict(job_of(model, "one", **more)))
    layouts = {"dp": {}, "fsdp": {"dp": 1, "fsdp": 2}, "tp": {"tp": 2}, "pp": {"pp": 2}}
    cases = [{"name": name, "job": job_of(model, name, **more, **layout)} for name, layout in layouts.items()]
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases))
    running = []
    for node, host in enumerate(hosts):
        around = os.environ | {"GLOO_SOCKET_IFNAME": host, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
        line = [
            "ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank",
            str(node), "--nproc-per-node", "1", "--master-addr", "10.77.0.1", "--master-port", "29411", "--local-addr",
            f"10.77.0.{node + 1}", str(HERE / "ranks.py"), str(file),
        ]  # fmt: skip
        running.append(subprocess.Popen(line, env=around, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [each.communicate(timeout=500)[0] for each in running]
    assert [each.returncode for each in running] == [0, 0], said[0][-3000:] + said[1][-3000:]
    for name in layouts:
        found = json.loads((tmp_path / f"{name}.result.json").read_text())
        np.testing.assert_allclose(found["losses"], one["losses"], rtol=1e-5, err_msg=name)

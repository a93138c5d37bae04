"""OpenVINO in one process with signals: what it does to a thread must not outlive its models."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openvino", reason="not installed: pip install 'wherry[openvino]'")

PROGRAM = """
import os, signal, sys, threading, time
import openvino as ov
x = ov.opset13.parameter([1, 4], name="x")
ov.save_model(ov.Model([ov.opset13.relu(x)], [x], "tiny"), sys.argv[1])
signal.signal(signal.SIGINT, lambda *_: print("heard", flush=True))
held = [compile(sys.argv[1])]
thread = threading.Thread(target=held.clear)  # the last reference goes in another thread
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.01)
print("alive", flush=True)
"""
OURS = "from wherry.formats.openvino import compiled\ndef compile(path): return compiled(path)\n"


def test_a_signal_after_a_model_was_freed_in_another_thread(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OURS + PROGRAM, str(tmp_path / "tiny.xml")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    assert done.stdout.split() == ["heard", "alive"]

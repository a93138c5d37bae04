"""The command line: exit codes, JSON, lists, help; the verbs themselves are tested where they live."""

import json
import sys
from pathlib import Path

import pytest

from wherry import cli


def run(*words: str) -> int:
    sys.argv = ["wherry", *words]
    with pytest.raises(SystemExit) as done:
        cli.main()
    return int(done.value.code or 0)


def test_a_failed_proof_is_not_exit_code_zero(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = str(tmp_path / "out")
    words = ("--recipe", "rtn:scheme=W2A16,group_size=32", "--format", "gguf", "--max-kl", "0.0001", "--json")
    assert run("compress", str(tiny_llama), "-o", out, *words) == 1
    rows = {(row["what"], row.get("where", "")): row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["verdict", ""]["value"] == "FAIL"
    assert rows["check: kl", "gguf"]["value"] is False


def test_success_is_zero_and_json_is_rows(tiny_llama: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("inspect", str(tiny_llama), "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["what"] for row in rows} >= {"architecture", "parameters", "bytes"}
    assert run("list", "quant", "--json") == 0
    assert {row["what"] for row in json.loads(capsys.readouterr().out)["rows"]} >= {"best", "gptq", "rtn"}


@pytest.mark.parametrize("words", [("compres",), ("compress",), ("verify", "x", "--nosuch")])
def test_wrong_words_are_two_lines_and_code_two(words: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    assert run(*words) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) <= 3

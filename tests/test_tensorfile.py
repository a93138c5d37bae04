"""safetensors files, judged by the safetensors package on the other side; damage of every byte of a header."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wherry.errors import Corrupt, Error, Exhausted, Missing
from wherry.tensorfile import DTYPES, TensorFile, write, write_pieces

KINDS = {
    torch.float32: torch.randn(3, 5), torch.float16: torch.randn(7).half(),
    torch.bfloat16: torch.randn(2, 2).bfloat16(),
    torch.float64: torch.randn(1, 1).double(), torch.int64: torch.ones(2, 3).long(), torch.int32: torch.ones(4).int(),
    torch.int16: torch.arange(4).short(), torch.int8: torch.arange(-3, 3).char(), torch.uint8: torch.arange(9).byte(),
    torch.bool: torch.tensor([True, False]), torch.float8_e4m3fn: torch.randn(8).to(torch.float8_e4m3fn),
    torch.float8_e5m2: torch.randn(8).to(torch.float8_e5m2),
}  # fmt: skip


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def test_what_we_write_the_package_reads(tmp_path: Path) -> None:
    tensors = {str(dtype): tensor for dtype, tensor in KINDS.items()}
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(3.5), "turned": torch.randn(4, 6).T}
    write(tmp_path / "a.safetensors", tensors, {"facts": "ä\n"})
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(tensors)
    assert all(same(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"facts": "ä\n"}


def test_what_the_package_writes_we_read(tmp_path: Path) -> None:
    assert set(KINDS) == set(DTYPES.values())
    tensors = {str(dtype): tensor for dtype, tensor in KINDS.items()} | {
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt"}
    assert all(same(file.read(name), tensor) for name, tensor in tensors.items())
    raw = b"".join(file.chunks("torch.float32", size=7))
    assert raw == tensors["torch.float32"].numpy().tobytes()


def test_reading_takes_memory_that_is_aligned_and_its_own(tmp_path: Path) -> None:
    write(tmp_path / "a", {"b": torch.zeros(3, dtype=torch.uint8), "w": torch.randn(33)})
    file = TensorFile(tmp_path / "a")
    first, second = file.read("w"), file.read("w")
    assert first.data_ptr() % 64 == second.data_ptr() % 64 == 0
    first.zero_()
    assert second.abs().sum() > 0


def test_every_damage_is_named_or_harmless(tmp_path: Path) -> None:
    """Seeded: cut anywhere, or change a byte of the header: an error of ours, or the tensors are all still readable."""
    write(tmp_path / "good", {"a": torch.randn(4, 4), "b": torch.arange(5)})
    good, draw = (tmp_path / "good").read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little")
    path, refused, longest = tmp_path / "bad", 0, 0
    for cut in range(0, len(good), 3):
        path.write_bytes(good[:cut])
        with pytest.raises(Corrupt):
            TensorFile(path)
    for _ in range(800):
        damaged = bytearray(good)
        damaged[draw.randrange(header)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            file = TensorFile(path)
            for name in file.entries:
                file.read(name)
        except Error as error:
            refused += 1
            longest = max(longest, len(str(error).splitlines()))
    assert refused > 400
    assert longest <= 3
    with pytest.raises(Missing):
        TensorFile(tmp_path / "nowhere")


def test_a_claim_of_terabytes_costs_nothing(tmp_path: Path) -> None:
    raw = b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
    (tmp_path / "a").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(Corrupt, match="truncated"):
        TensorFile(tmp_path / "a")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def pieces(error: BaseException) -> Iterator[bytes]:
        yield b"new"
        raise error

    for error, kind in ((OSError(28, "No space left on device"), Exhausted), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(kind):
            write_pieces(path, pieces(error))
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
        assert path.read_bytes() == b"old"

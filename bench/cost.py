"""What a method costs: CPU seconds for 10^9 weights, wherry's methods and its peers', one thread each, in the same run.

    python bench/cost.py --peer gptqmodel=PEER/bin/python auto-round=PEER2/bin/python

The model is a seeded random Llama (time does not depend on what weights say): 2 blocks, 512 wide by default; 8 windows
of 256 random tokens. Loading, saving and imports are left out; CPU seconds, so that a busy machine counts less.
Learned methods cost a constant and so much for each step: they run with two numbers of steps, and the row holds what
200 steps come to. Rows go to bench/results/cost.json. Environments of the peers: bench/peers/*.py.
"""

import argparse
import datetime
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import quality
from quality import Entry

RESULTS = Path(__file__).parent / "results" / "cost.json"
STEPS, USUAL = {"rounding": (24, 48), "best": (25, 50)}, 200  # best tunes an epoch for every 25
ONCE = (Entry("wherry", "rtn"), Entry("wherry", "gptq"), Entry("wherry", "gptaq"))
PEERS = {"llm-compressor": Entry("llm-compressor", "gptq"), "gptqmodel": Entry("gptqmodel", "gptq")}
LEARNED = (Entry("wherry", "rounding"), Entry("wherry", "best"))


def main() -> None:
    """Measure all, print and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", nargs="*", default=[], help="tool=python of its environment")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--scheme", default="W4A16_ASYM")
    parser.add_argument("--windows", type=int, nargs=2, default=(8, 256), help="how many, and their length")
    parser.add_argument("--only", nargs="+", help="methods: 'gptq' 'rounding' ...")
    a = parser.parse_args()
    peers = {tool: quality.Peer(python) for tool, python in (item.split("=", 1) for item in a.peer)}
    once = [*ONCE, *(PEERS[tool] for tool in peers if tool in PEERS)]
    learned = [*LEARNED, *([Entry("auto-round", "rounding")] if "auto-round" in peers else [])]
    with tempfile.TemporaryDirectory() as place:
        folder, tokens = Path(place, "model"), Path(place, "tokens.npy")
        weights = build(folder, a.hidden, a.layers)
        np.save(tokens, np.random.default_rng(0).integers(3, 1000, tuple(a.windows)))

        def seconds(entry: Entry) -> float:
            out = Path(place, "out")
            tool = quality.wherry if entry.tool == "wherry" else peers[entry.tool].compress
            took = tool(entry, folder, out, a.scheme, 128, tokens)
            shutil.rmtree(out)
            return float(took["cpu_seconds"])

        for entry in [e for e in (*once, *learned) if not a.only or e.method in a.only]:
            row = {"tool": entry.tool, "method": entry.method, "scheme": a.scheme, "weights": weights}
            row |= {"hidden": a.hidden, "layers": a.layers, "windows": list(a.windows)}
            if entry in learned:
                steps = STEPS[entry.method]
                seconds(Entry(entry.tool, entry.method, "iters=1"))  # what a process does once is no cost of a step
                few, many = (seconds(Entry(entry.tool, entry.method, f"iters={n}")) for n in steps)
                if many <= few:
                    raise SystemExit(f"{entry.label}: {steps} steps took {few} and {many} s: that tells nothing")
                whole = few + (many - few) / (steps[1] - steps[0]) * (USUAL - steps[0])
                row |= {"steps": steps, "measured": [few, many], "cpu_seconds": round(whole, 1)}
            else:
                row |= {"cpu_seconds": seconds(entry)}
            row |= {
                "per_1e9": round(row["cpu_seconds"] / weights * 1e9),
                "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            }
            row |= {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
            keep(row)
            print(f"{entry.label}: {row['cpu_seconds']:.1f} CPU s, {row['per_1e9']:.0f} for 10^9 weights", flush=True)


def build(folder: Path, hidden: int, layers: int) -> int:
    """A random Llama with a small vocabulary; returns how many weights its linears have."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=512,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.to(torch.float16).save_pretrained(folder)
    words = {f"<{i}>": i for i in range(1000)}
    Tokenizer(models.WordLevel(words, unk_token="<0>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name)


def keep(row: dict[str, object]) -> None:
    """Write a row in the place of the one of the same run."""
    names, row = ("tool", "method", "scheme", "hidden", "layers", "windows"), json.loads(json.dumps(row))
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = [*(r for r in old if any(r[name] != row[name] for name in names)), row]
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")


if __name__ == "__main__":
    main()

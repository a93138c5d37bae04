"""Write the generated parts of both READMEs: what works, what the demo measured, how it compares.

    python docs/generate.py            write them
    python docs/generate.py --check    exit with 1 when they are stale

Sources, all committed: the shelves of wherry (read as text), docs/demo.json (made of a demo's reports by
docs/picture.py), bench/results/quality.json (made by bench/quality.py).
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path

from wherry.scheme import PRESETS
from wherry.shelf import names

ROOT = Path(__file__).parents[1]
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
DEMO, BENCH = ROOT / "docs" / "demo.json", ROOT / "bench" / "results" / "quality.json"
WORDS = {
    "en": {
        "quant": "method", "prune": "pruning", "formats": "format", "runtimes": "runtime", "schemes": "schemes",
        "name": "name", "what": "what it is",
        "no demo": "The demo's figures of this version are not committed yet: `make demo` prints them.",
        "no bench": "Not measured yet for this version.", "model": "model", "tool": "tool and method",
        "scheme": "scheme, group",
        "bits": "bits/weight", "ppl": "perplexity", "float": "float", "kl": "KL, nats/token", "top1": "top-1 %",
        "sentences": "sentences/s", "runs": "calibration draws",
    },
    "zh": {
        "quant": "方法", "prune": "剪枝", "formats": "格式", "runtimes": "运行时", "schemes": "方案",
        "name": "名称", "what": "说明",
        "no demo": "本版本的演示数据尚未提交：运行 `make demo` 即可得到。",
        "no bench": "本版本尚未测量。", "model": "模型", "tool": "工具与方法", "scheme": "方案，组大小",
        "bits": "比特/权重", "ppl": "困惑度", "float": "浮点", "kl": "KL（nats/token）", "top1": "top-1 %",
        "sentences": "句/秒", "runs": "校准抽样次数",
    },
}  # fmt: skip


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; columns after the first `left` are right-aligned."""
    marks = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, marks, *rows])


def methods(words: dict[str, str]) -> str:
    """Everything that stands on the shelves, by its first docstring line."""
    shelves = ("quant", "prune", "formats", "runtimes")
    rows = [[words[shelf], f"`{name}`", line] for shelf in shelves for name, line in own(shelf)]
    rows.append([words["schemes"], "", ", ".join(f"`{name}`" for name in PRESETS)])
    return table(["", words["name"], words["what"]], rows, left=3)


def own(shelf: str) -> list[tuple[str, str]]:
    """Name and first line of the entries that wherry itself has; a stranger's package is not in our README."""
    return [(name, line) for name, line in names(shelf).items() if not line.startswith("from ")]


def picture(words: dict[str, str]) -> str:
    """The picture, with its title as the text for those who do not see it."""
    if not DEMO.exists():
        return ""
    return f"![{json.loads(DEMO.read_text(encoding='utf8'))['title']}](docs/demo.svg)"


def demo(words: dict[str, str]) -> str:
    """The two tables that `make demo` prints, and where they were measured."""
    if not DEMO.exists():
        return words["no demo"]
    found = json.loads(DEMO.read_text(encoding="utf8"))
    parts = [table(part["head"], part["rows"]) for part in found["tables"]]
    return "\n\n".join([*parts, f"{found['machine']}; {found['date']}."])


def bench(words: dict[str, str]) -> str:
    """Medians over calibration draws, by model, scheme, tool and method, at the file sizes that each tool wrote."""
    if not BENCH.exists():
        return words["no bench"]
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in json.loads(BENCH.read_text(encoding="utf8")):
        if "kl" not in row:  # the encoder's rows have another ruler; bench/README.md has them
            continue
        scheme = f"{row['scheme']}, {row['group_size']}"
        groups.setdefault((row["model"], scheme, row["tool"], row["method"], row["options"]), []).append(row)
    rows = []
    for (model, scheme, tool, method, options), found in sorted(groups.items()):
        middle = {key: statistics.median(row[key] for row in found) for key in ("bits", "perplexity", "kl", "top1")}
        rows.append([
            model, scheme, f"{tool} {method} {options}".strip(), f"{middle['bits']:.2f}",
            f"{found[0]['float_perplexity']:.3f}", f"{middle['perplexity']:.3f}", f"{middle['kl']:.4f}",
            f"{100 * middle['top1']:.1f}", str(len(found)),
        ])  # fmt: skip
        assert all(math.isfinite(value) for value in middle.values())
    head = ["model", "scheme", "tool", "bits", "float", "ppl", "kl", "top1", "runs"]
    return table([words[key] for key in head], rows, left=3)


def render(text: str, words: dict[str, str]) -> str:
    """The page with every generated part renewed."""
    for name, make in (("picture", picture), ("methods", methods), ("demo", demo), ("bench", bench)):
        begin, end = f"<!-- {name}: written by docs/generate.py -->", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.S)
        if not pattern.search(text):
            raise SystemExit(f"the README lacks the marks {begin} ... {end}")
        made = make(words)
        text = pattern.sub(lambda _, b=begin, m=made, e=end: f"{b}\n{m}\n{e}", text)
    return text


def main() -> int:
    """Write, or with --check compare. Returns the exit code."""
    stale = []
    for path, words in zip(READMES, WORDS.values(), strict=True):
        old = path.read_text(encoding="utf8")
        new = render(old, words)
        if new != old:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf8")
    if "--check" in sys.argv and stale:
        print(f"stale: {', '.join(stale)}; run: make docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

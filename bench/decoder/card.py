"""Measure the trained decoder and write its card: card.json, curve.png, README.md, LICENSE.

Idea:   bits per byte on a book and on a letter that nothing here has seen, beside the best of four Kneser-Ney
        models on the same training text, and again after plain rounding to 8, 4, 3 and 2 bits.
Units:  bits per byte = code length of all tokens, END too, over UTF-8 bytes; lower is better. Intervals are
        95%, by resampling documents (chapters or entries) 2000 times; differences are paired by document.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: TID253

from . import start, text
from .kneser_ney import KneserNey
from .start import Plan, glimpse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wherry.train.job import Job

matplotlib.use("Agg")
console = Console()
Bits = NDArray[np.float64]
GROUP = 64
PROMPTS = ("Acts 29\nAnd it came to pass, that Paul", "Psalms 151\nO LORD,", "Joyful, a.", "Journeyman, n.")
PARTS = {
    "held_out_book": text.HELD_OUT_BOOK,
    "held_out_letter": f"letter {text.HELD_OUT_LETTER}",
    "search_book": text.SEARCH_BOOK,
    "search_letter": f"letter {text.SEARCH_LETTER}",
}


@torch.no_grad()
def surprisal(
    model: LlamaForCausalLM, tokens: NDArray[np.int64], context: int = 512, rows: int = 8
) -> NDArray[np.float64]:
    """Bits of all tokens of a stream but the first, [n] -> [n - 1], each after context / 2 tokens or more."""
    half, device = context // 2, next(model.parameters()).device
    ids = torch.from_numpy(tokens)
    starts = list(range(0, max(1, len(ids) - 1 - half), half))
    out = torch.zeros(len(ids) - 1, dtype=torch.float64)
    for at in range(0, len(starts), rows):
        windows = [ids[s : s + context + 1] for s in starts[at : at + rows]]
        x = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True).to(device)
        logits = model(input_ids=x[:, :-1]).logits.float()
        bits = cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").double().cpu() / math.log(2)
        for s, window, row in zip(starts[at : at + rows], windows, bits, strict=True):
            new = half if s else 0
            out[s + new : s + len(window) - 1] = row[new : len(window) - 1]
    return out.numpy()


def per_document(bits: Bits, tokens: NDArray[np.int64]) -> Bits:
    """Sum the bits of a stream's tokens document by document, [n - 1] -> [documents]; END has id 0."""
    return np.add.reduceat(bits, np.flatnonzero(tokens == 0)[:-1])


def interval(bits: Bits, sizes: Bits) -> dict[str, float]:
    """Bits per byte of [documents] bits over [documents] bytes, with its 95% interval."""
    picks = np.random.default_rng(0).integers(len(bits), size=(2000, len(bits)))
    low, high = np.quantile(bits[picks].sum(1) / sizes[picks].sum(1), [0.025, 0.975])
    return {
        "value": round(float(bits.sum() / sizes.sum()), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }


def rounded(model: LlamaForCausalLM, width: int) -> LlamaForCausalLM:
    """Return a copy with the linears inside the layers rounded to `width` bits: asymmetric, groups of 64."""
    model = copy.deepcopy(model)
    top = 2**width - 1
    for name, p in model.named_parameters():
        if p.ndim == 2 and ".layers." in name:
            w = p.data.view(-1, GROUP)
            low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
            scale = ((high - low) / top).clamp(min=1e-8)
            zero = (-low / scale).round()
            p.data = (((w / scale).round() + zero).clamp(0, top) - zero).mul(scale).view_as(p)
    return model


def kneser_ney_bits(
    parts: dict[str, list[str]], streams: dict[str, NDArray[np.int64]], vocab: int
) -> dict[str, dict[str, Bits]]:
    """Score the parts kept apart by n-grams on the training text: {model: {part: bits per document}}.

    The mixture is of the 5-grams of the Bible alone and of all text, its weight chosen on the search parts.
    """

    def raw(documents: list[str]) -> NDArray[np.int64]:
        return np.frombuffer(("\0" + "\0".join(documents) + "\0").encode(), np.uint8).astype(np.int64)

    both = np.concatenate([streams["bible"], streams["dictionary"][1:]])
    order = min(5, 62 // (vocab - 1).bit_length())
    all_text, bible = KneserNey(both, order, vocab), KneserNey(streams["bible"], order, vocab)
    letters = KneserNey(raw(parts["bible"] + parts["dictionary"]), 7, 256)
    out: dict[str, dict[str, Bits]] = {}
    for kind in ("book", "letter"):
        weights, least = np.linspace(0, 1, 21), float("inf")
        for part in (f"search_{kind}", f"held_out_{kind}"):
            t, r = streams[part], raw(parts[part])
            p_all, p_bible = all_text.probabilities(t)[1:], bible.probabilities(t)[1:]
            if part.startswith("search"):
                costs = [-np.log2(w * p_bible + (1 - w) * p_all).sum() for w in weights]
                least = float(weights[int(np.argmin(costs))])
            for name, p, ids in (
                (f"{order}-gram over tokens, Bible and dictionary", p_all, t),
                (f"{order}-gram over tokens, Bible alone", p_bible, t),
                (f"mixture of these two {order}-grams", least * p_bible + (1 - least) * p_all, t),
                ("7-gram over bytes, Bible and dictionary", letters.probabilities(r)[1:], r),
            ):
                out.setdefault(name, {})[part] = per_document(-np.log2(p), ids)
    return out


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int = 1) -> str:
    """Continue a prompt by up to 90 tokens with the settings of generation_config.json."""
    torch.manual_seed(seed)
    ids = torch.tensor([[0, *tokenizer(prompt)["input_ids"]]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=90)
    return str(tokenizer.decode(out[0, 1:], skip_special_tokens=True)).strip()


def draw(path: Path, curve: list[list[float]], limits: dict[str, float], tokens: int) -> None:
    """Draw one question: when does the decoder pass the best n-gram on the parts watched while training?"""
    from matplotlib import pyplot as plt

    rows = np.asarray(curve)
    last = rows[-1, 0]
    passed = next((int(r[0]) for r in rows if r[1] < limits["search_book"]), None)
    title = f"passes the best n-gram within {passed} steps" if passed else "does not pass the best n-gram"
    plt.rcParams.update({"font.size": 10, "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=110)
    for column, part, colour in ((1, "search_book", "#0b6bcb"), (2, "search_letter", "#666666")):
        end = rows[-1, column]
        axes.plot(rows[:, 0], rows[:, column], color=colour, lw=2)
        axes.plot([0, last], [limits[part]] * 2, color=colour, lw=1, ls="--")
        for value, name in ((end, "decoder"), (limits[part], "best n-gram")):
            side = "bottom" if value == max(end, limits[part]) else "top"
            axes.text(last * 1.02, value, f"{name}, {PARTS[part]}: {value:.2f}", color=colour, va=side)
    axes.set(
        xlabel=f"training steps of {tokens} tokens",
        ylabel="bits per byte (lower is better)",
        xlim=(0, last * 1.42),
        ylim=(min(1.25, rows[:, 1].min() - 0.1), min(3.2, rows[:, 1:].max() + 0.1)),
    )
    axes.set_xticks(np.linspace(0, last, 6).round(-1))
    axes.set_title(f"On {PARTS['search_book']} the decoder {title}", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def table(header: Sequence[str], rows: list[Sequence[str]]) -> str:
    """Format a Markdown table, first column left, the others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(r) + " |" for r in (header, rule, *rows))


def write_card(
    out: Path,
    plan: Plan,
    parts: dict[str, list[str]],
    streams: dict[str, NDArray[np.int64]],
    log: dict[str, Any],
) -> None:
    """Measure everything from the published folder and write the card."""
    model = LlamaForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "model")
    sizes = {p: np.asarray([len(d.encode()) for d in parts[p]], np.float64) for p in PARTS}
    console.print("measuring: n-grams")
    ngrams = kneser_ney_bits(parts, streams, plan.vocab)
    bits: dict[str, dict[str, Bits]] = {}
    for name, width in (("fp16", 16), ("W8", 8), ("W4", 4), ("W3", 3), ("W2", 2)):
        console.print(f"measuring: {name}")
        one = model if width == 16 else rounded(model, width)
        kept = PARTS if width == 16 else ("held_out_book", "held_out_letter")
        bits[name] = {p: per_document(surprisal(one, streams[p], plan.context), streams[p]) for p in kept}
    best = {p: min(ngrams, key=lambda n: ngrams[n][p].sum()) for p in PARTS}
    limits = {
        p: round(float(ngrams[best[p]][p][: (m := len(glimpse(parts[p])))].sum() / sizes[p][:m].sum()), 4)
        for p in ("search_book", "search_letter")
    }  # on the same first documents as the training curve
    weights = out / "model" / "model.safetensors"
    card: dict[str, Any] = {
        "model": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": weights.stat().st_size,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "plan": asdict(plan),
        },
        "training": {k: log[k] for k in ("threads", "compiled", "device", "weights_sha256")}
        | {
            "minutes": round(log["seconds"] / 60, 1),
            "cpu_minutes": round(log["cpu_seconds"] / 60, 1),
            "tokens": plan.steps * (plan.bible_rows + plan.dictionary_rows) * plan.context,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "search_curve": log["search"],
            "search_curve_best_ngram": limits,
            "last_100_losses_nats_per_token": round(float(np.mean(log["train"][-100:])), 4),
        },
        "data": {
            name: {
                "documents": len(d),
                "bytes": sum(len(x.encode()) for x in d),
                "tokens": len(streams[name]),
                "sha256": hashlib.sha256("\n\n".join(d).encode()).hexdigest(),
            }
            for name, d in parts.items()
        },
        "sources": [asdict(s) for s in (text.KJV, text.GCIDE)],
        "bits_per_byte": {
            n: {p: interval(b, sizes[p]) for p, b in row.items()} for n, row in (bits | ngrams).items()
        },
        "decoder_minus_best_ngram": {
            p: interval(bits["fp16"][p] - ngrams[best[p]][p], sizes[p]) | {"ngram": best[p]} for p in PARTS
        },
        "rounding_damage": {
            n: {p: interval(b - bits["fp16"][p], sizes[p]) for p, b in bits[n].items()}
            for n in ("W8", "W4", "W3", "W2")
        },
        "perplexity_per_token": {
            n: {p: round(float(2 ** (b.sum() / (len(streams[p]) - 1))), 2) for p, b in row.items()}
            for n, row in bits.items()
        },
        "samples": [sample(model, tokenizer, prompt) for prompt in PROMPTS],
    }
    text.write(out / "card.json", json.dumps(card, indent=1) + "\n")
    draw(out / "curve.png", log["search"], limits, plan.context * (plan.bible_rows + plan.dictionary_rows))
    text.write(out / "README.md", readme(card))


def recipe(card: dict[str, Any]) -> Job:
    """The training run of a card, in the folder that `--prepare` made."""
    training = card["training"]
    plan = Plan(**card["model"]["plan"])
    return start.job(Path("run"), plan, training["threads"], training["device"], training["compiled"])


def readme(card: dict[str, Any]) -> str:
    """Fill card_template.md with card.json's figures."""
    book, letter = "held_out_book", "held_out_letter"
    bpb, gap, worse = card["bits_per_byte"], card["decoder_minus_best_ngram"], card["rounding_damage"]
    plan, training = card["model"]["plan"], card["training"]
    what = PARTS | {
        "bible": "the rest of the Bible",
        "dictionary": f"other letters, one entry in {plan['dictionary_one_in']}",
    }
    ahead, seen = gap[book]["high"] < 0, plan["steps"] * plan["bible_rows"] * plan["context"]
    seen_entries = plan["steps"] * plan["dictionary_rows"] * plan["context"]
    lead = {"value": -gap[book]["value"], "low": -gap[book]["high"], "high": -gap[book]["low"]}
    widths = [("fp16", 16), ("W8", 8), ("W4", 4), ("W3", 3), ("W2", 2)]
    values = {
        "models": table(
            ["Model", PARTS[book], PARTS[letter]],
            [
                [("**this decoder, fp16**" if n == "fp16" else n), cell(bpb[n][book]), cell(bpb[n][letter])]
                for n in ["fp16", *[n for n in bpb if "gram" in n]]
            ],
        ),
        "damage": table(
            ["Weights", "bits a weight", PARTS[book], "worse by", "perplexity", PARTS[letter]],
            [
                [
                    n,
                    f"{w if w == 16 else w + (16 + w) / GROUP:.2f}",
                    f"{bpb[n][book]['value']:.3f}",
                    "" if w == 16 else cell(worse[n][book], "+"),
                    f"{card['perplexity_per_token'][n][book]:.1f}",
                    f"{bpb[n][letter]['value']:.3f}",
                ]
                for n, w in widths
            ],
        ),
        "data": table(
            ["Part", "documents", "bytes", "tokens", "SHA-256"],
            [
                [
                    f"{name}: {what[name]}",
                    f"{d['documents']}",
                    f"{d['bytes']}",
                    f"{d['tokens']}",
                    f"`{d['sha256'][:16]}`",
                ]
                for name, d in card["data"].items()
            ],
        ),
        "sources": "\n".join(
            f"- Debian `{s['package']}`, `{s['member']}`: {s['licence']}.\n  SHA-256 `{s['sha256']}`"
            for s in card["sources"]
        ),
        "samples": "\n\n".join("```text\n" + s + "\n```" for s in card["samples"]),
        "book_name": PARTS[book],
        "book_bpb": f"{bpb['fp16'][book]['value']:.3f}",
        "book_gap": cell(gap[book], "+"),
        "book_rival": gap[book]["ngram"],
        "letter_name": text.HELD_OUT_LETTER,
        "letter_gap": cell(gap[letter], "+"),
        "letter_rival": gap[letter]["ngram"],
        "verdict": "better" if ahead else "not certainly better",
        "gain": cell(lead),
        "search_book": text.SEARCH_BOOK,
        "search_letter": text.SEARCH_LETTER,
        "picture": "curve.png",
        "group": GROUP,
        "parameters": f"{card['model']['parameters'] / 1e6:.2f}",
        "megabytes": f"{card['model']['bytes'] / 1e6:.1f}",
        "sha256": card["model"]["sha256"][:16],
        "device": training["device"],
        "torch": training["torch"],
        "tokens": f"{training['tokens'] / 1e6:.2f}",
        "epochs": f"{seen / card['data']['bible']['tokens']:.1f}",
        "dictionary_epochs": f"{seen_entries / card['data']['dictionary']['tokens']:.1f}",
        "threads": f"{training['threads']} thread{'s' if training['threads'] > 1 else ''}",
        "compiled": ", torch.compile" if training["compiled"] else "",
        "recipe": " \\\n".join(start.command(recipe(card))),
        "minutes": f"{training['minutes']:.0f}",
        "cpu_minutes": f"{training['cpu_minutes']:.0f}",
    }
    template = (Path(__file__).parent / "card_template.md").read_text(encoding="utf-8")
    return template.format_map(plan | values)


def cell(row: dict[str, float], sign: str = "") -> str:
    """Format a figure with its interval."""
    return f"{row['value']:{sign}.3f} [{row['low']:{sign}.3f}, {row['high']:{sign}.3f}]"

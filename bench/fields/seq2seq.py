"""A small mBART trained here: numbers in figures to English words (4071: four thousand seventy one), judged by BLEU.

Source: transformers' MBartForConditionalGeneration, 0.9M parameters; Liu et al. 2020, arXiv:2001.08210 (the layout).
Data:   whole numbers below a million, the short ones more common than they are. 12000 train, 32 calibrate, 300 judge,
        no number in two of them.
Cost:   training takes about 20 seconds of one core, seeded.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from field import Feeds, Field, Run, export, read_task, write_task
from minilm import read, write
from torch.nn import functional as F

ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
        "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SPECIAL = ("<pad>", "<s>", "</s>")
WORDS = (*SPECIAL, *"0123456789", *ONES, *TENS, "hundred", "thousand")
PAD, START, END = range(3)
COUNTS = {"training": 12000, "calibration": 32, "held_out": 300}
STEPS, BATCH, RATE, MOST = 200, 64, 1e-3, 16


def spell(number: int) -> str:
    """A whole number below a million in words, without "and"."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f" {ONES[number % 10]}" if number % 10 else "")
    if number < 1000:
        return f"{ONES[number // 100]} hundred" + (f" {spell(number % 100)}" if number % 100 else "")
    return f"{spell(number // 1000)} thousand" + (f" {spell(number % 1000)}" if number % 1000 else "")


def numbers() -> dict[str, list[int]]:
    """Which numbers are in which part; drawn with a seed, each once."""
    drawn, found = np.random.default_rng(0), []
    while len(found) < sum(COUNTS.values()):
        found += [int(drawn.integers(10 ** int(drawn.integers(2, 7)))) for _ in range(4000)]
        found = list(dict.fromkeys(found))
    found = [found[i] for i in drawn.permutation(len(found))]
    ends = np.cumsum([0, *COUNTS.values()])
    return {part: found[ends[i] : ends[i + 1]] for i, part in enumerate(COUNTS)}


def ids(words: str) -> list[int]:
    """Ids of words with the end."""
    return [*(WORDS.index(word) for word in words.split()), END]


def source(number: int) -> str:
    """What is read: the figures, one by one."""
    return " ".join(str(number))


def padded(rows: list[list[int]]) -> torch.Tensor:
    """Ids [rows, longest]."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


def train() -> Any:
    """An mBART of two and two layers, 200 steps of AdamW, the rate rising and falling; the same from the same seed."""
    from transformers import MBartConfig, MBartForConditionalGeneration

    torch.manual_seed(0)
    config = MBartConfig(
        vocab_size=len(WORDS), d_model=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=512, decoder_ffn_dim=512, max_position_embeddings=32, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, pad_token_id=PAD, bos_token_id=START, eos_token_id=END,
        decoder_start_token_id=START, forced_eos_token_id=None, attn_implementation="eager", init_std=0.06,
    )  # fmt: skip
    model = MBartForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, betas=(0.9, 0.98))
    pool, drawn = numbers()["training"], np.random.default_rng(1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        chosen = [pool[i] for i in drawn.integers(0, len(pool), BATCH)]
        given, wanted = padded([ids(source(n)) for n in chosen]), padded([ids(spell(n)) for n in chosen])
        before = torch.cat([torch.full((BATCH, 1), START), wanted[:, :-1]], 1)
        logits = model(input_ids=given, attention_mask=(given != PAD).long(), decoder_input_ids=before).logits
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


class Encoder(torch.nn.Module):
    """The encoder with one output."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.inner = whole.model.encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Ids and mask [batch, sequence] to hidden states [batch, sequence, 128]."""
        return self.inner(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class Decoder(torch.nn.Module):
    """The decoder without a cache, with the head."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.inner, self.head, self.bias = whole.model.decoder, whole.lm_head, whole.final_logits_bias

    def forward(
        self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Ids written so far [batch, written] and the encoder's states to logits [batch, written, vocabulary]."""
        states = self.inner(
            input_ids=input_ids, encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask, use_cache=False,
        )  # fmt: skip
        return self.head(states.last_hidden_state) + self.bias


def build(folder: Path) -> None:
    """Train, then graphs, tokenizer, task and data."""
    whole = train()
    first, second = padded([ids("4 0 7 1"), ids("9 9")]), padded([ids("1 2 3 4 5 6"), ids("7"), ids("8 0")])
    inputs = [(one, (one != PAD).long()) for one in (first, second)]
    axes = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}
    encoder = Encoder(whole)
    export(encoder, inputs[0], folder / "encoder_model.onnx", axes, ["last_hidden_state"], inputs[1])
    written = [torch.tensor([[1, 5, 6], [1, 7, 8]]), torch.tensor([[1, 5, 6, 7], [1, 7, 8, 2], [1, 9, 3, 2]])]
    with torch.inference_mode():
        states = [encoder(*one).clone() for one in inputs]
    given = [(now, state, one[1]) for now, state, one in zip(written, states, inputs, strict=True)]
    axes = {"input_ids": {0: "batch", 1: "written"}, "encoder_hidden_states": {0: "batch", 1: "sequence"},
            "encoder_attention_mask": {0: "batch", 1: "sequence"}}  # fmt: skip
    export(Decoder(whole), given[0], folder / "decoder_model.onnx", axes, ["logits"], given[1])
    for part in ("calibration", "held_out"):
        write(folder / f"{part}.tsv", ["source", "target"], [(source(n), spell(n)) for n in numbers()[part]])
    _tokenizer(folder)
    write_task(
        folder, "translation", inputs=["input_ids", "attention_mask"], outputs=["logits"], max_length=32,
        processor={"start": [START], "most": MOST}, training=["numbers/train"], held_out=["numbers/held-out"],
    )  # fmt: skip


def _tokenizer(folder: Path) -> None:
    """Words to ids, the end after them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=SPECIAL[PAD]))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"pad_token": SPECIAL[PAD], "bos_token": SPECIAL[START], "eos_token": SPECIAL[END]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")


def translate(folder: Path, run: Run, text: str) -> tuple[list[int], Feeds]:
    """Ids that are written one by one, the most likely each, and the decoder's last inputs."""
    processor, given = read_task(folder)["processor"], np.array([ids(text)], dtype=np.int64)
    mask, out = np.ones_like(given), list(processor["start"])
    hidden = run("encoder_model", {"input_ids": given, "attention_mask": mask})["last_hidden_state"]
    feeds: Feeds = {}
    while len(out) <= processor["most"] and out[-1] != END:
        feeds = {"input_ids": np.array([out], dtype=np.int64), "encoder_hidden_states": hidden}
        feeds["encoder_attention_mask"] = mask
        out.append(int(run("decoder_model", feeds)["logits"][0, -1].argmax()))
    return out, feeds


def calibration(folder: Path, run: Run) -> dict[str, list[Feeds]]:
    """Figures; for the decoder the float model's own words with the float encoder's states."""
    encoder, decoder = [], []
    for row in read(folder / "calibration.tsv"):
        given = np.array([ids(row["source"])], dtype=np.int64)
        encoder.append({"input_ids": given, "attention_mask": np.ones_like(given)})
        decoder.append(translate(folder, run, row["source"])[1])
    return {"encoder_model": encoder, "decoder_model": decoder}


def judge(folder: Path, run: Run) -> np.ndarray:
    """What BLEU counts of each number (lengths, matches and totals of 1 to 4 words), and exactness [numbers, 11]."""
    from sacrebleu.metrics import BLEU

    bleu, units = BLEU(tokenize="none", effective_order=True), []
    for row in read(folder / "held_out.tsv"):
        out, _ = translate(folder, run, row["source"])
        said = " ".join(WORDS[i] for i in out if i >= len(SPECIAL))
        one = bleu.sentence_score(said, [row["target"]])
        units.append([one.sys_len, one.ref_len, *one.counts, *one.totals, said == row["target"]])
    return np.array(units, dtype=float)


def example(folder: Path) -> dict[str, Feeds]:
    """Six figures, and one step of the decoder after eight words."""
    given = np.array([ids("4 0 7 1 6 2")], dtype=np.int64)
    hidden = np.random.default_rng(0).standard_normal((1, given.shape[1], 128)).astype(np.float32)
    decoder = {"input_ids": np.arange(1, 10, dtype=np.int64)[None], "encoder_hidden_states": hidden}
    return {
        "encoder_model": {"input_ids": given, "attention_mask": np.ones_like(given)},
        "decoder_model": decoder | {"encoder_attention_mask": np.ones_like(given)},
    }


FIELD = Field(
    "seq2seq", "mBART (trained here), figures to words, BLEU", "bleu", build, calibration, judge, example,
    "trained on 12000 numbers; 32 others calibrate, 300 others judge", ("encoder_model", "decoder_model"),
)  # fmt: skip

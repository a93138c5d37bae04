"""A tiny Llama that has learnt two answers by heart, a tiny BERT, served by the torch runtime."""

import json
import time
from contextlib import contextmanager

import pytest

from wherry.artifact import Artifact
from wherry.shelf import find
from wherry.task import Task

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LEARNT = {
    "Where does the boat go?": "Up the shallow rivers 🚣🏽‍♀️, past 漢字 and naïve ducks. Then STOP, it comes home.",
    "What does it carry?": "Coal, corn and 1,000 small secrets 🤫.",
}
ENDLESS = "Row,"  # a completion of this never ends by itself


class Seen:
    """A real session, watched: `open` counts running answers, `calls` and `sizes` what came in, `pace_s` slows it."""

    def __init__(self, session):
        self.session, self.grade, self.facts = session, session.grade, session.facts
        self.open, self.pace_s, self.calls, self.sizes = 0, 0.0, [], []

    def generate(self, tokens, sampling):
        self.open += 1
        self.calls.append((list(tokens), sampling))
        try:
            for token in self.session.generate(tokens, sampling):
                time.sleep(self.pace_s)
                yield token
        finally:
            self.open -= 1

    def predict(self, inputs):
        time.sleep(self.pace_s)
        self.sizes.append(len(inputs["input_ids"]))
        return self.session.predict(inputs)

    @contextmanager
    def slow(self, pace_s):
        self.pace_s = pace_s
        try:
            yield
        finally:
            self.pace_s = 0.0

    def close(self):
        self.session.close()


def load(artifact):
    return Seen(find("runtimes", "torch").load(artifact, threads=1))


def write_tokenizer(folder):
    """Byte-level BPE with few merges, so that most characters beyond ASCII span several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the boat goes up the river and the rain comes down on the boat"] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def seal(folder, model, task, name):
    model.save_pretrained(folder)
    plan = [{"name": "model.layers.0.mlp.up_proj.weight", "scheme": "W4A16,group_size=32", "bytes": 1}]
    return Artifact.seal(
        folder, format="safetensors", main="model.safetensors", task=task.to_dict(), model=name, license="apache-2.0",
        recipe="rtn:scheme=W4A16", source=str(folder), params=sum(p.numel() for p in model.parameters()), plan=plan,
    )  # fmt: skip


@pytest.fixture(scope="session")
def learnt():
    """{question: answer} that the tiny writer knows by heart."""
    return LEARNT


@pytest.fixture(scope="session")
def writer(tmp_path_factory):
    """(session, artifact) of a tiny Llama that knows LEARNT by heart and goes on with ENDLESS for ever."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-writer")
    tokenizer = write_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    task = Task("text-generation", folder, max_length=512)
    texts = [task.chat([{"role": "user", "content": q}]) + a + "<|im_end|>" for q, a in LEARNT.items()]
    rows = [tokenizer.encode(text).ids for text in texts] + [tokenizer.encode(ENDLESS + " row," * 120).ids]
    width = max(map(len, rows))
    ids = torch.tensor([row + [1] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(400):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.01:
            break
    model.eval()
    artifact = seal(folder, model, task, "tiny-writer")
    return load(artifact), artifact


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """(session, artifact) of a tiny BERT with mean pooling and unit vectors."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny-encoder")
    letters = {c: i for i, c in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    config = BertConfig(
        vocab_size=len(letters), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BertModel(config).eval()
    names = ("input_ids", "attention_mask", "token_type_ids")
    task = Task("sentence-similarity", folder, 64, "mean", True, names)
    artifact = seal(folder, model, task, "tiny-encoder")
    return load(artifact), artifact

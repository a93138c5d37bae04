"""Seeded tiny models that every test may use: real architectures, real tokenizers, random weights."""

import json
import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# a shell that starts the tests in the background has interrupts ignored, here and in every process that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)

SKIPS_MOST = 12  # tests that may be skipped, each with a reason, where all data is absent; more is a failure


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that skips more than the bound: a test that never runs shows nothing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = len(reporter.stats.get("skipped", [])) if reporter else 0
    if skipped > SKIPS_MOST:
        reporter.write_line(
            f"{skipped} tests skipped, at most {SKIPS_MOST} may be (SKIPS_MOST in tests/conftest.py)", red=True
        )
        session.exitstatus = 1


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def data_folder() -> Path | None:
    """The folder of data outside of the repository, or None."""
    folder = os.environ.get("WHERRY_DATA")
    return Path(folder).resolve() if folder else None


@pytest.fixture(scope="session")
def wherry_data() -> Path:
    folder = data_folder()
    if folder is None or not folder.is_dir():
        pytest.skip("WHERRY_DATA is not set: data outside of the repository is not here")
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 512 tokens, trained on the shipped text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from wherry.data import shipped

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[PAD]"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([shipped("calibration").read_text(encoding="utf8")[:20000]], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>",
        "pad_token": "[PAD]", "unk_token": "<|endoftext|>", "chat_template": CHAT, "model_max_length": 256,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_llama(
    folder: Path, layers: int = 2, hidden: int = 64, tied: bool = True, seed: int = 0, **extra: object
) -> Path:
    """A random LlamaForCausalLM with grouped-query attention, sharpened so that its logits are not flat."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    extra = {"intermediate_size": 2 * hidden, **extra}
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
        rms_norm_eps=1e-5, **extra,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_bert(folder: Path, seed: int = 0) -> Path:
    """A random BertModel laid out as a sentence-transformers folder with mean pooling."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=128,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Normalize"}]))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64}))
    return folder


def write_wordpiece(folder: Path) -> Path:
    """The tiny BERT with a WordPiece tokenizer of a few words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    write_bert(folder)
    words = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"]
    words += ["boat", "##ing", "river", "the", "cargo", "old"]
    words += [f"w{i}" for i in range(512 - len(words))]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 layers, hidden 64, 4 heads over 2, tied embedding; folder with safetensors and tokenizer."""
    return write_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 layers, hidden 64; folder with pooling files."""
    return write_bert(tmp_path_factory.mktemp("models") / "tiny-bert")

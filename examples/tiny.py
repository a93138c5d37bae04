"""Two seeded models of a few hundred kB, so that every example runs in seconds and without a network.

They have real architectures and random weights: good for looking at the tool, not at the answers.
"""

import json
import os
from pathlib import Path
from tempfile import mkdtemp

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def language_model() -> Path:
    """A Llama of 2 blocks in a new folder, as save_pretrained leaves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    named = {"tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
    return _save(LlamaForCausalLM, LlamaConfig(**sizes, **heads, **named))


def encoder() -> Path:
    """A BERT of 2 blocks with mean pooling, laid out as sentence-transformers does."""
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    folder = _save(BertModel, BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=128))
    (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Normalize"}]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return folder


def _save(kind, config) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    torch.manual_seed(0)
    folder = Path(mkdtemp(prefix="tiny-"))
    kind(config).save_pretrained(folder)
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, letters = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[PAD]"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=letters, show_progress=False)
    words.train_from_iterator([CHAT * 50 + __doc__], trainer)
    words.save(str(folder / "tokenizer.json"))
    named = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "[PAD]", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder

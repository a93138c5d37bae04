"""Writer: an encoder and a decoder session that write an answer together, id by id, always the likeliest (greedy).

Shapes: encoder: the task's inputs to hidden states [batch, places, width], its first output. decoder: `input_ids`
        int64 [batch, written], `encoder_hidden_states`, and `encoder_attention_mask` [batch, places] where the graph
        takes it, to `logits` [batch, written, vocabulary].
Cost:   without a key-value cache: the decoder reads all that is written again for each id, O(n^2) for n ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wherry.errors import BadInput
from wherry.session import Session
from wherry.task import Task

MOST = 64


@dataclass(frozen=True)
class Writer:
    """Sessions of the two graphs, and the task with `start`, `most` and `suppress` in its processor.

    masked: whether the decoder has the input `encoder_attention_mask`.
    """

    encoder: Session
    decoder: Session
    task: Task
    masked: bool = True

    grade = "C"

    @property
    def facts(self) -> dict[str, str]:
        """Of the encoder's session; the decoder's is the same runtime."""
        return self.encoder.facts

    def write(self, inputs: dict[str, np.ndarray]) -> list[str]:
        """The answer to each example of a batch of encoder inputs, as text."""
        special = set(self.start) | set(self.task.stop)
        rows = self.ids(inputs)
        return [self.task.tokenizer.decode([i for i in row if i not in special]).strip() for row in rows]

    @property
    def start(self) -> list[int]:
        """Ids that every answer begins with."""
        found = self.task.processor.get("start", [])
        if not (isinstance(found, list | tuple) and found and all(isinstance(i, int) and i >= 0 for i in found)):
            raise BadInput("task.json: a processor of a task that writes needs `start`, the ids an answer begins with")
        return list(found)

    def ids(self, inputs: dict[str, np.ndarray]) -> list[list[int]]:
        """The ids written for each example, without the start and the stop."""
        hidden = next(iter(self.encoder.predict(inputs).values()))
        mask = inputs.get("attention_mask")
        if mask is None or mask.shape[1] != hidden.shape[1]:
            mask = np.ones(hidden.shape[:2], np.int64)
        most, start = int(self.task.processor.get("most", MOST)), self.start
        suppress = list(self.task.processor.get("suppress", []))
        written = np.tile(np.array(start, np.int64), (len(hidden), 1))
        done = np.zeros(len(hidden), bool)
        stop = np.array(self.task.stop, np.int64)
        if not len(stop):
            raise BadInput("no id ends an answer: give eos_token_id in config.json or generation_config.json")
        for _ in range(most):
            feeds = {"input_ids": written, "encoder_hidden_states": hidden}
            if self.masked:
                feeds["encoder_attention_mask"] = mask
            logits = np.array(self.decode(feeds)[:, -1], np.float32)
            logits[:, suppress] = -np.inf
            following = np.where(done, stop[0], logits.argmax(-1))
            done |= np.isin(following, stop)
            written = np.concatenate([written, following[:, None].astype(np.int64)], 1)
            if done.all():
                break
        return [_until(row[len(start) :].tolist(), set(stop.tolist())) for row in written]

    def decode(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """Logits [batch, written, vocabulary] of the decoder."""
        found = self.decoder.predict(feeds)
        return found["logits"] if "logits" in found else next(iter(found.values()))

    def close(self) -> None:
        """Close both sessions."""
        self.encoder.close()
        self.decoder.close()


def _until(row: Sequence[int], stop: set[int]) -> list[int]:
    for i, token in enumerate(row):
        if token in stop:
            return list(row[:i])
    return list(row)

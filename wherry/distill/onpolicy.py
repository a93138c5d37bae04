"""On-policy: the student writes a part of each sample itself, and is taught where it went.

Source: Agarwal et al. 2023 (GKD, arXiv:2306.13649): with own samples the student learns on what it will
    see when it generates; Gu et al. 2023 (MiniLLM, arXiv:2306.08543), for reverse KL beside it.
Idea:   the first `prompt` tokens of a window stay, the student samples the rest; targets are what it wrote, the
        prompt's do not count. Gradients do not pass through the sampling. A step is on-policy with probability `share`.
Shapes: input_ids, targets [B, T]; sampled with a key-value cache by transformers' generate.
Cost:   T - prompt forward passes of one token for an own sample.
Fails:  Unsupported for a model that cannot generate; BadInput for a prompt as long as a window.
"""

from dataclasses import dataclass
from typing import Any

import torch

from wherry.errors import BadInput, Unsupported
from wherry.objective import IGNORE, Step


@dataclass(frozen=True, kw_only=True)
class OnPolicy(Step):
    """share: of the steps, 0 to 1. prompt: tokens that stay. temperature: of the sampling."""

    share: float = 0.5
    prompt: int = 16
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.prompt < 1 or not self.temperature > 0:
            raise BadInput(
                f"onpolicy: share={self.share:g}, prompt={self.prompt}, temperature={self.temperature:g}: "
                "a share of 0 to 1, a prompt of a token or more, a temperature above 0"
            )

    def count(self, batch: Any) -> int:
        """It has no loss of its own."""
        return 0

    def turn(self, step: int) -> bool:
        """Whether a step is on-policy: the same on every rank, and in a resumed run."""
        drawn = torch.rand((), generator=torch.Generator().manual_seed(1_000_003 * step + 17))
        return float(drawn) < self.share

    @torch.no_grad()
    def sample(self, module: Any, batch: Any, step: int) -> Any:
        """The batch, or one whose rows go on as the student does."""
        if not self.turn(step):
            return batch
        ids = batch.get("input_ids")
        if ids is None or not hasattr(module, "generate") or "position_ids" in batch:
            raise Unsupported("onpolicy: the student must be a language model that generates, on packing=stream")
        length = ids.shape[1]
        if self.prompt >= length:
            raise BadInput(f"onpolicy: prompt={self.prompt} leaves nothing of windows of {length} tokens")
        training = module.training
        module.eval()
        wrote = module.generate(
            ids[:, : self.prompt], do_sample=True, temperature=self.temperature, top_k=0, top_p=1.0, use_cache=True,
            min_new_tokens=length + 1 - self.prompt, max_new_tokens=length + 1 - self.prompt,
            attention_mask=torch.ones_like(ids[:, : self.prompt]), pad_token_id=0,
        )  # fmt: skip
        module.train(training)
        targets = wrote[:, 1:].clone()
        targets[:, : self.prompt - 1] = IGNORE
        return {**batch, "input_ids": wrote[:, :-1], "targets": targets}

"""TRL's GKD trainer on texts as they are (lmbda 0), for bench/healing.py.

    python trl_gkd.py STUDENT TEACHER ROWS.npy OUT --rate 3e-4 --batch 8 --beta 0

beta 0 is forward KL, 0.5 (TRL's default) Jensen-Shannon. ROWS: token ids [steps * batch, length + 1], in the
order of our own run. Everything else is the trainer's: AdamW, cosine, 5% warm-up. Environment: see torchao_qat.py.
"""

import argparse
import json
import time

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: TID253
from trl.experimental.gkd import GKDConfig, GKDTrainer


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Whole rows: every token but the first is learned."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    labels = ids.clone()
    labels[:, 0] = -100  # GKDTrainer takes the first label as part of a prompt
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
        "prompts": ids[:, :1], "prompt_attention_mask": torch.ones_like(ids[:, :1]),
    }  # fmt: skip


class InOrder(GKDTrainer):
    """The trainer with rows in the order of the file."""

    def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser()
    for name in ("student", "teacher", "rows", "out"):
        parser.add_argument(name)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--beta", type=float, default=0.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = np.load(args.rows, allow_pickle=False).astype(np.int64)
    steps = len(rows) // args.batch
    config = GKDConfig(
        output_dir=args.out + ".run", per_device_train_batch_size=args.batch, max_steps=steps, learning_rate=args.rate,
        lr_scheduler_type="cosine", warmup_steps=max(1, steps // 20), adam_beta2=0.95, lmbda=0.0, beta=args.beta,
        temperature=1.0, seq_kd=False, report_to=[], save_strategy="no", logging_steps=10, use_cpu=True, bf16=False,
        gradient_checkpointing=False, max_length=rows.shape[1], remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32),
        args=config, train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}), processing_class=tokenizer,
        data_collator=collate,
    )  # fmt: skip
    began = time.process_time()
    trainer.train()
    seconds = time.process_time() - began
    trainer.model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(json.dumps({"seconds": seconds, "loss": trainer.state.log_history[-2].get("loss"), "steps": steps}))


main()

"""Torch-Pruning on ResNet-20: PEER GOAL DENSE OUT. Prunes until GOAL multiply-accumulates, writes a graph model.

GroupTaylorImportance with the gradients of 512 training images, global pruning, isomorphic groups as its documentation
advises; the ratio is searched so that multiply-accumulates are at most GOAL.
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "fields")]


class Named(torch.nn.Module):
    """The network with the name that the dense graph gives its input."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.network(pixel_values)


def main() -> None:
    """The driver."""
    peer, goal, dense, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    sys.path.insert(0, str(peer))
    import resnet20
    import torch_pruning as tp

    from wherry import data
    from wherry.capture import capture
    from wherry.checkpoint import Checkpoint

    task = Checkpoint.open(dense).task
    found = data.read(dense.parent / "cifar-train")
    chosen = np.random.default_rng(0).choice(len(found.examples), 512, replace=False)
    targets = data.targets(found, task)
    example = torch.zeros(1, 3, 32, 32)
    whole = resnet20.model()
    for i in range(0, 512, 64):
        x = torch.from_numpy(task.prepare([found.examples[j] for j in chosen[i : i + 64]])["pixel_values"])
        y = torch.tensor([int(targets[j]) for j in chosen[i : i + 64]])
        torch.nn.functional.cross_entropy(whole(x), y).backward()
    grads = {name: p.grad for name, p in whole.named_parameters()}
    low, high, best = 0.0, 0.9, None
    for _ in range(8):
        ratio = (low + high) / 2
        network = copy.deepcopy(whole)
        for name, p in network.named_parameters():
            p.grad = grads[name].clone()
        pruner = tp.pruner.BasePruner(
            network, example, importance=tp.importance.GroupTaylorImportance(), pruning_ratio=ratio,
            global_pruning=True, ignored_layers=[network.linear], max_pruning_ratio=0.9,
        )  # fmt: skip
        pruner.step()
        macs, parameters = tp.utils.count_ops_and_params(network, example)
        print(f"ratio {ratio:.3f}: {macs:,.0f} multiply-accumulates, {parameters:,} parameters", flush=True)
        if macs <= goal:
            high, best = ratio, network
        else:
            low = ratio
    if best is None:
        raise SystemExit("no ratio reaches the goal")
    capture(Named(best.eval()), out, {"pixel_values": torch.randn(2, 3, 32, 32)}, task, outputs=["logits"])


if __name__ == "__main__":
    main()

"""What training the two bundled bases has in common: one optimizer step, the schedule, stopping and going on."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Trainer:
    """Model, optimizer and step counter; everything needed to go on after a stop.

    A subclass sets `name`, `warm_up` (steps), `model` and `optimizer` (whose groups may have a "factor" of the
    learning rate), calls `resume`, and gives `loss()` of the batch of step `self.step`, `evaluate` and `export`.
    """

    name: str
    warm_up: int
    model: Any
    optimizer: torch.optim.Optimizer

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.work, self.step = args, Path(args.work), 0

    def resume(self) -> None:
        """Go on from the saved state, where there is one."""
        path = self.work / f"{self.name}.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def save(self) -> None:
        """Write the state, atomically."""
        self.work.mkdir(parents=True, exist_ok=True)
        temporary = self.work / f"{self.name}.pt.tmp"
        torch.save(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step},
            temporary,
        )
        temporary.replace(self.work / f"{self.name}.pt")

    def loss(self) -> torch.Tensor:
        """Loss of the batch of the present step."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Scores on what it never saw."""
        raise NotImplementedError

    def export(self) -> None:
        """Write the Hugging Face checkpoint."""
        raise NotImplementedError

    def train_step(self) -> float:
        """One optimizer step; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * self._schedule() * group.get("factor", 1.0)
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def _schedule(self) -> float:
        """Linear warm-up, then a cosine to 2%."""
        if self.step < self.warm_up:
            return (self.step + 1) / self.warm_up
        share = min(1.0, (self.step - self.warm_up) / max(1, self.args.steps - self.warm_up))
        return float(0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * share)))

    def run(self) -> None:
        """Train to the last step, saving and evaluating on the way, and export."""
        started, losses = time.time(), []
        while self.step < self.args.steps:
            losses.append(self.train_step())
            if self.step % 50 == 0:
                rate = 50 / (time.time() - started)
                print(f"step {self.step} loss {np.mean(losses[-50:]):.3f} {rate:.2f} steps/s", flush=True)
                started = time.time()
            if self.step % 250 == 0:
                self.save()
                print("   ", self.evaluate(), flush=True)
                started = time.time()
        self.save()
        print("   ", self.evaluate(), flush=True)
        self.export()


def arguments(
    description: str | None, output: str, steps: int, learning_rate: float, **sizes: tuple[int, str]
) -> argparse.Namespace:
    """The command line of both; `sizes` are further whole-number options: default and help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=output, help="where the checkpoint goes")
    parser.add_argument("--work", default="bases-work", help="where the state for resuming goes")
    parser.add_argument("--steps", type=int, default=steps)
    for name, (default, text) in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=text)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True, help="products in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()

"""Lightning: a network inside a LightningModule keeps training while the C++ compiler is broken, and recovers.

    .venv-recipes/bin/python examples/recipes/lightning_module.py

`make recipes` creates that environment. The network in the LightningModule is compiled in place. `training_step` stays
plain Python, because it logs. Checkpoints have the names of the plain module.

The statistics go to the Trainer's logger. Here it writes a CSV file, which is read back at the end.
"""

from __future__ import annotations

import csv
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compile_retry import CompileState, RetryPolicy, compile_with_fallback, compiled_function
from compile_retry.testing import broken_compiler

STEPS, REPAIRED_AFTER = 10, 4


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
        compile_with_fallback(self.net, name="net", policy=RetryPolicy.every(calls=2))

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.net(inputs), targets)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        stats = compiled_function(self.net).stats.as_dict()
        self.log_dict({f"compile/{name}": float(value) for name, value in stats.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def make_data() -> DataLoader[tuple[Tensor, ...]]:
    inputs = torch.randn(4 * STEPS, 8)
    return DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=4)


def make_trainer(folder: str, fault: ExitStack) -> Trainer:
    def repair(trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == REPAIRED_AFTER:
            print(">>> the compiler is repaired")
            fault.close()

    return Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(folder, name="", version=""),  # or TensorBoardLogger, WandbLogger, ...
        log_every_n_steps=1,
        callbacks=[LambdaCallback(on_train_batch_end=repair)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> None:
    module = Regression()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as fault:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"  # empty, because a cache hit needs no compiler
        fault.enter_context(broken_compiler())
        trainer = make_trainer(folder, fault)
        trainer.fit(module, make_data())
        with Path(folder, "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        checkpoint = torch.load(trainer.checkpoint_callback.best_model_path)

    compiled = compiled_function(module.net)
    for row in rows:
        print(f"step {row['step']}: loss {float(row['loss']):7.4f}, compiled calls {row['compile/compiled_calls']}")
    assert compiled.stats.failures == 2, "two attempts failed"
    assert compiled.stats.calls == trainer.global_step == STEPS, "every step was taken, once"
    assert compiled.state is CompileState.COMPILED, "it recovered"
    assert [float(row["compile/recoveries"]) for row in rows] == [0] * 4 + [1] * 6, "the CSV file shows the recovery"
    assert next(iter(checkpoint["state_dict"])) == "net.0.weight", "the checkpoint is that of a plain module"


if __name__ == "__main__":
    main()

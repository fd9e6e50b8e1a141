"""Accelerate: a loop with gradient accumulation keeps training while the C++ compiler is broken; TensorBoard shows it.

    .venv-recipes/bin/python examples/recipes/hf_accelerate.py

`make recipes` creates that environment. The model is compiled in place, before `accelerator.prepare()`. Mixed precision
and DistributedDataParallel are applied to it as to a plain model, and `unwrap_model` and `save_state` find the object
and the names that they expect.

The statistics go to the accelerator's trackers, with the loss. Here the tracker is TensorBoard; its files are read back
at the end.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compile_retry import CompiledFunction, CompileState, RetryPolicy, compile_with_fallback, compiled_function
from compile_retry.testing import broken_compiler

STEPS, REPAIRED_AFTER = 10, 4


def make_data() -> DataLoader[tuple[torch.Tensor, ...]]:
    inputs = torch.randn(4 * STEPS, 8)
    return DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=4)


def train(folder: str, fault: ExitStack) -> CompiledFunction[..., Any]:
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=2,
        log_with="tensorboard",  # or "wandb", ...
        project_dir=folder,
    )
    accelerator.init_trackers("recipe")
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
    compile_with_fallback(model, policy=RetryPolicy.every(calls=2))
    compiled = compiled_function(model)  # before prepare(), which may wrap the model

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    prepared, optimizer, data = accelerator.prepare(model, optimizer, make_data())
    for step, (inputs, targets) in enumerate(data, start=1):
        with accelerator.accumulate(prepared):
            loss = nn.functional.mse_loss(prepared(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():7.4f}, {compiled.state.value}")
        stats = compiled.stats.as_dict()
        accelerator.log({"loss": loss.item()} | {f"compile/{name}": value for name, value in stats.items()}, step=step)
        if step == REPAIRED_AFTER:
            print(">>> the compiler is repaired")
            fault.close()
    accelerator.end_training()
    assert accelerator.unwrap_model(prepared) is model, "prepare() kept the model"
    return compiled


def main() -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as fault:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"  # empty, because a cache hit needs no compiler
        fault.enter_context(broken_compiler())
        compiled = train(folder, fault)
        board = EventAccumulator(str(Path(folder, "recipe"))).Reload()
        compiled_calls = [int(scalar.value) for scalar in board.Scalars("compile/compiled_calls")]

    print(f"TensorBoard has compile/compiled_calls: {compiled_calls}")
    assert compiled.stats.failures == 2, "two attempts failed"
    assert compiled.stats.calls == STEPS, "every step was taken, once"
    assert compiled.state is CompileState.COMPILED, "it recovered"
    assert compiled_calls == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6], "TensorBoard shows the recovery"


if __name__ == "__main__":
    main()

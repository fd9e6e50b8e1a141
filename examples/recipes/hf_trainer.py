"""Hugging Face Trainer: a language model keeps training while the C++ compiler is broken, and recovers afterwards.

    .venv-recipes/bin/python examples/recipes/hf_trainer.py

`make recipes` creates that environment. The model is compiled in place, before it is passed to the Trainer. It stays
the same `LlamaForCausalLM`: the Trainer finds the signature of its `forward`, and checkpoints keep their names.

The statistics appear next to the losses: in the Trainer's `log_history`, and in the trackers named by `report_to`.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from compile_retry import CompileState, RetryPolicy, compile_with_fallback, compiled_function
from compile_retry.testing import broken_compiler

STEPS, REPAIRED_AFTER = 8, 4


class CompileAwareTrainer(Trainer):
    """Adds the compile statistics to everything that is logged."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        stats = compiled_function(self.model).stats.as_dict()
        super().log(logs | {f"compile/{name}": value for name, value in stats.items()}, *args, **kwargs)


class Repair(TrainerCallback):
    """Ends the fault after a certain step, without notifying the model."""

    def __init__(self, fault: ExitStack) -> None:
        self.fault = fault

    def on_step_end(self, arguments: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == REPAIRED_AFTER:
            print(">>> the compiler is repaired")
            self.fault.close()


def make_trainer(folder: str, fault: ExitStack) -> Trainer:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    texts = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(64, (32, 16))]
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        logging_steps=2,
        report_to="none",  # yours: "tensorboard", "wandb", ...
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    compile_with_fallback(model, policy=RetryPolicy.every(calls=2))
    return CompileAwareTrainer(model, arguments, train_dataset=texts, callbacks=[Repair(fault)])


def main() -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as fault:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"  # empty, because a cache hit needs no compiler
        fault.enter_context(broken_compiler())
        trainer = make_trainer(folder, fault)
        trainer.train()
        trainer.save_model(folder)
        reloaded = LlamaForCausalLM.from_pretrained(folder)

    compiled = compiled_function(trainer.model)
    print(f"{compiled}: {compiled.stats}")
    assert compiled.stats.failures == 2, "two attempts failed"
    assert compiled.stats.calls == trainer.state.global_step == STEPS, "every step was taken, once"
    assert compiled.state is CompileState.COMPILED, "it recovered"
    recoveries = [entry["compile/recoveries"] for entry in trainer.state.log_history if "loss" in entry]
    assert recoveries == [0, 0, 1, 1], "the Trainer's log shows the recovery"
    assert list(reloaded.state_dict()) == list(trainer.model.state_dict()), "the checkpoint is that of a plain model"


if __name__ == "__main__":
    main()

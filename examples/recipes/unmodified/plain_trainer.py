"""The Hugging Face Trainer compiles the model because of `torch_compile=True`."""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

STEPS = 20


def main(folder: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    texts = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(64, (4 * STEPS, 16))]
    arguments = TrainingArguments(
        folder,
        torch_compile=True,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    trainer = Trainer(model, arguments, train_dataset=texts)
    trainer.train()
    trainer.save_model(folder)
    assert list(LlamaForCausalLM.from_pretrained(folder).state_dict()) == list(model.state_dict())
    print(f"took {trainer.state.global_step} steps")


if __name__ == "__main__":
    main(sys.argv[1])

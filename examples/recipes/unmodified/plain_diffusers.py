"""A diffusers pipeline with a tiny random transformer, whose blocks `compile_repeated_blocks` compiles in place."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

STEPS = 20


def main() -> None:
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=0,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    names = list(transformer.state_dict())
    transformer.compile_repeated_blocks(fullgraph=True)
    assert list(transformer.state_dict()) == names
    without = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **without)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompt_embeds=torch.randn(1, 6, 32),
        pooled_prompt_embeds=torch.randn(1, 32),
        height=64,
        width=64,
        num_inference_steps=STEPS,
        output_type="latent",
    ).images
    assert torch.isfinite(images).all()
    print(f"took {STEPS} steps")


if __name__ == "__main__":
    main()

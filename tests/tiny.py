"""Tiny pipelines: random-weight models of the real families, built without a download."""

import importlib
import string
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

# Its names are resolved lazily, which type checkers take for private.
diffusers: Any = importlib.import_module("diffusers")

# 9 frames of 64x64 pixels: a token grid of 3x4x4 for Wan and CogVideoX.
CALL: dict[str, Any] = {
    "prompt": "a cat",
    "negative_prompt": "bad",
    "height": 64,
    "width": 64,
    "num_frames": 9,
    "num_inference_steps": 4,
    "guidance_scale": 5.0,
    "max_sequence_length": 16,
    "output_type": "latent",
}


def generate(pipe: Any, **changes: Any) -> Tensor:
    """The latents of one generation from a fixed seed; `changes` to the arguments of the call."""
    generator = torch.Generator().manual_seed(0)
    return pipe(generator=generator, **(CALL | changes)).frames


class Denoiser:
    """A pipeline reduced to a transformer and a scheduler that stands at a step."""

    def __init__(self, transformer: Any, steps: int) -> None:
        self.transformer = transformer
        self.scheduler = SimpleNamespace(
            timesteps=torch.arange(steps), _step_index=0, _begin_index=None
        )


def wan_transformer(layers: int = 2, heads: int = 2, head_dim: int = 12, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()


def wan(layers: int = 2, heads: int = 2, head_dim: int = 12, two_stage: bool = False) -> Any:
    """A Wan 2.1 pipeline, or a Wan 2.2 one with its two transformers."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()
    pipe = diffusers.WanPipeline(
        tokenizer=_tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(**_TEXT)).eval(),
        vae=vae,
        transformer=wan_transformer(layers, heads, head_dim),
        transformer_2=wan_transformer(layers, heads, head_dim, seed=1) if two_stage else None,
        boundary_ratio=0.7 if two_stage else None,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cogvideox_transformer(layers: int = 2) -> Any:
    torch.manual_seed(0)
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=layers,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    ).eval()


def cogvideox(layers: int = 2) -> Any:
    """A CogVideoX pipeline; its scheduler keeps no step index."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=_tokenizer(),
        text_encoder=T5EncoderModel(T5Config(**_TEXT)).eval(),
        vae=vae,
        transformer=cogvideox_transformer(layers),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            snr_shift_scale=1.0,
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


_TEXT: dict[str, Any] = {
    "vocab_size": 256,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
}


def _tokenizer() -> T5Tokenizer:
    # The T5 contract: 0 is padding, 1 the end, 2 unknown; single letters are vocabulary enough.
    letters = string.ascii_letters + string.digits + string.punctuation
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocabulary += [(letter, -3.0) for letter in letters]
    return T5Tokenizer(
        vocab=vocabulary, extra_ids=0, additional_special_tokens=[], model_max_length=226
    )

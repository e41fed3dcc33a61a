from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.pipelines.family import family_of, transformers_of
from dit_sparse.pipelines.fingerprint import fingerprint
from tests import tiny


@pytest.mark.parametrize(
    ("build", "paths"),
    [
        (tiny.wan_transformer, ["blocks.0.attn1", "blocks.1.attn1"]),
        (
            tiny.cogvideox_transformer,
            ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
        ),
    ],
    ids=["wan", "cogvideox"],
)
def test_a_family_knows_its_self_attention(build: Callable[[], Any], paths: list[str]) -> None:
    transformer = build()
    modules = family_of(transformer).attention_modules(transformer)
    assert list(modules) == paths
    assert all(modules[path] is transformer.get_submodule(path) for path in paths)


def test_the_grid_is_read_off_the_latents() -> None:
    wan, cogvideox = tiny.wan_transformer(), tiny.cogvideox_transformer()
    latents = torch.empty(1, 16, 5, 6, 10)
    assert family_of(wan).grid(wan, {"hidden_states": latents}) == (5, 3, 5)
    latents = torch.empty(1, 5, 4, 6, 10)
    assert family_of(cogvideox).grid(cogvideox, {"hidden_states": latents}) == (5, 3, 5)


def test_text_is_what_the_video_leaves_over() -> None:
    wan, cogvideox = family_of(tiny.wan_transformer()), family_of(tiny.cogvideox_transformer())
    assert wan.token_grid((2, 3, 5), 30) == TokenGrid(2, 3, 5)
    assert cogvideox.token_grid((2, 3, 5), 37) == TokenGrid(2, 3, 5, text_before=7)
    for family, tokens in ((wan, 31), (wan, 29), (cogvideox, 29)):
        with pytest.raises(ValueError, match=f"2x3x5 video tokens.*came {tokens} tokens"):
            family.token_grid((2, 3, 5), tokens)


def test_an_unknown_transformer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="came Linear; known are CogVideoXTransformer3DModel, W"):
        family_of(nn.Linear(2, 2))


def test_the_transformers_of_a_pipeline() -> None:
    pipe = tiny.wan(two_stage=True)
    both = {"transformer": pipe.transformer, "transformer_2": pipe.transformer_2}
    assert transformers_of(pipe) == both
    assert transformers_of(pipe.transformer) == {"transformer": pipe.transformer}
    compiled = torch.compile(pipe.transformer, backend="eager")
    assert transformers_of(compiled) == {"transformer": pipe.transformer}
    with pytest.raises(ValueError, match="a diffusers pipeline with a transformer, came object"):
        transformers_of(object())


def test_a_fingerprint_is_of_the_shape_and_not_of_the_weights() -> None:
    one, other = tiny.wan_transformer(seed=0), tiny.wan_transformer(seed=1)
    mine = fingerprint(one)
    assert (mine.layers, mine.heads, mine.head_dim) == (2, 2, 12)
    assert mine == fingerprint(other.to(torch.bfloat16))
    assert mine.difference(fingerprint(other)) is None
    other.register_to_config(ffn_dim=64)
    assert str(mine.difference(fingerprint(other))).startswith("config is ")

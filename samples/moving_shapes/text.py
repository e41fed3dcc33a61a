"""The sample model's text side: a word-level tokenizer and a small `UMT5EncoderModel`.

A randomly initialised encoder gives prompts that differ in one word almost the same embedding.
So the encoder is trained first, alone: every token has to tell the words of its own clause. Then
it is frozen, and the denoiser finds at "left" which shape moves left.
"""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from moving_shapes.progress import Progress
from moving_shapes.scene import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, Scene, random_scene

WIDTH = 64
WORDS = ("a", "and", "on", "moving", *COLORS, *SHAPES, *DIRECTIONS, *BACKGROUNDS)
ATTRIBUTES = (
    (*COLORS, "none"),
    (*SHAPES, "none"),
    (*DIRECTIONS, "none"),
    tuple(BACKGROUNDS),
    ("first", "second", "none"),
    ("one", "two"),
)
"""What every token is trained to tell: its clause's color, shape and direction, the scene's
background, which clause it is, and how many there are."""

MAX_LENGTH = 512
BATCH = 64
LEARNING_RATE = 3e-3
EMBEDDING_NOISE = 0.3


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One id a word; 0 is padding, 1 ends a prompt, 2 stands for every unknown word."""
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_LENGTH,
    )


def build_text_encoder() -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(WORDS) + 3,
            d_model=WIDTH,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
        )
    )


def train_text_encoder(progress: Progress, steps: int) -> UMT5EncoderModel:
    """Train until every token tells its clause: a minute, so without checkpoints inside."""
    torch.manual_seed(1)
    encoder, tokenizer = build_text_encoder(), build_tokenizer()
    if state := progress.load():
        encoder.load_state_dict(state["model"])
        return encoder.eval().requires_grad_(False)
    heads = nn.ModuleList(nn.Linear(WIDTH, len(names)) for names in ATTRIBUTES)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE)
    rng = random.Random("text")
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / 50) * (1 - step / (steps + 1))
        scenes = [random_scene(rng) for _ in range(BATCH)]
        tokens = tokenizer([s.prompt() for s in scenes], padding=True, return_tensors="pt")
        hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        hidden = hidden + EMBEDDING_NOISE * torch.randn_like(hidden)
        real = tokens.attention_mask.bool()
        target = torch.cat([_answers(scene) for scene in scenes])
        losses = [
            nn.functional.cross_entropy(head(hidden[real]), target[:, index])
            for index, head in enumerate(heads)
        ]
        loss = torch.stack(losses).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            progress.log(f"step {step} loss {loss.item():.4f}")
    progress.save({"model": encoder.state_dict()}, now=True)
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def embed(
    encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> tuple[Tensor, Tensor]:
    """Embeddings [batch, longest, width], zero past each prompt's end, and the lengths [batch]."""
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return hidden * tokens.attention_mask[..., None], tokens.attention_mask.sum(1)


def _answers(scene: Scene) -> Tensor:
    """The right class of every attribute for every token, int64 [tokens, attributes]."""
    background = ATTRIBUTES[3].index(scene.background)
    many = len(scene.movers) - 1
    rows = []
    for index, mover in enumerate(scene.movers):
        named = (mover.color, mover.shape, mover.direction)
        own = [ATTRIBUTES[place].index(name) for place, name in enumerate(named)]
        rows += [[*own, background, index, many]] * 5
        if index < many:
            rows.append([*(len(ATTRIBUTES[i]) - 1 for i in range(3)), background, 2, many])
    rest = [*(len(ATTRIBUTES[i]) - 1 for i in range(3)), background, 2, many]
    return torch.tensor(rows + [rest] * 3)

"""Tiny random models with a tokenizer, as SGLang requires."""

from __future__ import annotations

from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.actor.models import random_model

VOCAB, CONTEXT = 384, 2048


def model(name: str = "qwen3", seed: int = 0) -> transformers.PreTrainedModel:
    """Returns a random model; its next-token distribution is neither certain nor uniform."""
    return random_model(name, seed, vocab_size=VOCAB, max_position_embeddings=CONTEXT, eos_token_id=1, pad_token_id=0)


def save(path: Path, name: str = "qwen3", seed: int = 0) -> Path:
    """Saves a model and its tokenizer to a directory; returns the directory."""
    model(name, seed).save_pretrained(path)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 20,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["What is seven plus five? Answer: twelve"] * 20, trainer)
    transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call] # untyped in transformers
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(path)
    return path

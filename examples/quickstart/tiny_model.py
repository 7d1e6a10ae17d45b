"""Builds a tiny Qwen2 and its tokenizer from a corpus, for tasks of your own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(corpus: Sequence[str], vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with single digits and a chat template.

    Args:
        corpus: Texts to learn the merges from, without special tokens.
        vocab_size: Size of the vocabulary, of which 259 are bytes and special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(path: Path, corpus: Sequence[str], seed: int, *, max_positions: int = 128) -> None:
    """Writes a Qwen2 of 117,000 random parameters and its tokenizer as a Hugging Face model.

    With an initializer range below 0.12 it would not learn.

    Args:
        path: Directory to write.
        corpus: Texts to train the tokenizer on.
        seed: Seed of the weights.
        max_positions: Context of the model in tokens.
    """
    fast = build_tokenizer(corpus)
    torch.manual_seed(seed)
    vocab = -(-len(fast) // 4) * 4
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        initializer_range=0.12,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    fast.save_pretrained(path)

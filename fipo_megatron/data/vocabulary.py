"""The comparison of the vocabularies and tokenizers of two models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a model.

    Attributes:
        name: Field and value that name the model, for messages.
        size: Rows of the embedding.
        tokenizer: Tokenizer of the model.
        directory: Directory with tokenizer.json.
    """

    name: str
    size: int
    tokenizer: PreTrainedTokenizerBase
    directory: Path


def vocabulary_difference(base: Vocabulary, rl: Vocabulary) -> str:
    """Describes how vocabulary or tokenizer of two models differ; empty if they are equal."""
    if base.size != rl.size:
        return f"{rl.name}: has a vocabulary of {rl.size} tokens, {base.name} of {base.size}; they must be equal"
    tokens_base, tokens_rl = ({i: t for t, i in m.tokenizer.get_vocab().items()} for m in (base, rl))
    for token_id in sorted(tokens_base.keys() | tokens_rl.keys()):
        pair = tokens_base.get(token_id), tokens_rl.get(token_id)
        if pair[0] != pair[1]:
            return (
                f"{rl.name}: token {token_id} is {pair[1]!r}, in {base.name} {pair[0]!r}; the tokenizers must be equal"
            )
    parts_base, parts_rl = (_tokenizer_parts(m.directory) for m in (base, rl))
    if names := sorted(n for n in parts_base.keys() | parts_rl.keys() if parts_base.get(n) != parts_rl.get(n)):
        return (
            f"{rl.name}: tokenizer.json differs from that of {base.name} in {', '.join(names)}; the tokenizers must be "
            "equal"
        )
    return ""


def _tokenizer_parts(directory: Path) -> dict[str, Any]:
    """Returns the parts of tokenizer.json that decide how text becomes tokens."""
    file = directory / "tokenizer.json"
    whole = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {name: whole.get(name) for name in ("normalizer", "pre_tokenizer", "model", "decoder")}

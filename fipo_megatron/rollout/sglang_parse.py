"""What an SGLang server answers to ``/generate``, as arrays.

20,000 tokens are 0.9 MB of JSON and take 5 ms to read with orjson on one core (``benchmarks/rollout.py``), so that
8,192 such responses stall the event loop by 5 ms at a time and 43 s in all: no processes are needed for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from fipo_megatron.data.trajectory import FinishReason, TokenSpan

from .engine import Generation


class MalformedAnswerError(ValueError):
    """Not what SGLang answers."""


def parse_generation(body: bytes) -> Generation:
    """Reads one answer.

    Raises:
        MalformedAnswerError: it is cut off, or has not one log-prob per token.
    """
    try:
        answer = orjson.loads(body)
        tokens = np.array(answer["output_ids"], dtype=np.int32)
        meta = answer["meta_info"]
        entries = meta["output_token_logprobs"] or []
        reason = meta["finish_reason"]["type"]
        spans = tuple(TokenSpan(span["start"], int(span["version"])) for span in meta["weight_versions"])
    except (ValueError, KeyError, TypeError) as error:
        raise MalformedAnswerError(f"not an answer of SGLang's: {error!r}: {body[:200]!r}") from error
    log_probs = np.array([entry[0] for entry in entries], dtype=np.float32)
    if [entry[1] for entry in entries] != answer["output_ids"]:
        raise MalformedAnswerError(f"{len(entries)} log-probs for {len(tokens)} tokens, or of other tokens")
    finish: FinishReason = reason if reason in ("stop", "length") else "abort"
    return Generation(tokens, log_probs, spans if len(tokens) else (), finish)


def error_text(body: bytes) -> str:
    """The message in an error's answer."""
    try:
        answer: Any = orjson.loads(body)
        found = answer.get("error", answer)
        return str(found.get("message", found)) if isinstance(found, dict) else str(found)
    except (ValueError, AttributeError):
        return body[:500].decode(errors="replace")

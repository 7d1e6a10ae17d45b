"""Parses the answers of SGLang servers.

An answer to ``/generate`` with 20,000 tokens is 0.9 MB of JSON, with a list for every token. orjson and numpy parse
it in 6 ms. The garbage collector, which scans all objects of a large program repeatedly while lists are created, would
add 30 ms; it is disabled during parsing. Parsing needs no processes of its own then (``benchmarks/rollout.py``).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from fipo_megatron.data.trajectory import FinishReason, TokenSpan
from fipo_megatron.rollout.engine import Generation


class MalformedAnswerError(ValueError):
    """The body is not an answer of SGLang."""


def parse_generation(body: bytes) -> Generation:
    """Parses an answer to ``/generate``.

    Raises:
        MalformedAnswerError: it is truncated, or does not have one log-prob per token.
    """
    with _no_garbage_collection():
        return _parse(body)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _parse(body: bytes) -> Generation:
    try:
        answer = orjson.loads(body)
        tokens = np.array(answer["output_ids"], dtype=np.int32)
        meta = answer["meta_info"]
        entries = meta["output_token_logprobs"] or []
        reason = meta["finish_reason"]["type"]
        spans = tuple(TokenSpan(span["start"], int(span["version"])) for span in meta["weight_versions"])
        retractions = int(meta.get("num_retractions") or 0)
    except (ValueError, KeyError, TypeError) as error:
        raise MalformedAnswerError(f"not an answer of SGLang: {error!r}: {body[:200]!r}") from error
    log_probs = np.array([entry[0] for entry in entries], dtype=np.float32)
    if [entry[1] for entry in entries] != answer["output_ids"]:
        raise MalformedAnswerError(f"{len(entries)} log-probs for {len(tokens)} tokens, or of other tokens")
    finish: FinishReason = reason if reason in ("stop", "length") else "abort"
    return Generation(tokens, log_probs, spans if len(tokens) else (), finish, retractions=retractions)


def parse_log_probs(body: bytes, count: int) -> NDArray[np.float32]:
    """Parses an answer to ``/generate`` that has the log-probs of the last ``count`` given tokens.

    SGLang 0.5.23 names the largest token id of a vocabulary 0 in it, so the ids are not compared.

    Raises:
        MalformedAnswerError: it is truncated, or has another number of log-probs.
    """
    with _no_garbage_collection():
        try:
            _, *entries = orjson.loads(body)["meta_info"]["input_token_logprobs"]
            found = np.array([entry[0] for entry in entries], dtype=np.float32)
        except (ValueError, KeyError, TypeError) as error:
            raise MalformedAnswerError(f"not an answer of SGLang: {error!r}: {body[:200]!r}") from error
    if len(found) != count:
        raise MalformedAnswerError(f"{len(found)} log-probs for {count} given tokens")
    return found


def error_text(body: bytes) -> str:
    """Returns the message in the body of an error."""
    try:
        answer: Any = orjson.loads(body)
        found = answer.get("error", answer)
        return str(found.get("message", found)) if isinstance(found, dict) else str(found)
    except (ValueError, AttributeError):
        return body[:500].decode(errors="replace")

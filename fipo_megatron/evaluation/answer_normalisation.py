"""Normalisation of extracted answers, which decides whether two answers are the same in the vote of cons@k."""

from __future__ import annotations

from fipo_megatron.reward import answers


def normalise_answer(verifier: str, extracted: str | None) -> str | None:
    r"""Returns the answer that a response votes for.

    With ``math``, answers that look alike or are the same number are equal: ``\dfrac{1}{2}``, ``0.5`` and ``1/2``;
    ``073`` and ``73``; ``1 1/2`` and ``3/2``, but not ``11/2``. Answers that only algebra finds equal differ. With any
    other verifier, answers are equal up to white space, which is the rule of ``exact``.

    Args:
        verifier: Name of the verifier, ``reward.verifier``.
        extracted: Text that the verifier took for the answer; None without an answer.

    Returns:
        The normalised answer; None if the response has no answer and does not vote.
    """
    if extracted is None or not extracted.strip():
        return None
    extracted = extracted.encode(errors="replace").decode()  # a service may send lone surrogates
    if verifier != "math":
        return " ".join(extracted.split())
    text = answers.normalise(answers.clean_answer(extracted)) or extracted
    value = answers.parse_number(text)
    return text if value is None else str(value)

"""Which answers are the same for the vote of cons@k: what the verifier took for the answer, normalised."""

from __future__ import annotations

from fipo_megatron.reward import answers


def normalise_answer(verifier: str, extracted: str | None) -> str | None:
    r"""The answer that a response votes for.

    With ``math``, answers that look alike or are the same number are one: ``\dfrac{1}{2}``, ``0.5`` and ``1/2``;
    ``073`` and ``73``. What only algebra finds equal stays apart. With any other verifier, answers are the same but
    for white space, which is the rule of ``exact``.

    Args:
        verifier: ``reward.verifier``.
        extracted: What it took for the answer; None: there is none.

    Returns:
        None where there is no answer: the response does not vote.
    """
    if extracted is None or not extracted.strip():
        return None
    extracted = extracted.encode(errors="replace").decode()  # a service may send what no file can hold
    if verifier != "math":
        return " ".join(extracted.split())
    text = answers.normalise(extracted)
    value = answers.parse_number(text)
    return text if value is None else str(value)

"""The table of efficiencies and what estimates rest on."""

from pathlib import Path

import pytest

from fipo_megatron.plan.efficiencies import TABLE, Rates, weakest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", TABLE)
def test_every_entry_has_a_source(name):
    """Measured entries name a result file, published ones a page or a package, assumed ones a reason."""
    entry = TABLE[name]
    assert entry.value > 0
    if entry.kind == "measured":
        assert (ROOT / entry.source.partition(":")[0]).is_file()
    if entry.kind == "published":
        assert entry.source.startswith(("https://", "SGLang "))
    if " of " in f" {entry.unit}" and "bytes" not in entry.unit and "GiB" not in entry.unit:
        assert entry.value <= 1
    assert len(entry.source) > 20


def test_the_weakest_kind():
    assert weakest(["measured", "assumed", "published"]) == "assumed"
    assert weakest(["measured", "published"]) == "published"
    assert weakest([]) == "measured"


def test_rates_remember_their_purpose():
    rates = Rates()
    assert rates.read("matmul", "products") == TABLE["matmul"].value
    assert rates.read("network", "gradients") == TABLE["network"].value
    assert rates.peek("decode_step") == TABLE["decode_step"].value
    assert rates.basis("products") == "measured"
    assert rates.basis("products", "gradients") == "assumed"
    assert rates.basis("nothing") == "measured"

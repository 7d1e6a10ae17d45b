"""The reference pages follow from the code, and say so when they do not."""

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from fipo_megatron.config import Config, keys
from fipo_megatron.observe import metrics
from tools import reference


def test_pages_are_current():
    differences = reference.stale(reference.ROOT / "docs")
    assert not differences, "run `python -m tools.reference`\n" + "\n".join(differences)


@pytest.mark.parametrize("name", [name for name, _ in reference.all_sections()])
def test_every_field_has_a_description(name):
    of = dict(reference.all_sections())[name]
    said = reference.descriptions(of)
    assert set(said) == {entry.name for entry in fields(of)}
    assert all(text.strip() for text in said.values())


def test_every_key_and_every_tag_is_on_its_page():
    page = reference.configuration_page()
    inner = {name for name, _ in reference.all_sections()}
    for key in keys():
        assert (f"\n## `{key}`\n" if key in inner else f'<a id="{key}"></a>`{key.split(".")[-1]}`') in page
    page = reference.metrics_page()
    for metric in metrics.METRICS:
        assert f'<a id="{metric.tag}"></a>' in page
    for metric in (*metrics.HISTOGRAMS, *metrics.TEXTS):
        assert f"`{metric.tag}`" in page


@dataclass
class Section:
    """A section.

    Attributes:
        first: What it is,
            on two lines.
        second: ``a`` | ``b``, see :class:`.some.where.Thing`.
    """

    first: Annotated[int, Field(ge=1, multiple_of=4)] | None = None
    second: Literal["a", "b", "c"] = "a"
    third: float = math.inf


def test_a_missing_description_is_noticed():
    with pytest.raises(reference.DescriptionError, match=r"Section\.third: has no description"):
        reference.descriptions(Section)


def test_a_description_of_nothing_is_noticed():
    @dataclass
    class Described(Section):
        """Attributes: below.

        Attributes:
            third: A number.
            fourth: Not there.
        """

    with pytest.raises(reference.DescriptionError) as caught:
        reference.descriptions(Described)
    assert str(caught.value) == "Described.fourth: is described, but is not a field"


def test_inherited_descriptions_count_and_continue_over_lines():
    @dataclass
    class Whole(Section):
        """Complete.

        Attributes:
            third: A number.
        """

    said = reference.descriptions(Whole)
    assert said["first"] == "What it is, on two lines."
    assert reference.markdown(said["second"]) == "`a` \\| `b`, see `Thing`."


def test_types_and_bounds_in_words():
    hints = {entry.name: entry for entry in fields(Section)}
    assert reference.valid(Section, hints["first"], Annotated[int, Field(ge=1, multiple_of=4)] | None) == (
        "integer or null, ≥ 1, a multiple of 4"
    )
    assert reference.type_text(Literal["a", "b", "c"]) == "`a`, `b` or `c`"
    assert reference.type_text(tuple[str, ...]) == "list of text"
    assert reference.type_text(tuple[float, float] | None) == "[number, number] or null"
    assert reference.type_text(dict[str, Any]) == "mapping"


def test_bounds_that_only_an_error_knows():
    of = dict(reference.all_sections())["algorithm"]
    assert reference.refusal(of, "half_life") == "> 0 tokens and at most 1e+09, or inf for no decay"
    assert reference.refusal(of, "sequence_drop_threshold") == "≥ 0 tokens and below 2^31"
    assert not reference.refusal(of, "future_kl_filter")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1e-6, "1e-06"),
        (32.0, "32"),
        (math.inf, ".inf"),
        (-math.inf, "-.inf"),
        ((1.0, 1.2), "[1, 1.2]"),
        ((), "[]"),
        ({}, "{}"),
        ("", '""'),
        ("auto", "auto"),
    ],
)
def test_values_as_a_file_has_them(value, text):
    assert reference.yaml_text(value) == text


def test_check_fails_with_the_difference_and_writing_mends_it(tmp_path, capsys):
    given = ["--docs", str(tmp_path)]
    assert reference.main([*given, "--check"]) == 1
    assert reference.main(given) == 0
    assert reference.main([*given, "--check"]) == 0
    page = tmp_path / "metrics.md"
    page.write_text(page.read_text().replace("The whole step.", "A part of the step."))
    capsys.readouterr()
    assert reference.main([*given, "--check"]) == 1
    said = capsys.readouterr().out
    assert "\n-| <a id=" in said
    assert "A part of the step." in said
    assert "The whole step." in said


def test_a_new_section_is_found(monkeypatch):
    @dataclass
    class Outer:
        """A run.

        Attributes:
            section: A section.
        """

        section: Section = field(default_factory=Section)

    assert [name for name, _ in reference.all_sections(Outer)] == ["", "section"]
    assert [name for name, _ in reference.all_sections(Config)][:2] == ["", "run"]

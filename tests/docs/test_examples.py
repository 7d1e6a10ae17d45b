"""Runs the examples of the documentation: the code prints what the pages show."""

import doctest

import pytest

from tests.docs.pages import PAGES, ROOT, blocks

WITH_EXAMPLES = [page for page in PAGES if any(">>>" in block.text for block in blocks(page))]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.name)
def test_sessions_print_what_the_page_says(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    for block in blocks(page):
        if ">>>" not in block.text:
            continue
        session = doctest.DocTestParser().get_doctest(block.text, names, page.name, str(page), block.line)
        runner, said = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), []
        runner.run(session, out=said.append, clear_globs=False)
        names = session.globs
        assert not runner.failures, "".join(said)


def test_the_concepts_are_among_them_and_a_wrong_number_is_noticed():
    (concepts,) = [page for page in WITH_EXAMPLES if page.name == "concepts.md"]
    text = blocks(concepts)[0].text
    assert "0.025" in text
    session = doctest.DocTestParser().get_doctest(text.replace("0.025", "0.026"), {}, "changed", None, 0)
    runner = doctest.DocTestRunner()
    runner.run(session, out=lambda _: None)
    assert runner.failures == 1

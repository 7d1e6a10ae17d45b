"""Links of the pages outside the site; `make docs` checks those of docs/."""

import re

import pytest

from tests.docs.pages import ROOT

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(text):
    """Returns the anchors that a Git host makes of headings, and those that the page defines."""
    found = set(re.findall(r'<a id="([^"]+)"', text))
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        found.add(re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-"))
    return found


def broken(text, here):
    problems = []
    for target in _LINK.findall(text):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = here / path if path else None
        exists = file is None or file.exists()
        if not exists or (anchor and anchor not in anchors(file.read_text(encoding="utf-8") if file else text)):
            problems.append(target)
    return problems


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    assert not broken((ROOT / name).read_text(encoding="utf-8"), ROOT)


def test_a_broken_link_is_noticed():
    text = "# A Heading\n[a](docs/faq.md) [b](docs/fag.md) [c](#a-heading) [d](#b) [e](docs/actor.md#nowhere) [f](https://x.y)"
    assert broken(text, ROOT) == ["docs/fag.md", "#b", "docs/actor.md#nowhere"]

"""Settings and results of both comparisons."""

import json


def models(data):
    return [f"compare.base={data}/model", f"compare.rl={data}/changed"]


def settings(data, output):
    """Settings of short answers to the problems, whose verdicts are by chance."""
    return [
        *(f"run.output={output}", f"evaluation.files=[{data}/few.jsonl]", "rollout.max_response_tokens=20"),
        "reward.verifier=python:tests.train_verifiers.by_chance",
    ]


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def check_page(file):
    """Checks that every part of a page is in its place, and that it names no address but that of SVG's name space."""
    page = file.read_text()
    assert "@@" not in page
    assert page.count("http") == page.count("http://www.w3.org/2000/svg") + page.count("http-equiv") == 2

"""Prompts from real parquet and jsonl files: the content read, its order, and the files refused."""

import json
import tempfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from fipo_megatron.config import DataConfig
from fipo_megatron.data.prompt_table import PromptTable
from fipo_megatron.data.prompts import DataError, PromptStream, read_problems
from fipo_megatron.data.tokenized_prompts import read_prompts
from fipo_megatron.data.tokenizer import load_tokenizer
from fipo_megatron.data.trajectory import Prompt

ROWS = [
    {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"What is {n} + 1?"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(n + 1), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id-{n}"},
    }
    for n in range(5)
]


def read(files, **options):
    return list(read_problems(files, **options))


def parquet(path, rows=ROWS, drop=()):
    pq.write_table(pa.Table.from_pylist(rows).drop_columns(list(drop)), path)
    return path


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_schema_of_dapo_math(tmp_path):
    """The released file repeats each problem a hundred times; here three times."""
    problems = read([parquet(tmp_path / "dapo.parquet", ROWS * 3)])
    assert [p.id for p in problems] == [f"dapo:id-{n}" for n in range(5)]
    assert problems[2].messages == [{"role": "user", "content": "What is 2 + 1?"}]
    assert {(p.answer, p.data_source) for p in problems} == {(str(n + 1), "math_dapo") for n in range(5)}


def test_jsonl_and_ids_that_occur_twice(tmp_path):
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 1?"}]
    rows = [{"prompt": "1?", "answer": 1}, {"prompt": messages, "answer": "2", "id": "f:0"}]
    problems = read([jsonl(tmp_path / "f.jsonl", rows)])
    assert [p.id for p in problems] == ["f:0", "f:0#2"]
    assert problems[0].messages == [{"role": "user", "content": "1?"}]
    assert problems[1].messages == messages
    assert [p.answer for p in problems] == ["1", "2"]


def test_ids_that_look_like_ours_stay_unique(tmp_path):
    rows = [
        {"prompt": str(n), "answer": "1", "id": name} for n, name in enumerate(["a", "a#3", "a", "a#3", "p", "p~1"])
    ]
    ids = [p.id for p in read([jsonl(tmp_path / "f.jsonl", rows)])]
    assert ids == ["a", "a#3", "a#3#3", "a#3#4", "p", "p~1"]
    stream = PromptStream(
        PromptTable.from_prompts([Prompt(name, np.array([1]), "") for name in [*ids, "p~", "p~~2", "~", "~1"]]), seed=0
    )
    found = [p.id for p in stream(10 * 25)]
    assert len({*found}) == len(found)
    assert "p~~~1" in found


def test_the_separators_of_unicode_do_not_end_a_row(tmp_path):
    """JSON allows them inside of text; a row ends at a line feed."""
    prompt = "one\u2028two\u2029three\u0085four\x0cfive"
    row = json.dumps({"prompt": prompt, "answer": "1\u2028"}, ensure_ascii=False).replace("\x0c", "\\f")
    file = tmp_path / "f.jsonl"
    file.write_bytes(f"{row}\r\n\n{row.replace('one', 'two')}".encode())
    problems = read([file])
    assert [p.id for p in problems] == ["f:0", "f:2"]
    assert problems[0].messages[0]["content"] == prompt
    assert problems[0].answer == "1\u2028"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (rb'{"prompt": "a\ud800", "answer": "1"}', r"row 1: prompt: holds a lone surrogate, '\\ud800'"),
        (rb'{"prompt": "a", "answer": "\udfff"}', "row 1: answer: holds a lone surrogate"),
        (rb'{"prompt": "a", "answer": "1", "id": "\ud800"}', "row 1: id: holds a lone surrogate"),
        (rb'{"prompt": "a", "answer": "1", "data_source": "\ud800"}', "row 1: data_source: holds a lone surrogate"),
        (b'{"prompt": ' + b"[" * 100_000, "row 1: nested too deeply"),
        (b'{"prompt": "\xff", "answer": "1"}', "row 1: not UTF-8"),
        (b"7" * 5000, "row 1: not JSON"),
        (b"7", "row 1: expected an object"),
    ],
)
def test_a_row_that_is_wrong(row, message, tmp_path):
    file = tmp_path / "f.jsonl"
    file.write_bytes(b'{"prompt": "1?", "answer": "1"}\n' + row)
    with pytest.raises(DataError, match=message) as caught:
        read([file])
    assert len(str(caught.value)) < 400


def test_data_sets_that_share_a_problem_stay_whole(tmp_path):
    row = {"prompt": "1?", "answer": "1"}
    files = [jsonl(tmp_path / f"{name}.jsonl", [row, row]) for name in "ab"]
    assert [p.data_source for p in read(files)] == ["a"]
    assert [p.data_source for p in read(files, apart=True)] == ["a", "b"]
    (unnamed,) = read([jsonl(tmp_path / "c.jsonl", [row | {"data_source": ""}])])
    assert unnamed.data_source == "c"


def test_sft_examples_may_occur_twice(tmp_path):
    file = jsonl(tmp_path / "f.jsonl", [{"prompt": "1?", "response": "one"}] * 3)
    assert len(read([file], answer="response", drop="none")) == 3


def test_an_empty_response_for_sft_is_refused(tmp_path):
    file = jsonl(tmp_path / "f.jsonl", [{"prompt": "1?", "response": "nan"}, {"prompt": "1?", "response": "\n"}])
    with pytest.raises(DataError, match=r"f\.jsonl: row 1: response: is empty"):
        read([file], answer="response")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "no.jsonl", r"no\.jsonl: cannot be read"),
        (lambda p: p / "no.csv", r"expected a name that ends in \.parquet or \.jsonl"),
        (
            lambda p: parquet(p / "f.parquet", drop=["reward_model"]),
            r"missing column\(s\) reward_model; there are data_",
        ),
        (
            lambda p: parquet(p / "f.parquet", drop=["reward_model", "prompt"]),
            r"missing column\(s\) prompt, reward_model",
        ),
        (
            lambda p: jsonl(p / "f.jsonl", [{"question": "1?"}]),
            r"row 0: missing column\(s\) prompt, answer; there are q",
        ),
        (lambda p: jsonl(p / "f.jsonl", [{"prompt": [], "answer": "1"}]), r"row 0: prompt: expected text, or messages"),
        (lambda p: jsonl(p / "f.jsonl", [{"prompt": "1", "answer": None}]), "row 0: answer: expected text, got None"),
        (lambda p: jsonl(p / "f.jsonl", [{"prompt": "1", "answer": " "}]), r"f\.jsonl: row 0: answer: is empty"),
        (
            lambda p: jsonl(p / "f.jsonl", [{"prompt": "1", "answer": float("nan")}]),
            "answer: 'nan' is no answer",
        ),
        (lambda p: jsonl(p / "f.jsonl", [{"prompt": "1", "answer": "$$"}]), r"row 0: answer: '\$\$' is no answer"),
        (
            lambda p: parquet(p / "f.parquet", [ROWS[0] | {"reward_model": {"ground_truth": ""}}]),
            r"f\.parquet: row 0: reward_model\.ground_truth: is empty",
        ),
        (lambda p: jsonl(p / "f.jsonl", []), "no problems"),
    ],
)
def test_invalid_files_are_refused(make, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read([make(tmp_path)])


def test_a_damaged_parquet_file(tmp_path):
    file = parquet(tmp_path / "f.parquet")
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"f\.parquet: cannot be read"):
        read([file])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer with one token per letter."""
    path = tmp_path_factory.mktemp("tokenizer")
    words = Tokenizer(WordLevel({letter: n for n, letter in enumerate("?xyz0123456789")}, unk_token="?"))
    words.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return load_tokenizer(path)


def read_tokens(files, tokenizer, **options):
    data = DataConfig(chat_template="none", **{"max_prompt_tokens": 5} | options)
    return read_prompts(data, list(map(str, files)), tokenizer, field="data.files", answer="answer", share=True)


def test_prompts_that_are_too_long(tmp_path, caplog, tokenizer, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    file = jsonl(tmp_path / "f.jsonl", [{"prompt": "x" * n, "answer": "1"} for n in range(1, 9)])
    assert [len(p.tokens) for p in read_tokens([file], tokenizer)] == [1, 2, 3, 4, 5]
    assert "3 of 8 prompts are longer than data.max_prompt_tokens = 5" in caplog.text
    with pytest.raises(DataError, match=r"data\.max_prompt_tokens = 2: all 1 prompts are longer"):
        read_tokens([jsonl(tmp_path / "g.jsonl", [{"prompt": "xxx", "answer": "1"}])], tokenizer, max_prompt_tokens=2)
    with pytest.raises(DataError, match="h:0: prompt: has no tokens"):
        read_tokens([jsonl(tmp_path / "h.jsonl", [{"prompt": "", "answer": "1"}])], tokenizer)


def test_prompts_that_occur_twice(tmp_path, caplog, tokenizer):
    rows = [{"prompt": p, "answer": a} for p, a in (("x", 1), ("x", 2), ("y", 1), ("x", 1))]
    file = jsonl(tmp_path / "f.jsonl", rows)

    def found(choice):
        data = DataConfig(chat_template="none", deduplicate=choice)
        prompts = read_prompts(data, [str(file)], tokenizer, field="data.files", answer="answer")
        return [(p.id, p.ground_truth) for p in prompts]

    assert found("none") == [("f:0", "1"), ("f:1", "2"), ("f:2", "1"), ("f:3", "1")]
    assert found("rows") == found("auto") == [("f:0", "1"), ("f:1", "2"), ("f:2", "1")]
    assert "answer is not that" not in caplog.text
    assert found("prompts") == [("f:0", "1"), ("f:2", "1")]
    assert "1 rows were dropped although their answer is not that of the first row with the same prompt" in caplog.text


def test_a_large_file_is_not_read_at_once(tmp_path):
    """The objects of all 20,000 rows of the file take 50 MB, those of a batch 10 MB."""
    file = parquet(tmp_path / "dapo.parquet", [{**ROWS[n % 5], "ability": "MATH" * 9} for n in range(20_000)])
    tracemalloc.start()
    try:
        assert len(read([file])) == 5
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def prompts(count):
    return PromptTable.from_prompts([Prompt(str(n), np.array([n]), "") for n in range(count)])


def test_the_order_depends_on_the_seed_alone_and_can_be_resumed():
    whole = [p.id for p in PromptStream(prompts(7), seed=3)(21)]
    assert sorted(whole[:7]) == [str(n) for n in range(7)]
    assert sorted(whole[7:14]) == [f"{n}~1" for n in range(7)]
    assert len({*whole}) == 21
    first, second = ([name.partition("~")[0] for name in epoch] for epoch in (whole[:7], whole[7:14]))
    assert first != second
    for cursor in range(21):
        stream = PromptStream(prompts(7), seed=3)
        stream.given = cursor
        assert [p.id for p in stream(2)] == whole[cursor : cursor + 2] or cursor == 20
    assert [p.id for p in PromptStream(prompts(7), seed=4)(7)] != whole[:7]
    assert [p.id for p in PromptStream(prompts(3), seed=4, shuffle=False)(4)] == ["0", "1", "2", "0~1"]


def test_epochs_end():
    stream = PromptStream(prompts(3), seed=0, epochs=2)
    assert [len(stream(4)) for _ in range(3)] == [4, 2, 0]
    assert stream.given == 6

"""Mutants of the algorithm, each of which the comparison with the loop in reference.py must catch.

The package ``algorithm`` is copied, one expression of the copy is replaced, and the copy must fail where the original
passes. This proves that the comparison covers the normaliser, the carries, the scan, the drop, the filter and the
surrogate.

A mutant is named ``PART: FAULT``: the part of the algorithm and what is wrong with it. It replaces an expression of the
syntax tree, so that neither the layout of the source nor the name of a local variable matters. A capital letter in
``old`` stands for any expression, the same one wherever the letter occurs; ``new`` may use it. Exactly one expression
of the module must match ``old``.
"""

import ast
import copy
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import fipo_megatron.algorithm
from fipo_megatron.algorithm.policy_loss_config import loss_config
from tests.algorithm.partitions import PACKAGE, assert_split_matches, random_batch

PACKAGE_NAME = fipo_megatron.algorithm.__name__
SOURCES = {
    module.name: Path(folder, f"{module.name}.py")
    for folder in fipo_megatron.algorithm.__path__
    for module in pkgutil.iter_modules([folder])
}
TOKEN_MEAN = loss_config("fipo", dual_clip=3.0, safety_threshold=2.0, weight_clip=None)
SEQUENCE_MEAN = loss_config("grpo", kl_coef=0.0)


@dataclass(frozen=True)
class Mutant:
    """A replacement of one expression.

    Attributes:
        module: Name of a module of the package.
        old: Pattern of the expression.
        new: Its replacement.
    """

    module: str
    old: str
    new: str


MUTANTS = {
    "normaliser: denominator counts dropped tokens": Mutant(
        "policy_loss", "A.sum(), B.sum()", "A.sum(), inputs.mask.sum()"
    ),
    "normaliser: mean over the rank's own tokens": Mutant(
        "policy_loss", "A.sum(), B.sum()", "A.sum() / B.sum().clamp(min=1), B.any().long()"
    ),
    "normaliser: sequences counted on every rank": Mutant("future_kl", "A.sum() * (self.rank == 0)", "A.sum()"),
    "carry: zero": Mutant(
        "future_kl",
        "A.flatten().repeat_interleave(B, output_size=C)",
        "0 * A.flatten().repeat_interleave(B, output_size=C)",
    ),
    "carry: from the next chunk only": Mutant("future_kl", "A * B[-1]", "0 * B[-1]"),
    "carry: one token too near": Mutant(
        "future_kl", "A - torch.arange(B, device=C)", "A - 1 - torch.arange(B, device=C)"
    ),
    "carry: chunks in the order held, not in time": Mutant("future_kl", "A.owners[:0:-1]", "sorted(A.owners)[:0:-1]"),
    "scan: across the join of two chunks": Mutant(
        "future_kl", "suffix_scan(A, B, C - 1)", "suffix_scan(A, B, C[-1:] - 1)"
    ),
    "drop: each rank by its own count": Mutant(
        "policy_loss", "A[:, :, :2].sum(0).unbind(1)", "A[shards.rank, :, :2].unbind(1)"
    ),
    "drop: at the threshold": Mutant(
        "policy_loss", "A > config.sequence_drop_threshold", "A >= config.sequence_drop_threshold"
    ),
    "filter: keeps the large, drops the small": Mutant(
        "policy_loss",
        "torch.where(A > math.log(config.dual_clip), 0.0, A)",
        "torch.where(A < math.log(config.dual_clip), 0.0, A)",
    ),
    "surrogate: ratio clamped": Mutant(
        "policy_loss", "-advantages_T * ratio_T", "-advantages_T * ratio_T.clamp(max=2.0)"
    ),
}


def is_placeholder(node):
    return isinstance(node, ast.Name) and len(node.id) == 1 and node.id.isupper()


def matches(pattern, value, bound):
    """Compares a pattern with a node, a list of nodes or a plain value, and binds the pattern's placeholders."""
    if is_placeholder(pattern):
        return isinstance(value, ast.expr) and ast.dump(bound.setdefault(pattern.id, value)) == ast.dump(value)
    if type(pattern) is not type(value):
        return False
    if isinstance(pattern, list):
        return len(pattern) == len(value) and all(
            matches(part, each, bound) for part, each in zip(pattern, value, strict=True)
        )
    if isinstance(pattern, ast.AST):
        return all(matches(part, getattr(value, field), bound) for field, part in ast.iter_fields(pattern))
    return pattern == value


class Substitution(ast.NodeTransformer):
    """Replaces the nodes that ``replacement`` returns something for."""

    def __init__(self, replacement):
        self.replacement = replacement

    def visit(self, node):
        found = self.replacement(node)
        return self.generic_visit(node) if found is None else found


def mutated(tree, mutant):
    """Returns the tree with the one expression that the mutant's pattern matches replaced."""
    old, new = (ast.parse(text, mode="eval").body for text in (mutant.old, mutant.new))
    found = []
    for node in ast.walk(tree):
        bound = {}
        if matches(old, node, bound):
            found.append((node, bound))
    assert len(found) == 1, f"{mutant.old!r} matches {len(found)} expressions in {mutant.module}, must be 1"
    [(target, bound)] = found
    filled = Substitution(lambda node: copy.deepcopy(bound[node.id]) if is_placeholder(node) else None).visit(new)
    return ast.fix_missing_locations(Substitution(lambda node: filled if node is target else None).visit(tree))


def load_copy(name, monkeypatch, mutant=None):
    """Executes a copy of the package under another name, with the mutant's replacement made."""
    modules = {}

    def load(short):
        if short in modules:
            return
        modules[short] = ModuleType(f"{name}.{short}")
        tree = ast.parse(SOURCES[short].read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith(f"{PACKAGE_NAME}."):
                neighbour = node.module.removeprefix(f"{PACKAGE_NAME}.")
                load(neighbour)
                node.module = f"{name}.{neighbour}"
        if mutant and mutant.module == short:
            tree = mutated(tree, mutant)
        monkeypatch.setitem(sys.modules, f"{name}.{short}", modules[short])
        exec(compile(tree, f"<{name}.{short}>", "exec"), modules[short].__dict__)

    for short in SOURCES:
        load(short)
    for short, module in modules.items():
        used = [value.__module__ for value in vars(module).values() if hasattr(value, "__module__")]
        assert not [each for each in used if each.startswith(PACKAGE_NAME)], f"the copy of {short} uses the original"
    loss, scan = modules["policy_loss"], modules["future_kl"]
    return SimpleNamespace(LossInputs=loss.LossInputs, SequenceShards=scan.SequenceShards, policy_loss=loss.policy_loss)


def check(algorithm):
    for seed in range(6):
        batch = random_batch(seed)
        for config in (TOKEN_MEAN, SEQUENCE_MEAN):
            assert_split_matches(algorithm, batch, config, cp=2, dp=2, budget=112)
            assert_split_matches(algorithm, batch, config, cp=4)


def test_the_package_and_an_unchanged_copy_pass(monkeypatch):
    check(PACKAGE)
    check(load_copy("mutant_none", monkeypatch))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    mutant = load_copy(f"mutant_{list(MUTANTS).index(name)}", monkeypatch, MUTANTS[name])
    with pytest.raises(AssertionError):
        check(mutant)


@pytest.mark.parametrize(("source", "count"), [("x = c.sum() - 1", 0), ("x = (a.sum(), b.sum(1), a.sum())", 2)])
def test_a_pattern_must_match_once(source, count):
    with pytest.raises(AssertionError, match=f"matches {count} expressions in m, must be 1"):
        mutated(ast.parse(source), Mutant("m", "A.sum()" if count else "A.sum() - A", "A"))

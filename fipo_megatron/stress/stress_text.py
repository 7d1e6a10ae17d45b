"""The results of a stress run as plain data, and as tables on the console."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fipo_megatron.plan.plan_text import aligned
from fipo_megatron.stress.stress_settings import StressSettings

_MIB = 2**20


def described(settings: StressSettings, world_size: int) -> dict[str, Any]:
    """Returns what was measured and where, for the head of ``stress.json``."""
    options, config = settings.options, settings.longest
    parallel = config.actor.parallel
    return {
        "config": options.config,
        "overrides": list(options.overrides),
        "model": settings.architecture.name,
        "ranks": world_size,
        "layout": {name: value for name, value in vars(parallel).items() if isinstance(value, int)},
        "engine_kind": config.rollout.engine,
        "lengths": list(options.lengths),
        "prompt_tokens": options.prompt_tokens,
        "median": options.median,
        "spread": options.spread if options.median is not None else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}",
        "torch": torch.__version__,
    }


def tables(data: Mapping[str, Any]) -> str:
    """Returns the results as aligned tables with their titles."""
    return "\n\n".join(f"{title}\n{aligned(rows)}" for title, rows in sections(data) if rows)


def sections(data: Mapping[str, Any]) -> list[tuple[str, list[dict[str, str]]]]:
    """Returns the title and the rows of each table of a stress run."""
    found: list[tuple[str, list[dict[str, str]]]] = []
    engine, actor, drift = (data.get(part) or [] for part in ("engine", "actor", "drift"))
    if engine:
        found.append((f"Engine ({data['engine_kind']}): responses of forced length", [_engine(row) for row in engine]))
        found.append(("Engine: milliseconds per token by position in the response", _by_position(engine)))
        found.append(("Engine: failures", [_failure(row, one) for row in engine for one in row["failures"]]))
    if actor:
        measured = [row for row in actor if "seconds" in row]
        found.append((f"Actor on {data['ranks']} rank(s): seconds", [_seconds(row) for row in measured]))
        found.append(
            (
                "Actor: peak memory in MiB, measured / planned",
                [_peaks(row, rank) for row in measured for rank in row["ranks"]],
            )
        )
    if drift:
        found.append(("Drift: engine against actor, by position in the response", _drift(drift)))
    failed = [(part, row) for part, rows in (("actor", actor), ("drift", drift)) for row in rows if row.get("failure")]
    found.append(("Not measured", [{"part": part, **_failed(row)} for part, row in failed]))
    return found


def _tokens(row: Mapping[str, Any]) -> str:
    return f"{row['length']:,}"


def _engine(row: Mapping[str, Any]) -> dict[str, str]:
    metrics, kv = row["metrics"], row["kv_cache"]
    return {
        "tokens": _tokens(row),
        "responses": str(row["responses"]),
        "new tokens": f"{row['tokens']:,}",
        "s": f"{metrics['seconds']:,.1f}",
        "tokens/s": f"{metrics['tokens_per_second']:,.0f}",
        "failures": str(metrics["failures"]),
        "retractions": str(metrics["retractions"]),
        "lost servers": str(row["lost_servers"]),
        "KV cache used": f"{kv['peak_tokens']:,} of {kv['capacity_tokens']:,}" if kv else "-",
        "most waiting": str(kv["peak_waiting"]) if kv else "-",
    }


def _by_position(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "tokens": _tokens(row),
            "from": f"{part['from']:,.0f}",
            "to": f"{part['to']:,.0f}",
            "ms per token": f"{1000 * part['seconds_per_token']:.2f}",
        }
        for row in rows
        for part in row["seconds_by_position"]
    ]


def _failure(row: Mapping[str, Any], one: Mapping[str, Any]) -> dict[str, str]:
    return {"tokens": _tokens(row), "responses": str(one["count"]), "reason": one["reason"]}


def _failed(row: Mapping[str, Any]) -> dict[str, str]:
    return {"tokens": _tokens(row), "reason": row["failure"]}


def _seconds(row: Mapping[str, Any]) -> dict[str, str]:
    seconds, metrics = row["seconds"], row["metrics"]
    return {
        "tokens": _tokens(row),
        "sequences": str(row["sequences"]),
        "log-probs": f"{seconds['log_probs']:.2f}",
        "update": f"{seconds['update']:.2f}",
        "Future-KL": f"{seconds['future_kl']:.4f}",
        "whole loss": f"{seconds['loss']:.4f}",
        "Future-KL / passes": f"{metrics['future_kl_fraction']:.3%}",
        "loss / passes": f"{metrics['loss_fraction']:.3%}",
        "note": f"update skipped: {row['skipped']}" if row["skipped"] else "",
    }


def _peaks(row: Mapping[str, Any], rank: Mapping[str, Any]) -> dict[str, str]:
    measured, planned, growth = rank["measured"], rank["planned"], rank["resident_growth"]
    plan = dict.fromkeys(measured) if planned is None else planned
    room = None if planned is None else max(planned.values()) - planned["kept"]
    return {
        "tokens": _tokens(row),
        "rank": str(rank["rank"]),
        "log-probs": f"{_mib(measured['log_probs'])} / {_mib(plan['log_probs'])}",
        "update": f"{_mib(measured['update'])} / {_mib(plan['update'])}",
        "largest difference": "-" if planned is None else f"{rank['plan_error']:.1%}",
        "resident growth": f"{_mib(growth)} / {_mib(room)}",
    }


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / _MIB:,.1f}"


def _drift(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    found = []
    for row in rows:
        if row.get("failure"):
            continue
        for part in [*row["positions"], {"from": 0, "to": "all", **row["metrics"]}]:
            found.append(
                {
                    "tokens": _tokens(row),
                    "from": "" if part["to"] == "all" else f"{part['from']:,}",
                    "to": "all" if part["to"] == "all" else f"{part['to']:,}",
                    "mean |Δ log-prob|": f"{part['mean']:.2e}",
                    "p99": f"{part['p99']:.2e}",
                    "max": f"{part['max']:.2e}",
                    "mean |Δ Future-KL|": f"{part['future_kl_mean']:.2e}",
                    "p99 |Δ F|": f"{part['future_kl_p99']:.2e}",
                    "max |Δ F|": f"{part['future_kl_max']:.2e}",
                }
            )
    return found

"""Metrics of a step do not depend on the order of groups; values that are not finite are null."""

from math import inf, nan

import numpy as np
import pytest

from fipo_megatron.actor.update_metrics import NoiseFloor, UpdateMetrics
from fipo_megatron.data.group_record import GroupRecord
from fipo_megatron.observe.metrics import METRICS
from fipo_megatron.observe.step_metrics import noise_metrics, rollout_metrics, update_metrics
from fipo_megatron.rollout.sampler import SampledGroups

TAGS = {metric.tag for metric in METRICS}


def record(prompt, lengths, accuracies):
    count = len(lengths)
    rewards = tuple(2.0 * accuracy - 1 for accuracy in accuracies)
    samples = tuple(range(count))
    return GroupRecord(prompt, 0, samples, 9, tuple(lengths), rewards, tuple(accuracies), oldest=3, truncated=1)


def update(loss, *, skipped="", **statistics):
    return UpdateMetrics(loss, 8.0, 0.5, 1e-3, skipped, statistics, np.zeros((2, 4), np.int64))


def test_rollout_metrics_do_not_depend_on_the_order_of_groups():
    records = [record("a", (1, 2), (0, 1)), record("b", (3, 10), (1, 1))]
    found = rollout_metrics(SampledGroups(tuple(records), (), {"batches": 2}), 5)
    assert found == rollout_metrics(SampledGroups(tuple(reversed(records)), (), {"batches": 2}), 5)
    assert set(found) <= TAGS
    assert (found["rollout/accuracy"], found["rollout/reward"]) == (0.75, 0.5)
    assert (found["rollout/response_tokens_mean"], found["rollout/response_tokens_max"]) == (4.0, 10)
    assert found["rollout/truncated_fraction"] == 0.5
    assert (found["rollout/staleness_max"], found["sampler/batches"], found["sampler/groups_kept"]) == (2, 2, 0)
    assert rollout_metrics(None, 5) == {}


def test_lengths_of_dropped_responses_exist_only_if_there_are_any():
    counts = {"responses_dropped": 4, "tokens_dropped": 90, "responses_restarted": 0, "tokens_restarted": 0}
    found = rollout_metrics(SampledGroups((), (), counts), 5)
    assert set(found) <= TAGS
    assert found["sampler/dropped_response_tokens_mean"] == 22.5
    assert "sampler/restarted_response_tokens_mean" not in found


def test_updates_are_reduced_to_means_and_extremes_without_skipped_ones():
    updates = [
        update(1.0, entropy=0.25, weight_min=1.0, weight_max=1.0),
        update(3.0, entropy=0.75, weight_min=0.9, weight_max=1.1),
        update(nan, skipped="non-finite loss"),
    ]
    found = update_metrics(updates)
    assert set(found) <= TAGS
    assert (found["policy/loss"], found["policy/entropy"]) == (2.0, 0.5)
    assert (found["future_kl/weight_min"], found["future_kl/weight_max"]) == (0.9, 1.1)
    assert found["future_kl/inert_updates_fraction"] == 0.5
    assert (found["optimizer/updates"], found["optimizer/skipped_updates"]) == (3, 1)
    assert update_metrics([update(inf)])["policy/loss"] is None


def test_all_sampled_responses_are_reported_beside_the_kept_groups():
    """Groups that are all wrong are dropped: the accuracy of the kept ones says nothing about them."""
    counts = {"responses_sampled": 8, "responses_judged": 6, "responses_right": 3, "response_tokens_sampled": 40}
    found = rollout_metrics(SampledGroups((record("a", (1, 2), (1, 1)),), (), counts), 5)
    assert (found["rollout/accuracy"], found["sampler/accuracy"]) == (1.0, 0.5)
    assert (found["rollout/response_tokens_mean"], found["sampler/response_tokens_mean"]) == (1.5, 5.0)
    assert set(found) <= TAGS
    assert rollout_metrics(SampledGroups((), (), counts), 5)["sampler/accuracy"] == 0.5
    assert "sampler/accuracy" not in rollout_metrics(SampledGroups((), (), {}), 5)


def test_supervised_fine_tuning_reports_no_comparison_of_policies():
    values = {"tokens": 4.0, "entropy": 0.5, "policy_kl": 0.0, "shift_abs_max": 0.0, "advantage_mean": 0.0}
    values |= {"ratio_negative_q50": 1.0, "mismatch_abs_mean": 1.0, "clip_fraction": 0.0}
    assert set(update_metrics([update(1.0, **values)], sft=True)) == {
        *("policy/loss", "policy/tokens", "policy/entropy"),
        *(f"optimizer/{name}" for name in ("grad_norm", "learning_rate", "updates", "skipped_updates")),
    }


@pytest.mark.parametrize("noise", [inf, nan])
def test_a_noise_floor_that_is_no_number_is_not_one_in_the_file(noise):
    values = {"policy/shift_abs_max": 0.1, "future_kl/abs_max": 0.1}
    found = noise_metrics(NoiseFloor(noise, 0.01), values, fipo=True)
    assert found["noise/shift"] is found["noise/shift_ratio"] is None
    assert (found["noise/future_kl"], found["noise/future_kl_ratio"]) == (0.01, pytest.approx(0.1))

"""Declarations of the charts, shared by the page and the picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fipo_megatron.observe.metrics import METRICS, PARTS
from fipo_megatron.report.runs import Run

TEXTS = {metric.tag: metric for metric in METRICS}
"""Metrics by tag; those of data sets have a placeholder."""


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        tag: Tag of the metric.
        label: Label in the legend.
    """

    tag: str
    label: str


@dataclass(frozen=True)
class Band:
    """The area between two metrics; of several bands the widest comes first.

    Attributes:
        low: Tag of the lower edge.
        high: Tag of the upper edge.
        label: Label in the legend.
        always: Draw the band even if several runs are shown.
    """

    low: str
    high: str
    label: str
    always: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart of the report.

    Attributes:
        key: Id on the page.
        section: Heading above the chart.
        title: Title with the unit.
        lines: Lines in the order of the legend.
        bands: Bands behind the lines.
        log: Start with a logarithmic scale; the page can switch it.
        percent: Show values, which are fractions, in percent.
        marks: Draw the points and do not smooth, because there are few values.
        picture: Rank among the charts of the PNG; 0: not part of it.
        stacked: Stack the lines; each run has a chart of its own.
        legend: Show a legend: the chart has several lines or bands, including those without data.
    """

    key: str
    section: str
    title: str
    lines: tuple[Line, ...]
    bands: tuple[Band, ...] = ()
    log: bool = False
    percent: bool = False
    marks: bool = False
    picture: int = 0
    stacked: bool = False
    legend: bool = False

    @property
    def tags(self) -> list[str]:
        """Tags of all lines and bands."""
        return [line.tag for line in self.lines] + [tag for band in self.bands for tag in (band.low, band.high)]


OUTCOME, POLICY, NOISE, TIME = (
    "Outcome",
    "Policy and Future-KL",
    "Drift, engine mismatch and noise",
    "Time and sampling",
)


def _lines(group: str, **labels: str) -> tuple[Line, ...]:
    return tuple(Line(f"{group}/{name}", label) for name, label in labels.items())


def _ratios(sign: str, title: str, picture: int) -> Chart:
    tag = f"policy/ratio_{sign}_q"
    return Chart(
        f"ratio-{sign}",
        POLICY,
        f"Importance ratio, tokens with {title}",
        tuple(Line(f"{tag}{q}", f"{q} %") for q in ("50", "1", "99")),
        (
            Band(f"{tag}0.1", f"{tag}99.9", "0.1–99.9 %"),
            Band(f"{tag}1", f"{tag}99", "1–99 %"),
            Band(f"{tag}5", f"{tag}95", "5–95 %"),
        ),
        log=True,
        picture=picture,
    )


def held_out(data_set: str, several: bool) -> list[Chart]:
    """Returns the charts of a data set."""
    tag, of = f"evaluation/{data_set}", f": {data_set}" if several else ""
    return [
        Chart(
            f"held-out-{data_set}",
            OUTCOME,
            f"Held-out accuracy{of} (avg@k, 95 % interval)",
            (Line(f"{tag}/avg", "avg@k"),),
            (Band(f"{tag}/avg_low", f"{tag}/avg_high", "95 % interval", always=True),),
            percent=True,
            marks=True,
            picture=1,
        ),
        Chart(
            f"votes-{data_set}",
            OUTCOME,
            f"Held-out cons@k and pass@k{of}",
            (Line(f"{tag}/cons", "cons@k"), Line(f"{tag}/pass", "pass@k")),
            percent=True,
            marks=True,
        ),
    ]


_LENGTH = Chart(
    "length",
    OUTCOME,
    "Response length (tokens)",
    _lines("rollout", response_tokens_mean="mean", response_tokens_median="median"),
    (
        Band("rollout/response_tokens_min", "rollout/response_tokens_max", "min–max"),
        Band("rollout/response_tokens_q25", "rollout/response_tokens_q75", "Q25–Q75"),
    ),
    picture=2,
)

_STACK = tuple(Line(f"time/{name}", name.replace("_", "-")) for name in PARTS if name not in ("step", "reward"))

CHARTS: tuple[Chart, ...] = (
    Chart(
        "accuracy-all",
        OUTCOME,
        "Held-out accuracy, all data sets",
        _lines("evaluation", accuracy="avg@k"),
        percent=True,
        marks=True,
        picture=1,
    ),
    _LENGTH,
    Chart("accuracy", OUTCOME, "Training accuracy", _lines("rollout", accuracy="accuracy"), percent=True, picture=3),
    Chart("reward", OUTCOME, "Training reward", _lines("rollout", reward="reward"), picture=4),
    Chart(
        "truncated",
        OUTCOME,
        "Truncated responses",
        _lines("rollout", truncated_fraction="truncated"),
        percent=True,
    ),
    Chart(
        "moments",
        OUTCOME,
        "Oops and Aha (fraction of responses, 95 % intervals)",
        _lines("moments", oops_fraction="Oops: right, then wrong", aha_fraction="Aha: wrong, then right"),
        (
            Band("moments/oops_fraction_low", "moments/oops_fraction_high", "Oops, interval"),
            Band("moments/aha_fraction_low", "moments/aha_fraction_high", "Aha, interval"),
        ),
        percent=True,
    ),
    Chart("entropy", POLICY, "Entropy (nats per token)", _lines("policy", entropy="entropy"), picture=5),
    Chart("policy-kl", POLICY, "Policy KL, mean of −d (nats)", _lines("policy", policy_kl="policy KL"), picture=6),
    Chart(
        "clip",
        POLICY,
        "Clipped tokens",
        _lines("policy", clip_fraction_low="low", clip_fraction_high="high", dual_clip_fraction="dual clip"),
        percent=True,
        picture=7,
    ),
    Chart(
        "grad-norm",
        POLICY,
        "Gradient norm before clipping",
        _lines("optimizer", grad_norm="gradient norm"),
        log=True,
        picture=8,
    ),
    Chart(
        "advantage",
        POLICY,
        "Length-weighted mean advantage",
        _lines("policy", advantage_mean="advantage"),
        picture=11,
    ),
    _ratios("positive", "A > 0", 14),
    _ratios("negative", "A ≤ 0", 15),
    Chart(
        "weight",
        POLICY,
        "Future-KL weight f",
        _lines("future_kl", weight_mean="mean", weight_min="min", weight_max="max"),
        picture=9,
    ),
    Chart(
        "shadow-weight",
        POLICY,
        "Future-KL weight f that FIPO would use",
        _lines("future_kl", shadow_weight_mean="mean", shadow_weight_min="min", shadow_weight_max="max"),
    ),
    Chart(
        "weight-clip",
        POLICY,
        "Tokens with f on a bound",
        _lines(
            "future_kl",
            weight_clip_positive_upper="A > 0, upper",
            weight_clip_positive_lower="A > 0, lower",
            weight_clip_negative_upper="A ≤ 0, upper",
            weight_clip_negative_lower="A ≤ 0, lower",
        ),
        percent=True,
        picture=16,
    ),
    Chart(
        "mismatch-shift",
        NOISE,
        "Drift and engine mismatch, mean |Δ log-prob|",
        (Line("policy/shift_abs_mean", "optimiser drift"), Line("mismatch/abs_mean", "engine mismatch")),
        log=True,
        picture=10,
    ),
    Chart(
        "mismatch-future-kl",
        NOISE,
        "Drift and engine mismatch, mean |Future-KL|",
        (Line("future_kl/abs_mean", "optimiser drift"), Line("mismatch/future_kl_abs_mean", "engine mismatch")),
        log=True,
    ),
    Chart(
        "noise-shift",
        NOISE,
        "Signal and noise floor, largest |Δ log-prob|",
        (Line("policy/shift_abs_max", "signal"), Line("noise/shift", "noise floor")),
        log=True,
        picture=17,
    ),
    Chart(
        "noise-future-kl",
        NOISE,
        "Signal and noise floor, largest |Future-KL|",
        (Line("future_kl/abs_max", "signal"), Line("noise/future_kl", "noise floor")),
        log=True,
    ),
    Chart("batches", TIME, "Generation batches per step", _lines("sampler", batches="generation batches"), picture=13),
    Chart("time", TIME, "Time of a step (s)", _STACK, stacked=True),
    Chart("step-time", TIME, "Time of a whole step (s)", _lines("time", step="step"), picture=12),
    Chart(
        "throughput",
        TIME,
        "Tokens per second",
        _lines(
            "throughput",
            tokens_per_second="of the whole step",
            generated_tokens_per_second="generated",
            trained_tokens_per_second="trained",
        ),
        log=True,
        picture=18,
    ),
)


def charts_of(runs: list[Run]) -> list[Chart]:
    """Returns the charts for which at least one run has data, without lines that no run has."""
    data_sets = sorted({name for run in runs for name in run.data_sets})
    every = [chart for name in data_sets for chart in held_out(name, len(data_sets) > 1)]
    every += [chart for chart in CHARTS if chart.key != "accuracy-all" or len(data_sets) != 1]
    return [chart for chart in (_with_data(chart, runs) for chart in every) if chart.lines]


def _with_data(chart: Chart, runs: list[Run]) -> Chart:
    there = {tag for tag in chart.tags if any(len(run.get(tag).finite()) for run in runs)}
    return replace(
        chart,
        lines=tuple(line for line in chart.lines if line.tag in there),
        bands=tuple(band for band in chart.bands if band.low in there and band.high in there),
        legend=len(chart.lines) + len(chart.bands) > 1,
    )


def lines_shown(chart: Chart, runs: int) -> tuple[Line, ...]:
    """Returns the lines to draw: quantiles other than the median are bands for one run, lines for several."""
    return chart.lines[:1] if chart.key.startswith("ratio-") and runs == 1 and chart.bands else chart.lines


def bands_shown(chart: Chart, runs: int) -> tuple[Band, ...]:
    """Returns the bands to draw: with several runs only those that stay readable when they overlap."""
    return tuple(band for band in chart.bands if runs == 1 or band.always)


def explained(chart: Chart) -> Iterator[tuple[str, str, str]]:
    """Yields label, tag and description of each line."""
    for line in chart.lines:
        yield line.label, line.tag, text_of(line.tag)


def text_of(tag: str) -> str:
    """Returns the description of a tag from the registry of metrics; empty if the tag is unknown."""
    metric = TEXTS.get(tag)
    if metric is None and tag.startswith("evaluation/"):
        metric = TEXTS.get(f"evaluation/{{data_set}}/{tag.rsplit('/', 1)[1]}")
    return metric.text if metric else ""

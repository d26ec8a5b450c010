"""Tables of samples, for experiments/RESULTS.md."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

MIB, TERA = 2**20, 1e12


def figure(sample: Mapping[str, Any]) -> float:
    """Seconds of one process: the median of its calls, or what its first call took beyond them."""
    later = statistics.median(sample["calls_s"])
    if sample["kind"] == "first_call":
        return sample["first_call_s"] - later
    return later


def by_variant(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Samples of each variant, in the order of their first."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        found.setdefault(sample["variant"], []).append(sample)
    return found


def matmul_peak(samples: Sequence[Mapping[str, Any]]) -> float:
    """FLOP/s of the fastest matrix product that any of the processes measured; 0 for none."""
    return max((sample.get("matmul_flops") or 0.0 for sample in samples), default=0.0)


def seconds(value: float) -> str:
    """With three digits that count."""
    return f"{value:.3g} s" if value >= 1.0 else f"{1e3 * value:.3g} ms"


def _median(samples: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [sample[key] for sample in samples if sample.get(key) is not None]
    return statistics.median(values) if values else None


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value / MIB:,.0f}"


def _memory(samples: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Peaks: of the process over what importing left, without weights, trimmed, XLA's, a GPU's."""
    peak, weights = _median(samples, "peak_bytes"), _median(samples, "parameter_bytes")
    return {
        "peak MiB": _mib(peak),
        "without weights": "" if peak is None or weights is None else _mib(peak - weights),
        "after malloc_trim": _mib(_median(samples, "trimmed_peak_bytes")),
        "XLA's temporaries": _mib(_median(samples, "xla_temp_bytes")),
        "peak of the device": _mib(_median(samples, "device_peak_bytes")),
    }


def rows(samples: Sequence[Mapping[str, Any]], peak: float) -> list[dict[str, str]]:
    """The table of one case: medians over processes and their range, ratios and memory.

    A ratio is diffusers' time divided by the variant's: above 1 the variant is faster. The second
    is to the fastest variant of diffusers.

    Args:
      samples: of one case.
      peak: FLOP/s of a matrix product, 0 for unknown.
    """
    variants = by_variant(samples)
    middle = {name: statistics.median(map(figure, each)) for name, each in variants.items()}
    theirs = [name for name, each in variants.items() if each[0]["side"] == "theirs"]
    fastest = min((middle[name] for name in theirs), default=None)
    table = []
    for name, each in variants.items():
        figures = [figure(sample) for sample in each]
        flop = _median(each, "flop")
        row = {
            "variant": name,
            "median": seconds(middle[name]),
            "min–max": f"{seconds(min(figures))} – {seconds(max(figures))}",
            "processes": str(len(each)),
        }
        if theirs:
            row[f"{theirs[0]} / this"] = f"{middle[theirs[0]] / middle[name]:.2f}"
        if len(theirs) > 1 and fastest is not None:
            row["fastest diffusers / this"] = f"{fastest / middle[name]:.2f}"
        if flop and each[0]["kind"] != "first_call":
            rate = flop / middle[name]
            row["TFLOP/s"] = f"{rate / TERA:.3g}"
            row["of matmul"] = f"{rate / peak:.0%}" if peak else ""
        row |= _memory(each)
        if (worst := max((s.get("difference", 0.0) for s in each), default=0.0)) > 0.0:
            row["largest difference"] = f"{worst:.1e} of {each[0]['largest_output']:.2g}"
        later = _median(each, "compile_s")
        if each[0]["kind"] == "first_call" and later is not None:
            row["trace + compile"] = (
                f"{seconds(_median(each, 'trace_s') or 0.0)} + {seconds(later)}"
            )
        table.append(row)
    return table


def markdown(table: Sequence[Mapping[str, str]]) -> str:
    """A table without the columns that are empty in every row."""
    names = list(dict.fromkeys(name for row in table for name in row))
    names = [name for name in names if any(row.get(name) for row in table)]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(row.get(name, "") for name in names) + " |" for row in table]
    return "\n".join(lines)

"""One sample of one variant, in a process of its own: python -m benchmarks.speed.worker JSON.

The last line that it prints is the sample as JSON.
"""

import ctypes
import importlib
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# The largest RMS difference from diffusers' float32, divided by the RMS of what is compared.
TOLERANCE = {("cpu", "float32"): 1e-4, ("cuda", "float32"): 2e-2}
HALF_TOLERANCE = 1e-1
MIN_CALLS, MAX_CALLS = 2, 100


class Spec(NamedTuple):
    """What a worker is asked for.

    Attributes:
      task: "write" the weights, inputs and expected outputs, "draw" the noise of a training step,
        "expect" its results, or "time".
      side: "theirs" or "ours".
      kind: see `cases.Case`.
      options: of the case.
      folder: with weights, inputs and expected outputs.
      device: "cpu" or "cuda".
      dtype: "float32" or "bfloat16".
      batch: examples of a call.
      compiled: whether torch.compile is used.
      compile_mode: its mode.
      seconds: about how long calls are repeated.
    """

    task: str
    side: str
    kind: str
    options: Mapping[str, Any]
    folder: str
    device: str
    dtype: str
    batch: int
    compiled: bool = False
    compile_mode: str | None = None
    seconds: float = 10.0

    def path(self, name: str) -> Path:
        """Of a file or folder beside the weights."""
        return Path(self.folder) / name

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Of an .npz beside the weights."""
        with np.load(self.path(name)) as file:
            return dict(file)

    def expected(self) -> dict[str, np.ndarray]:
        """What diffusers computed in float32."""
        return self.arrays("expected.npz")


class Prepared(NamedTuple):
    """A variant that is ready to be called.

    Attributes:
      call: computes and waits for the result.
      outputs: the last result as float32 on the host, in diffusers' layout.
      expected: reads the same of diffusers in float32.
      facts: for the sample: sizes, seconds of tracing.
      before: what is done before each call and not timed.
    """

    call: Callable[[], Any]
    outputs: Callable[[], dict[str, np.ndarray]]
    expected: Callable[[], dict[str, np.ndarray]]
    facts: dict[str, Any]
    before: Callable[[], Any] = lambda: None


def memory(field: str) -> int:
    """VmRSS, resident bytes of this process, or VmHWM, the most there were since `reset_peak`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak() -> None:
    """Forgets the peak so far, which importing, loading and compiling have made."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        # The peak then includes them, which `peak_is_of_calls` says.
        return


def give_back_free_memory() -> bool:
    """Has glibc return what is free in its heap to the system; whether it could."""
    # Not `host_memory.trim`, which would import jax into diffusers' processes.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))


def differences(
    outputs: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """The largest difference, the largest expected value, and the worst relative RMS difference.

    Raises:
      ValueError: if a name is missing or a shape differs.
    """
    largest = scale = relative = 0.0
    for name, value in expected.items():
        if name not in outputs or outputs[name].shape != value.shape:
            got = outputs[name].shape if name in outputs else None
            raise ValueError(f"{name} must have shape {value.shape}, got {got}")
        error = outputs[name].astype(np.float64) - value
        largest = max(largest, float(np.abs(error).max()))
        scale = max(scale, float(np.abs(value).max()))
        rms = float(np.sqrt(np.mean(error**2)) / np.sqrt(np.mean(np.float64(value) ** 2)))
        # A NaN must not be lost in max().
        relative = rms if not rms <= relative else relative
    return {"difference": largest, "largest_output": scale, "relative_rms": relative}


def check(found: Mapping[str, float], device: str, dtype: str) -> None:
    """Raises ValueError if the outputs are not those of diffusers up to rounding."""
    tolerance = TOLERANCE.get((device, dtype), HALF_TOLERANCE)
    if not found["relative_rms"] <= tolerance:
        raise ValueError(
            f"the outputs differ from diffusers' by {found['relative_rms']:.1e} of their RMS, more "
            f"than {tolerance:.0e}; nothing is timed"
        )


def timed(call: Callable[[], Any]) -> float:
    """Wall time of a call in seconds."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def repeat(prepared: Prepared, seconds: float) -> list[float]:
    """Wall times of as many calls as take about `seconds`."""
    times: list[float] = []
    while len(times) < MIN_CALLS or (sum(times) < seconds and len(times) < MAX_CALLS):
        prepared.before()
        times.append(timed(prepared.call))
    return times


def measure(spec: Spec) -> dict[str, Any]:
    """The sample of one process."""
    side = importlib.import_module(f"benchmarks.speed.{spec.side}")
    side.wait_for_device(spec)
    imported = memory("VmRSS")
    prepared: Prepared = getattr(side, spec.kind)(spec)
    sample: dict[str, Any] = {}
    prepared.before()
    sample["first_call_s"] = timed(prepared.call)
    sample["first_call_peak_bytes"] = memory("VmHWM") - imported
    sample |= differences(prepared.outputs(), prepared.expected())
    check(sample, spec.device, spec.dtype)
    # The second call still allocates what is kept afterwards.
    prepared.before()
    prepared.call()
    reset_peak()
    sample["peak_is_of_calls"] = memory("VmHWM") < 1.05 * memory("VmRSS")
    sample["calls_s"] = repeat(prepared, spec.seconds)
    sample["peak_bytes"] = memory("VmHWM") - imported
    if give_back_free_memory():
        reset_peak()
        prepared.before()
        prepared.call()
        sample["trimmed_peak_bytes"] = memory("VmHWM") - imported
    sample |= side.device_facts(spec)
    sample["matmul_flops"] = side.matmul(spec)
    return {**sample, **prepared.facts}


def import_time(spec: Spec) -> dict[str, Any]:
    """Seconds of importing, interpreter and numpy excluded."""
    names = {
        ("theirs", False): ("torch", "diffusers"),
        ("theirs", True): ("torch", "diffusers.models.unets.unet_2d_condition"),
        ("ours", False): ("diffusion_jax",),
        ("ours", True): ("diffusion_jax.pretrained", "diffusion_jax.models.unet"),
    }[spec.side, spec.options["use"]]
    begin = time.perf_counter()
    for name in names:
        importlib.import_module(name)
    return {"calls_s": [time.perf_counter() - begin], "imported": names}


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    if spec.task != "time":
        result = getattr(importlib.import_module(f"benchmarks.speed.{spec.side}"), spec.task)(spec)
    elif spec.kind == "import":
        result = import_time(spec)
    else:
        result = measure(spec)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Times this library beside diffusers, in fresh processes that take turns.

python -m benchmarks.speed                               # needs torch and diffusers
python -m benchmarks.speed --only unet-mid train-cifar10 --processes 5
python -m benchmarks.speed --device cuda --only unet-sd15 text-to-image-sd15 train-cifar10
python -m benchmarks.speed --only "*-tiny" --processes 1 --seconds 1      # tries the scripts

diffusers makes random weights (seed 0) and saves them; both sides load that folder. Every sample is
a process of its own, and the variants take turns: A B C A B C …. Each process first compares its
output with that of diffusers in float32, for a training step the loss and the whole gradient, and
times nothing if they differ. Its figure is the median of its calls; a table has the median of these
figures, their range, and ratios of diffusers' time to the variant's. Every call of every process is
a number in the file --output.

What is timed:

  unet-…            a forward pass, 64x64 latents, batch 2: widths (128, 256, 512, 512), or SD 1.5's
  train-cifar10     loss, gradient, Adam and average of google/ddpm-cifar10-32's UNet, batch 8
  first-call-…      what the first call takes beyond a later one, of torch.compile and of jit; then
                    of a second process that finds the caches of the first
  sampler…          20 steps of DPM-Solver++ 2M around a tiny network; and with its grid
  import…           `import torch, diffusers` and `import diffusion_jax`; and what loads a UNet
  text-to-image-…   a prompt to images: 50 steps with guidance, and decoding; on a GPU

On a CPU everything is float32 and diffusers is eager; on a GPU it is bfloat16 (in training the
weights stay float32), and diffusers is also compiled, in channels_last. TFLOP/s count matrix
products and convolutions; beside them is the fraction of the fastest square matrix product in any
process of the run. Times end when the device is done.

Memory is the peak of resident memory during the timed calls, minus what there was after importing;
"without weights" it is that minus their bytes. glibc keeps much of what was freed: "after
malloc_trim" is the peak of one more call after `malloc_trim(0)` has given that back. This library
does so itself after a long compilation. On a GPU there is the peak of the device too.

The allocator's variants start with these settings of glibc, which no package can set for itself:

  GLIBC_TUNABLES=glibc.malloc.mmap_threshold=17179869184:glibc.malloc.trim_threshold=17179869184:\
glibc.malloc.hugetlb=1

By default glibc maps every large block anew and returns it when freed, so that each call faults in
all of its pages. The thresholds make it keep them, in which MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ are older names; hugetlb=1 (glibc 2.35 and newer, Linux with transparent huge
pages at `madvise`) makes pages 2 MiB large. Memory that was once used stays with the process.

The second start finds what JAX_COMPILATION_CACHE_DIR holds, with
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0, and TORCHINDUCTOR_CACHE_DIR. In other cases a process
finds them empty on a CPU, and on a GPU what an earlier process of its variant has compiled.

Nothing else should run meanwhile: torch's threads wait for each other and lose much more than their
share to a busy neighbour. Other work is measured, and a run that had some is called not valid.
"""

import argparse
import datetime
import fnmatch
import importlib.metadata
import json
import math
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.speed import report
from benchmarks.speed.cases import (
    ALLOCATOR,
    CASES,
    VARIANTS,
    Case,
    Variant,
    default_cases,
    default_variants,
)

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers", "numpy")
# Cores that others may use; the threads of torch wait for each other and suffer most.
BUSY = 0.1
# What a user's shell may have set of what the variants differ in.
CLEARED = (
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "LD_PRELOAD",
    "JAX_COMPILATION_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
)


class Run(NamedTuple):
    """One case of a run.

    Attributes:
      name: of the case.
      case: what is timed.
      folder: for weights and caches, empty at first.
      args: the command line's.
    """

    name: str
    case: Case
    folder: Path
    args: argparse.Namespace

    def spec(self, task: str, side: str, **fields: Any) -> dict[str, Any]:
        """A `worker.Spec` as JSON has it."""
        args = self.args
        return {
            "task": task,
            "side": side,
            "kind": self.case.kind,
            "options": self.case.options,
            "folder": str(self.folder),
            "device": args.device,
            "dtype": args.dtype,
            "batch": args.batch or self.case.batch,
            "compile_mode": args.compile_mode,
            "seconds": args.seconds,
            **fields,
        }


def environment(device: str, compiled: Path, variant: Variant | None = None) -> dict[str, str]:
    """Of a worker: the device, where compiled programs are kept, and the variant's settings."""
    kept = {name: value for name, value in os.environ.items() if name not in CLEARED}
    settings = {
        "JAX_PLATFORMS": device,
        "JAX_COMPILATION_CACHE_DIR": str(compiled / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }
    return {**kept, **settings, **(ALLOCATOR if variant and variant.allocator else {})}


def work(spec: dict[str, Any], settings: dict[str, str]) -> dict[str, Any]:
    """What a worker prints.

    Raises:
      RuntimeError: with the end of what it said, if it failed.
    """
    command = [sys.executable, "-m", "benchmarks.speed.worker", json.dumps(spec)]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-20:])
        raise RuntimeError(f"{spec['task']} of {spec['kind']} by {spec['side']} failed:\n{tail}")
    return json.loads(done.stdout.splitlines()[-1])


class Others:
    """CPU time that processes of others take, which this machine should not have while timing."""

    def __init__(self):
        self.begin = time.monotonic(), self._busy(), self._own()

    @staticmethod
    def _busy() -> float:
        """Seconds that all CPUs have worked, of Linux."""
        path = Path("/proc/stat")
        if not path.exists():
            return math.nan
        ticks = [int(value) for value in path.read_text().split("\n", 1)[0].split()[1:8]]
        user, nice, system, _, _, irq, softirq = ticks
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _own() -> float:
        own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in own)

    def cores(self) -> float:
        """Cores that they have kept busy since."""
        wall, busy, own = self.begin
        return (self._busy() - busy - (self._own() - own)) / (time.monotonic() - wall)


def prepare(run: Run) -> dict[str, Any]:
    """Writes what both sides load; the FLOP of a call."""
    if run.case.kind == "import":
        return {}
    settings = environment(run.args.device, run.folder / "preparing")
    written = work(run.spec("write", "theirs"), settings)
    if run.case.kind == "train":
        work(run.spec("draw", "ours"), settings)
        work(run.spec("expect", "theirs"), settings)
    return written


def cache(run: Run, variant: Variant, number: int) -> Path:
    """Where a process keeps its compiled programs; no other variant sees them.

    On a CPU each process of a steady case compiles anew: what compiling leaves behind is part of
    its memory, and has to be so in all of them.
    """
    fresh = {"cold": True, "warm": False, "shared": run.args.device == "cpu"}[variant.cache]
    # torch's compiler takes a name with spaces for several files.
    name = variant.name.replace(",", "").replace(" ", "-")
    return run.folder / "caches" / name / (str(number) if fresh else "kept")


def one_sample(run: Run, variant: Variant, number: int) -> dict[str, Any]:
    """One process of a variant."""
    settings = environment(run.args.device, cache(run, variant, number), variant)
    return work(run.spec("time", variant.side, compiled=variant.compiled), settings)


def run_case(run: Run, variants: Sequence[Variant], written: dict[str, Any]) -> list[dict]:
    """All samples of a case, each also printed and appended to the file."""
    for variant in variants:
        # Fills caches: those on the disk, and the system's of files that are imported.
        if variant.cache == "warm" or run.case.kind == "import":
            one_sample(run, variant, -1)
    samples = []
    for number in range(run.args.processes):
        for variant in variants:
            others = Others()
            measured = one_sample(run, variant, number)
            sample = {
                "case": run.name,
                "kind": run.case.kind,
                "variant": variant.name,
                "side": variant.side,
                "process": number,
                "dtype": run.args.dtype,
                "batch": run.args.batch or run.case.batch,
                **written,
                **measured,
                "others_cores": others.cores(),
            }
            samples.append(sample)
            with run.args.output.open("a") as file:
                file.write(json.dumps(sample) + "\n")
            print(f"{run.name} {number} {variant.name}: {_short(sample)}", flush=True)
    return samples


def _short(sample: dict[str, Any]) -> str:
    told = f"{report.seconds(report.figure(sample))}, {len(sample['calls_s'])} calls"
    if sample["others_cores"] > BUSY:
        told += f", while others used {sample['others_cores']:.1f} cores"
    if "difference" in sample:
        told += f", difference {sample['difference']:.1e} of {sample['largest_output']:.2g}"
    return told


def hardware(samples: Sequence[dict[str, Any]]) -> str:
    """The processor and, if there is one, the GPU."""
    model = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        model = f"{found[0]} ({model})" if found else model
    cpu = f"{os.cpu_count()} CPU cores, {model}"
    devices = {sample.get("device") for sample in samples} - {None, "cpu"}
    return ", ".join([*sorted(map(str, devices)), cpu])


def heading(samples: Sequence[dict[str, Any]]) -> str:
    """What the numbers were measured on, when, with what and how."""
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    command = shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]])
    return (
        f"`{command}`, {datetime.date.today()}, {hardware(samples)}, "
        f"Python {platform.python_version()}, {', '.join(versions)}, {samples[0]['dtype']}."
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the names of the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="CASE", help=f"globs of {', '.join(CASES)}")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="globs of variants")
    parser.add_argument("--processes", type=int, default=5, help="samples of each variant")
    parser.add_argument("--seconds", type=float, default=10.0, help="of calls in a process")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, help="examples of a call, in place of the case's")
    parser.add_argument("--compile-mode", help="of torch.compile")
    parser.add_argument("--output", type=Path, default=Path("runs/speed.jsonl"))
    args = parser.parse_args(arguments)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    for name in ("processes", "batch"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    chosen = args.only or default_cases(args.device)
    args.cases = [name for name in CASES if any(fnmatch.fnmatchcase(name, one) for one in chosen)]
    unknown = [one for one in chosen if not fnmatch.filter(CASES, one)]
    if unknown:
        parser.error(f"--only: there is no case {', '.join(unknown)}, only {', '.join(CASES)}")
    return args


def chosen_variants(kind: str, args: argparse.Namespace) -> list[Variant]:
    """The default ones, or those of --variants.

    Raises:
      RuntimeError: if there are none.
    """
    if args.variants is None:
        return list(default_variants(kind, args.device))
    names = [variant.name for variant in VARIANTS[kind]]
    chosen = {name for one in args.variants for name in fnmatch.filter(names, one)}
    if not chosen:
        raise RuntimeError(f"no variant is {' or '.join(args.variants)}; there are {names}")
    return [variant for variant in VARIANTS[kind] if variant.name in chosen]


def main() -> int:
    args = parse()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    finished, failed = [], []
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(name, CASES[name], Path(folder), args)
            try:
                finished.append(run_case(run, chosen_variants(run.case.kind, args), prepare(run)))
            except RuntimeError as error:
                # Hours of other cases must not be lost.
                failed.append(name)
                print(f"{name}: {error}", file=sys.stderr)
    if failed:
        print(f"\nFAILED: {', '.join(failed)}", file=sys.stderr)
    if not finished:
        return 1
    samples = [sample for case in finished for sample in case]
    peak = report.matmul_peak(samples)
    print(f"\n{heading(samples)}")
    if peak:
        print(f"Fastest matrix product: {peak / report.TERA:.3g} TFLOP/s.")
    disturbed = sum(sample["others_cores"] > BUSY for sample in samples)
    if disturbed:
        print(f"NOT VALID: other work ran beside {disturbed} of {len(samples)} processes.")
    for case in finished:
        print(f"\n{case[0]['case']}, batch {case[0]['batch']}:\n")
        print(report.markdown(report.rows(case, peak)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""proof: trains a small system, and checks what must hold beside controls that must fail."""

import functools
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax.commands.evaluate import real_data
from diffusion_jax.commands.results import append_row, mean_and_error
from diffusion_jax.commands.run import restore_stage, stage_dir
from diffusion_jax.commands.sample import make_sampler
from diffusion_jax.commands.scores import Real
from diffusion_jax.commands.train import train
from diffusion_jax.core.types import Params
from diffusion_jax.data.sources import take
from diffusion_jax.experiment import Experiment
from diffusion_jax.io.files import write_text

PROOFS = ("ddpm", "classifier_guidance", "classifier_free")
SEEDS = (0, 1, 2)
Scores = Mapping[str, float]


@dataclass(frozen=True)
class Claim:
    """What a score must be.

    Attributes:
      score: its name, "ROW/SCORE" or one that `Proof.derive` makes.
      low, high: the bounds that it must lie in.
      control: whether it belongs to something that was broken on purpose: then the bounds say
        how it must fail, and a control that does not fail makes the whole proof void.
    """

    score: str
    low: float = -np.inf
    high: float = np.inf
    control: bool = False

    def holds(self, scores: Scores) -> bool:
        """Whether the score lies in the bounds; NaN does not."""
        return bool(self.low <= scores[self.score] <= self.high)

    def bounds(self) -> str:
        if self.low == -np.inf:
            return f"<= {self.high:g}"
        if self.high == np.inf:
            return f">= {self.low:g}"
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Proof:
    """A system that is trained at a small size, and what that must show.

    Attributes:
      arms: what is trained, one stage each; the first is the system itself, the others are
        parts of it and retrained controls.
      rows: what is measured: (bench) -> scores, by name of the row, in order.
      derive: scores by "ROW/SCORE" -> further scores, ratios and differences of them.
      claims: what must hold, controls included.
      draw: (bench, path) writes a picture.
      report: rows and derived scores that go into the table of results.
      ablations: further arms and rows that only `ablate` trains and measures.
    """

    arms: Mapping[str, Experiment]
    rows: Mapping[str, Callable[["Bench"], Scores]]
    derive: Callable[[Scores], Scores]
    claims: tuple[Claim, ...]
    draw: Callable[["Bench", Path], None]
    ablations: Mapping[str, Experiment] = field(default_factory=dict)
    ablation_rows: Mapping[str, Callable[["Bench"], Scores]] = field(default_factory=dict)


class Bench:
    """One seed of a proof: trains arms when they are asked for, draws and scores.

    Everything that was trained or measured is kept in `workdir`, so that a proof that was
    interrupted goes on where it was.
    """

    def __init__(self, proof: Proof, workdir: Path, seed: int):
        self.proof, self.workdir, self.seed = proof, workdir, seed
        self._params: dict[str, Params] = {}
        self._samplers: dict[Any, Callable] = {}

    def experiment(self, arm: str) -> Experiment:
        """What an arm trains, with this bench's seed."""
        arms = {**self.proof.arms, **self.proof.ablations}
        experiment = arms[arm]
        return replace(experiment, training=replace(experiment.training, seed=self.seed))

    def params(self, arm: str) -> Params:
        """The averaged parameters of an arm, which is trained first if it was not."""
        if arm not in self._params:
            experiment, folder = self.experiment(arm), self.workdir / arm
            print(f"training {arm}", flush=True)
            train(experiment, folder)
            folder = stage_dir(folder, experiment.system.build(), experiment.training.stage)
            self._params[arm] = restore_stage(folder)[1]
        return self._params[arm]

    @functools.cached_property
    def real(self) -> Real:
        """Training and held-out data with the data set's oracle."""
        return real_data(next(iter(self.proof.arms.values())), judged=True)

    @functools.cached_property
    def splits(self) -> dict[str, dict[str, np.ndarray]]:
        """All real images and labels of both splits."""
        data = next(iter(self.proof.arms.values())).data
        sources = {split: replace(data, split=split).source() for split in ("train", "test")}
        return {split: take(source, len(source)) for split, source in sources.items()}

    def labels(self, count: int | None = None) -> np.ndarray:
        """Labels in the shares of the training data, as many as there are if count is None."""
        labels = self.real.train_labels
        return np.resize(labels, len(labels) if count is None else count)

    def draw(self, system: Any, params: Params, labels: np.ndarray, **parts: Any) -> np.ndarray:
        """Images [N, H, W, C], one for each label; parts are guide, sampler and grid."""
        if system not in self._samplers:
            self._samplers[system] = make_sampler(system.build())
        return self._samplers[system](
            params, {"label": labels}, seed=1000 + self.seed, batch_size=512, **parts
        )

    def score(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The scores of images drawn for labels, see `commands.scores.compare`."""
        return self.real.score(images, labels)

    def measured(self, rows: Mapping[str, Callable[["Bench"], Scores]]) -> dict[str, float]:
        """The scores of rows by "ROW/SCORE"; those that were measured before are read."""
        path = self.workdir / "scores.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        for name, measure in rows.items():
            if name not in known:
                start = time.time()
                known[name] = {key: float(value) for key, value in measure(self).items()}
                self.workdir.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(known, indent=2) + "\n")
                print(f"measured {name} in {time.time() - start:.0f} s", flush=True)
        return {f"{row}/{key}": known[row][key] for row in rows for key in known[row]}


def find_proof(name: str) -> Proof:
    """The proof with that name.

    Raises:
      ValueError: if there is none.
    """
    if name not in PROOFS:
        raise ValueError(f"no proof {name!r}: expected one of {list(PROOFS)}")
    return import_module(f"diffusion_jax.experiments.proofs.{name}").PROOF


def provenance() -> dict[str, str]:
    """What a row of results says of the machine and the libraries."""
    versions = [f"{name} {metadata.version(name)}" for name in ("jax", "flax", "optax", "numpy")]
    device = jax.devices()[0]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{jax.device_count()} x {device.device_kind}, {platform.machine()}",
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
    }


def prove(name: str, *, workdir: Path, seed: int, results: Path) -> bool:
    """Trains, measures, prints and records one seed of a proof; whether every claim holds.

    Args:
      name: one of PROOFS.
      workdir: gets NAME/seed-SEED with everything that was trained and measured.
      seed: of parameters, data order, noise and samples.
      results: Markdown file that gets a row, once for every workdir and seed.
    """
    proof = find_proof(name)
    folder = workdir / name / f"seed-{seed}"
    bench = Bench(proof, folder, seed)
    start = time.time()
    scores = bench.measured(proof.rows)
    scores |= {key: float(value) for key, value in proof.derive(scores).items()}
    picture = folder / f"{name}.png"
    if not picture.exists():
        proof.draw(bench, picture)
    holds = show(name, proof.claims, scores)
    report = folder / "report.json"
    if not report.exists():
        row = {
            "seed": seed,
            **provenance(),
            "seconds": round(time.time() - start),
            "command": f"`make proof-{name} SEED={seed}`",
            "verdict": "holds" if holds else "DOES NOT HOLD",
            **{claim.score: scores[claim.score] for claim in proof.claims},
        }
        append_row(results, f"proof {name}", row)
        write_text(report, json.dumps({"row": row, "scores": scores}, indent=2) + "\n")
    print(f"picture and scores are in {folder}")
    return holds


def show(name: str, claims: Sequence[Claim], scores: Scores) -> bool:
    """Prints measured against expected; whether every claim holds."""
    width = max(len(claim.score) for claim in claims)
    for claim in claims:
        kind = "control" if claim.control else "claim"
        verdict = "ok" if claim.holds(scores) else "NOT MET"
        value = scores[claim.score]
        print(f"{claim.score:{width}}  {value:9.4f}  {claim.bounds():>14}  {kind:7}  {verdict}")
    broken = [c for c in claims if not c.holds(scores)]
    void = any(claim.control for claim in broken)
    verdict = "holds" if not broken else "is void: a control did not fail" if void else "fails"
    print(f"{name}: the proof {verdict}")
    return not broken


def ablate(name: str, *, workdir: Path, results: Path, seeds: Sequence[int] = SEEDS) -> bool:
    """Every seed of a proof, then every ablation arm with the same seeds; whether all hold.

    Each arm gets one row: mean ± standard error of its scores over the seeds.
    """
    proof = find_proof(name)
    holds = [prove(name, workdir=workdir, seed=seed, results=results) for seed in seeds]
    rows = {**proof.rows, **proof.ablation_rows}
    done = workdir / name / "ablation.json"
    known = json.loads(done.read_text()) if done.exists() else {}
    for row, measure in rows.items():
        if row not in known:
            benches = (Bench(proof, workdir / name / f"seed-{seed}", seed) for seed in seeds)
            measured = [bench.measured({row: measure}) for bench in benches]
            known[row] = {
                key.removeprefix(f"{row}/"): mean_and_error([scores[key] for scores in measured])
                for key in measured[0]
            }
            cells = {"arm": row, "seeds": len(seeds), **provenance()}
            cells["command"] = f"`make ablate-{name}`"
            append_row(results, f"ablation {name}", {**cells, **known[row]})
            write_text(done, json.dumps(known, indent=2) + "\n")
        print(f"{row}: " + ", ".join(f"{key} {value}" for key, value in known[row].items()))
    return all(holds)

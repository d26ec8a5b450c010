"""proof: trains a small system, and checks what must hold beside controls that must fail."""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.commands import figures
from diffusion_jax.commands.evaluate import real_data
from diffusion_jax.commands.results import append_row, mean_and_error
from diffusion_jax.commands.run import provenance, restore_stage, stage_dir
from diffusion_jax.commands.sample import make_sampler
from diffusion_jax.commands.scores import Real
from diffusion_jax.commands.train import train
from diffusion_jax.configuration import to_dict
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
        self.seconds = 0.0
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
        """The scores of rows by "ROW/SCORE"; those that were measured before are read.

        Raises:
          ValueError: if the directory holds measurements of other experiments.
        """
        path = self.workdir / "scores.json"
        settings = {
            arm: to_dict(self.experiment(arm)) for arm in (*self.proof.arms, *self.proof.ablations)
        }
        known = {"settings": settings, "seconds": 0.0, "rows": {}}
        if path.exists():
            known = json.loads(path.read_text())
            if known["settings"] != settings:
                raise ValueError(
                    f"{self.workdir} holds measurements of other experiments; choose another "
                    "--workdir, or delete it"
                )
        for name, measure in rows.items():
            if name not in known["rows"]:
                start = time.time()
                scores = {key: float(value) for key, value in measure(self).items()}
                known["rows"][name] = scores
                known["seconds"] += time.time() - start
                self.workdir.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(known, indent=2) + "\n")
                print(f"measured {name} in {time.time() - start:.0f} s", flush=True)
        self.seconds = known["seconds"]
        return {f"{row}/{key}": value for row in rows for key, value in known["rows"][row].items()}

    def scores(self) -> dict[str, float]:
        """All scores of the proof, the derived ones included."""
        scores = self.measured(self.proof.rows)
        return scores | {key: float(v) for key, v in self.proof.derive(scores).items()}


def find_proof(name: str) -> Proof:
    """The proof with that name.

    Raises:
      ValueError: if there is none.
    """
    if name not in PROOFS:
        raise ValueError(f"no proof {name!r}: expected one of {list(PROOFS)}")
    return import_module(f"diffusion_jax.experiments.proofs.{name}").PROOF


def prove(name: str, *, workdir: Path, seed: int, results: Path) -> bool:
    """Trains, measures, prints and records one seed of a proof; whether every claim holds.

    Args:
      name: one of PROOFS.
      workdir: gets NAME/seed-SEED with everything that was trained and measured.
      seed: of parameters, data order, noise and samples.
      results: Markdown file that gets a row, and pictures/ beside it a picture.

    Raises:
      ValueError: if there is no such proof, or workdir holds another one's measurements.
    """
    proof = find_proof(name)
    # Missing plotting libraries should show before the work, not after it.
    figures.pyplot()
    bench = Bench(proof, workdir / name / f"seed-{seed}", seed)
    scores = bench.scores()
    report = bench.workdir / "report.json"
    picture = results.parent / "pictures" / f"{name}-seed-{seed}.png"
    if not picture.exists():
        picture.parent.mkdir(parents=True, exist_ok=True)
        proof.draw(bench, picture)
    holds = show(name, proof.claims, scores)
    if not report.exists():
        row = {
            "seed": seed,
            **provenance(),
            "minutes": round(bench.seconds / 60, 1),
            "command": f"`diffusion-jax proof {name} --seed {seed}`",
            "picture": f"[picture](pictures/{picture.name})",
            "verdict": "holds" if holds else "DOES NOT HOLD",
            **{claim.score: scores[claim.score] for claim in proof.claims},
        }
        write_text(report, json.dumps(row, indent=2) + "\n")
    append_row(results, f"proof {name}", json.loads(report.read_text()))
    print(f"the picture is {picture}, everything else in {bench.workdir}")
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
    """Every seed of a proof, then every ablation arm with the same seeds.

    One row of results holds the claims' scores, one more each row of measurements, as mean ±
    standard error over the seeds.

    Returns:
      whether every claim holds for the mean, two standard errors to either side.
    """
    proof = find_proof(name)
    for seed in seeds:
        prove(name, workdir=workdir, seed=seed, results=results)
    benches = [Bench(proof, workdir / name / f"seed-{seed}", seed) for seed in seeds]
    every = [bench.scores() for bench in benches]
    of_claims = {claim.score: [scores[claim.score] for scores in every] for claim in proof.claims}
    _record(name, "claims", of_claims, seeds=seeds, workdir=workdir, results=results)
    for row, measure in {**proof.rows, **proof.ablation_rows}.items():
        measured = [bench.measured({row: measure}) for bench in benches]
        values = {
            key.removeprefix(f"{row}/"): [scores[key] for scores in measured] for key in measured[0]
        }
        _record(name, row, values, seeds=seeds, workdir=workdir, results=results)
    shown = [_shown_with_margin(claim, of_claims[claim.score]) for claim in proof.claims]
    return all(shown)


def _record(
    name: str,
    arm: str,
    values: Mapping[str, Sequence[float]],
    *,
    seeds: Sequence[int],
    workdir: Path,
    results: Path,
) -> None:
    """Appends the row of an arm, as it was when it was first complete."""
    numbers = "-".join(map(str, seeds))
    path = workdir / name / f"ablation-{numbers}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if arm not in known:
        known[arm] = {
            "arm": arm,
            "seeds": " ".join(map(str, seeds)),
            **provenance(),
            "command": f"`diffusion-jax ablate {name} --seeds {' '.join(map(str, seeds))}`",
            "scores": ", ".join(f"{key} {mean_and_error(v)}" for key, v in values.items()),
        }
        write_text(path, json.dumps(known, indent=2) + "\n")
    append_row(results, f"ablation {name}", known[arm])


def _shown_with_margin(claim: Claim, values: Sequence[float]) -> bool:
    """Prints a claim's mean; whether it holds two standard errors to either side."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    ends = [np.mean(values) - 2 * error, np.mean(values) + 2 * error]
    holds = all(claim.holds({claim.score: end}) for end in ends)
    print(
        f"{claim.score:40}  {mean_and_error(values):>18}  {claim.bounds():>14}  "
        f"{'control' if claim.control else 'claim':7}  {'ok' if holds else 'NOT MET'}"
    )
    return holds

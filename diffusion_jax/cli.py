"""The command line: every command of `USAGE`, its options, and how they are read."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from jax.errors import JaxRuntimeError

from diffusion_jax.commands.bench_plan import Benchmark, find_benchmark
from diffusion_jax.configuration import TABLES
from diffusion_jax.core.host_memory import trim_after_compiling
from diffusion_jax.experiment import EXPERIMENTS, Experiment, find, find_stages, run_configs
from diffusion_jax.io.checkpoint_errors import CheckpointError
from diffusion_jax.systems.parts import SWITCHES
from diffusion_jax.training.memory import is_out_of_memory
from diffusion_jax.training.processes import Processes, initialize

USAGE = f"""usage: diffusion-jax COMMAND …

  train NAME [--tiny] --workdir DIR     train an experiment, or go on with it; --stage STAGE
                                        chooses one of several stages
  sample NAME [--tiny] --workdir DIR    draw images with a trained run's averaged weights
  sample --model FOLDER_OR_ID           draw images with a released pipeline: --prompt, --image,
                                        --mask, --layout …; --from-image FILE.png draws one again
  finetune --model … --data … --workdir …
                                        train a released pipeline further, whole or by LoRA
  evaluate NAME [--tiny] --workdir DIR  score a trained run against real data
  demo                                  train, sample and score handwritten digits in minutes
  proof NAME [--seed N]                 show what a system must do, beside controls that must fail
  ablate NAME                           the same with three seeds and more retrained controls
  bench schedules [FILE.py] [--tiny]    compare schedules, grids and samplers on an exact denoiser,
                                        or trained runs with --run DIR …
  bench order                           measure the order of convergence of every sampler
  toy FOLDER                            a small pipeline with random weights, and pictures, a mask
                                        and a layout to try the commands with
  data prepare SET                      make digits, mnist or cifar10 ready for training
  convert FILE … OUT                    write the pickled weights of torch as safetensors; the
                                        only command that needs torch

NAME is one of {", ".join(EXPERIMENTS)}, a .py file that defines CONFIG, a .json file, or the
working directory of a run. Every value of the experiment is an option (see COMMAND NAME --help);
a part is exchanged by its name: --system.sampler ddim, --system.schedule cosine.
"""

# What one line explains.
EXPECTED = (
    ValueError,
    OSError,
    ImportError,
    MemoryError,
    FloatingPointError,
    CheckpointError,
)

Config = Annotated[Experiment, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Train:
    """Trains an experiment, going on from the newest good checkpoint.

    SIGTERM lets the update under way finish, saves a checkpoint and exits with 143; a second one
    exits at once. The same holds for Ctrl-C, with 130.

    Attributes:
      workdir: where configuration, checkpoints and logs go; every process must see it.
      processes: how several processes of one job find each other.
      trace: trace five updates with jax.profiler into WORKDIR/trace.
    """

    config: Config
    workdir: Path
    processes: Processes = Processes()
    trace: bool = False

    def run(self) -> int:
        from diffusion_jax.commands.train import train

        initialize(self.processes)
        train(self.config, self.workdir, trace=self.trace)
        return 0


@dataclass(frozen=True)
class TrainStages:
    """Trains every stage of an experiment, one after the other.

    Attributes:
      configs: of each stage.
      workdir: gets a folder for each stage.
    """

    configs: tuple[Experiment, ...]
    workdir: Path

    def run(self) -> int:
        from diffusion_jax.commands.train import train

        initialize(Processes())
        for config in self.configs:
            train(config, self.workdir)
        return 0


@dataclass(frozen=True)
class Sample:
    """Draws images with the averaged weights of the newest checkpoint.

    Attributes:
      workdir: of a trained run.
      labels: classes to draw, repeated until there are num_images; all classes in turn if empty.
      num_images: images to draw.
      scale: guidance scale; the configured one if not given.
      num_steps: sampling steps; the configured ones if not given.
      seed: image i is a function of seed and i.
      batch_size: images drawn at once.
      out: folder for the images; WORKDIR/samples if not given.
    """

    config: Config
    workdir: Path
    labels: tuple[int, ...] = ()
    num_images: int = 40
    scale: float | None = None
    num_steps: int | None = None
    seed: int = 0
    batch_size: int = 256
    out: Path | None = None

    def run(self) -> int:
        from diffusion_jax.commands.sample import draw

        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        draw(options.pop("config"), options.pop("workdir"), **options)
        return 0


@dataclass(frozen=True)
class Evaluate:
    """Scores a trained run and writes metrics.json with its pictures.

    Exits with 1 if a score is outside of what the experiment expects.

    Attributes:
      workdir: of a trained run.
      num_samples: images per guidance scale; the configured number if not given.
    """

    config: Config
    workdir: Path
    num_samples: int | None = None

    def run(self) -> int:
        from diffusion_jax.commands.evaluate import evaluate, show

        config = self.config
        if self.num_samples is not None:
            evaluation = dataclasses.replace(config.evaluation, num_samples=self.num_samples)
            config = dataclasses.replace(config, evaluation=evaluation)
        return 0 if show(evaluate(config, self.workdir), config.expected) else 1


@dataclass(frozen=True)
class Demo:
    """The main job: trains on real digits, draws all ten classes, and scores them.

    Attributes:
      workdir: where everything goes.
    """

    config: Config
    workdir: Path = Path("runs/demo")

    def run(self) -> int:
        Train(self.config, self.workdir).run()
        status = Evaluate(self.config, self.workdir).run()
        print(f"checkpoint, pictures and metrics.json are in {self.workdir}")
        return status


@dataclass(frozen=True)
class Prove:
    """Trains a small system with its controls, and checks what must hold and what must fail.

    Exits with 1 if a claim does not hold.

    Attributes:
      name: ddpm, classifier_guidance or classifier_free.
      seed: of parameters, data order, noise and samples.
      workdir: keeps what was trained and measured; the same command goes on from there.
      results: Markdown file that gets a row.
    """

    name: tyro.conf.Positional[str]
    seed: int = 0
    workdir: Path = Path("runs/proofs")
    results: Path = Path("runs/proofs/RESULTS.md")

    def run(self) -> int:
        from diffusion_jax.commands.proof import prove

        holds = prove(self.name, workdir=self.workdir, seed=self.seed, results=self.results)
        return 0 if holds else 1


@dataclass(frozen=True)
class Ablate:
    """Runs a proof and its retrained controls with three seeds, one row of results an arm.

    Exits with 1 if a claim does not hold for every seed.

    Attributes:
      name: ddpm, classifier_guidance or classifier_free.
      seeds: of the runs.
      workdir: keeps what was trained and measured; the same command goes on from there.
      results: Markdown file that gets the rows.
    """

    name: tyro.conf.Positional[str]
    seeds: tuple[int, ...] = (0, 1, 2)
    workdir: Path = Path("runs/proofs")
    results: Path = Path("runs/proofs/RESULTS.md")

    def run(self) -> int:
        from diffusion_jax.commands.proof import ablate

        holds = ablate(self.name, workdir=self.workdir, results=self.results, seeds=self.seeds)
        return 0 if holds else 1


@dataclass(frozen=True)
class BenchSchedules:
    """Compares schedules, grids and samplers at equal numbers of network calls.

    Writes bench.csv, tables and figures; what is in bench.csv is not computed again.

    Attributes:
      out: folder for everything.
      schedules, grids, samplers, nfe: replace these axes of every study, the names as in
        SCHEDULES, TIMESTEPS and SAMPLERS, nfe the numbers of network calls.
      runs: working directories of trained runs to be compared in place of the exact denoiser,
        by Fréchet distance; their parameterizations and loss weights are their own.
      shown: lines of each printed table.
    """

    config: Annotated[Benchmark, tyro.conf.arg(name="")]
    out: Path = Path("runs/bench")
    schedules: tuple[str, ...] = ()
    grids: tuple[str, ...] = ()
    samplers: tuple[str, ...] = ()
    nfe: tuple[int, ...] = ()
    runs: Annotated[tuple[Path, ...], tyro.conf.arg(name="run")] = ()
    shown: int = 10

    def run(self) -> int:
        from diffusion_jax.commands.bench import bench
        from diffusion_jax.commands.bench_plan import narrowed

        axes = {name: getattr(self, name) for name in ("schedules", "grids", "samplers", "nfe")}
        bench(narrowed(self.config, **axes), self.out, self.runs, shown=self.shown)
        return 0


@dataclass(frozen=True)
class BenchOrder:
    """Measures the order of convergence of every sampler, in float64 on exact denoisers.

    Exits with 1 if one lies outside of its window.

    Attributes:
      rows: names of rows; all of the table if empty.
    """

    rows: tyro.conf.Positional[tuple[str, ...]] = ()

    def run(self) -> int:
        from diffusion_jax.commands.order import show

        return 0 if show(self.rows) else 1


@dataclass(frozen=True)
class Prepare:
    """Makes a data set ready for training.

    Attributes:
      name: digits, mnist or cifar10.
      source_dir: folder with the original files; downloaded if not given.
      data_dir: where prepared sets are kept; TFDS's default if not given.
    """

    name: tyro.conf.Positional[str]
    source_dir: Path | None = None
    data_dir: Path | None = None

    def run(self) -> int:
        from diffusion_jax.data.prepare import prepare

        print(prepare(self.name, self.source_dir, self.data_dir))
        return 0


@dataclass(frozen=True)
class Convert:
    """Writes pickled weights of torch (.bin, .pt, .pth, .ckpt) as safetensors; needs torch.

    The files are read as weights only; a file that holds anything that would run is refused.

    Attributes:
      paths: the files, the parts of one set of weights or their .bin.index.json; and last of all
        a .safetensors file, or a folder, where files get the names that other libraries expect.
      key: dictionary of tensors to take, in files that hold several: model_ema.
      max_shard_size: bytes in one file of a folder; as many files as were given if not given.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    key: str | None = None
    max_shard_size: int | None = None

    def run(self) -> int:
        from diffusion_jax.commands.convert import convert

        if len(self.paths) < 2:
            raise ValueError("expected: diffusion-jax convert FILE … OUT")
        *files, out = self.paths
        convert(files, out, key=self.key, max_shard_size=self.max_shard_size)
        return 0


COMMANDS: dict[str, type] = {"train": Train, "sample": Sample, "evaluate": Evaluate, "demo": Demo}
# Commands that take no experiment.
PLAIN_COMMANDS: dict[str, type] = {"proof": Prove, "ablate": Ablate, "convert": Convert}
# Options by which `sample` draws with a released pipeline instead of a trained run.
MODEL_OPTIONS = ("--model", "--from-image")


def exchange_parts(config: Any, arguments: Sequence[str]) -> tuple[Any, list[str]]:
    """Takes part options out of the arguments and exchanges the parts.

    `--system.sampler ddim` puts a default DDIM where the configuration has another sampler;
    options of the new part may follow. A part that may be switched off or on, as attention, also
    takes True and False, or no value for True, or `no-` before its name for False.

    Returns:
      the changed configuration and the arguments that are left.

    Raises:
      ValueError: if a table has no part of that name.
    """
    left, index = [], 0
    while index < len(arguments):
        path, separator, value = arguments[index].partition("=")
        names = path.removeprefix("--").replace("-", "_").split(".")
        switched = [*names[:-1], names[-1].removeprefix("no_")]
        if path.startswith("--") and _reaches_switch(config, switched):
            following = "".join(arguments[index + 1 : index + 2])
            if switched != names:
                value = "False"
            elif not separator and (not following or following.startswith("-")):
                value = "True"
            elif not separator:
                index, value = index + 1, following
            config = _replace_part(config, switched, value)
        elif path.startswith("--") and names[-1] in TABLES and _reaches_part(config, names):
            if not separator:
                index += 1
                if index == len(arguments):
                    raise ValueError(f"{path} needs one of {sorted(TABLES[names[-1]])}")
                value = arguments[index]
            config = _replace_part(config, names, value)
        else:
            left.append(arguments[index])
        index += 1
    return config, left


def _found(config: Any, names: list[str]) -> Any:
    """What lies there in a configuration; None if nothing does."""
    for name in names:
        if isinstance(config, tuple) and name.isdecimal() and int(name) < len(config):
            config = config[int(name)]
        else:
            config = getattr(config, name, None)
    return config


def _reaches_part(config: Any, names: list[str]) -> bool:
    return dataclasses.is_dataclass(_found(config, names))


def _reaches_switch(config: Any, names: list[str]) -> bool:
    if names[-1] not in SWITCHES:
        return False
    found = _found(config, names)
    return isinstance(found, bool) or dataclasses.is_dataclass(found)


def _replace_part(config: Any, names: list[str], kind: str) -> Any:
    name, *rest = names
    if isinstance(config, tuple):
        index = int(name)
        part = _replace_part(config[index], rest, kind)
        return (*config[:index], part, *config[index + 1 :])
    if not rest and name in SWITCHES and kind in ("True", "False"):
        return dataclasses.replace(config, **{name: kind == "True"})
    if rest:
        part = _replace_part(getattr(config, name), rest, kind)
        return dataclasses.replace(config, **{name: part})
    if kind not in TABLES[name]:
        raise ValueError(f"{name} must be one of {sorted(TABLES[name])}, got {kind!r}")
    part = TABLES[name][kind]
    # What has no default becomes a required option.
    needed = {
        field.name: tyro.MISSING
        for field in dataclasses.fields(part)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    return dataclasses.replace(config, **{name: part(**needed)})


def parse(arguments: Sequence[str]) -> Any:
    """The command that the arguments say, ready to run.

    Raises:
      ValueError: for an unknown command, experiment or part.
      SystemExit: from tyro, for --help, an unknown option or a value of the wrong type.
    """
    command, *rest = arguments
    if command == "data":
        if rest[:1] != ["prepare"]:
            raise ValueError("expected: diffusion-jax data prepare SET")
        return tyro.cli(Prepare, args=rest[1:], prog="diffusion-jax data prepare")
    if command == "bench":
        return _parse_bench(rest)
    if command == "sample" and any(a.split("=")[0] in MODEL_OPTIONS for a in rest):
        from diffusion_jax.commands.sample_model import SampleModel

        return tyro.cli(SampleModel, args=rest, prog="diffusion-jax sample")
    if command == "toy":
        from diffusion_jax.commands.toy import Toy

        return tyro.cli(Toy, args=rest, prog="diffusion-jax toy")
    if command == "finetune":
        from diffusion_jax.commands.finetune import FineTune

        return tyro.cli(FineTune, args=rest, prog="diffusion-jax finetune")
    if command in PLAIN_COMMANDS:
        return tyro.cli(PLAIN_COMMANDS[command], args=rest, prog=f"diffusion-jax {command}")
    if command not in COMMANDS:
        known = [*COMMANDS, *PLAIN_COMMANDS, "finetune", "toy", "bench", "data"]
        raise ValueError(f"unknown command {command!r}; there are {known}")
    defaults: dict[str, Any] = {}
    if command == "demo":
        name, config = "", find("classifier_free", tiny=True)
    else:
        if not rest or rest[0].startswith("-"):
            raise ValueError(f"diffusion-jax {command} needs an experiment: {list(EXPERIMENTS)}")
        name, *rest = rest
        tiny, rest = "--tiny" in rest, [argument for argument in rest if argument != "--tiny"]
        stage, rest = _taken(rest, "--stage")
        config = find(name, tiny=tiny, stage=stage)
        stages = find_stages(name, tiny=tiny)
        help_wanted = {"-h", "--help"} & set(rest)
        if command == "train" and stage is None and len(stages) > 1 and not help_wanted:
            return _train_stages(name, stages, rest)
        if run_configs(Path(name)):
            defaults["workdir"] = Path(name)
            missing = sorted(set(config.system.build().stages) - set(stages))
            if command == "train" and stage is None and missing:
                raise ValueError(
                    f"{name} has not begun the stages {missing}; repeat the command that began it, "
                    "diffusion-jax train EXPERIMENT --workdir DIR, or choose one with --stage"
                )
    config, rest = exchange_parts(config, rest)
    cls = COMMANDS[command]
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            defaults.setdefault(field.name, field.default)
    defaults.setdefault("workdir", tyro.MISSING)
    return tyro.cli(
        cls,
        args=rest,
        default=cls(config=config, **defaults),
        prog=f"diffusion-jax {command} {name}".rstrip(),
        config=(tyro.conf.AvoidSubcommands,),
    )


def _parse_bench(arguments: Sequence[str]) -> Any:
    what, *rest = arguments or [""]
    if what == "order":
        return tyro.cli(BenchOrder, args=rest, prog="diffusion-jax bench order")
    if what != "schedules":
        raise ValueError("expected: diffusion-jax bench schedules, or diffusion-jax bench order")
    tiny, rest = "--tiny" in rest, [argument for argument in rest if argument != "--tiny"]
    name, rest = (rest[0], rest[1:]) if rest and rest[0].endswith(".py") else (None, rest)
    default = BenchSchedules(find_benchmark(name, tiny=tiny))
    return tyro.cli(
        BenchSchedules,
        args=rest,
        default=default,
        prog="diffusion-jax bench schedules",
        config=(tyro.conf.AvoidSubcommands,),
    )


def _taken(arguments: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """The value of an option, if it is there, and the arguments without it."""
    left, value = list(arguments), None
    for index, argument in enumerate(arguments):
        if argument.partition("=")[0] == option:
            given = argument.partition("=")[2] or "".join(arguments[index + 1 : index + 2])
            if not given or given.startswith("-"):
                raise ValueError(f"{option} needs a value")
            value = given
            del left[index : index + (1 if "=" in argument else 2)]
            break
    return value, left


def _train_stages(name: str, stages: Mapping[str, Experiment], arguments: list[str]) -> TrainStages:
    workdir, left = _taken(arguments, "--workdir")
    if left:
        raise ValueError(
            f"{left[0]} is an option of one stage, and {name} trains {list(stages)}; choose one "
            "with --stage"
        )
    if workdir is None and not run_configs(Path(name)):
        raise ValueError("--workdir is needed: where configuration, checkpoints and logs go")
    return TrainStages(tuple(stages.values()), Path(workdir or name))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status: 0 done, 1 an expected score missed, 2 an error."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    trim_after_compiling()
    try:
        command = parse(arguments)
        return command.run()
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"error: a device has too little memory ({str(error).splitlines()[0]}); lower the "
            "batch size, the number or the size of the images, or choose --dtype bfloat16 or "
            "--offload where the command has them",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as interrupt:
        print(
            f"\n{str(interrupt) or 'interrupted'}; the same command goes on from here",
            file=sys.stderr,
        )
        return 130


def experiment_main(name: str) -> int:
    """`python -m experiments.NAME COMMAND …`: the command line of one experiment."""
    command, *rest = sys.argv[1:] or ["--help"]
    return main([command] if command in ("-h", "--help") else [command, name, *rest])


if __name__ == "__main__":
    sys.exit(main())

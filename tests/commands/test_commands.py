"""Train, go on, sample and evaluate: the commands on real digits with a tiny network."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import cli
from diffusion_jax.commands import evaluate as evaluate_command
from diffusion_jax.commands import figures, run
from diffusion_jax.commands import train as train_command
from diffusion_jax.commands.run import check_same_model, restore_stage
from diffusion_jax.commands.scores import check_expected, summary, table
from diffusion_jax.core.timesteps import Steps
from diffusion_jax.data import Digits, ShapesData
from diffusion_jax.data.sources import Arrays
from diffusion_jax.experiment import Evaluation, Training, find, find_stages, save
from diffusion_jax.io.checkpoint_errors import CheckpointError
from diffusion_jax.io.files import write_text
from diffusion_jax.io.loggers import JSONLLogger, StdoutLogger, Tolerant
from diffusion_jax.losses import Hybrid
from diffusion_jax.metrics import GaussianStats, Pixels, save_reference
from diffusion_jax.models import MLPClassifierConfig, MLPConfig
from diffusion_jax.samplers import DDPM
from diffusion_jax.training import processes
from diffusion_jax.training.guard import Guard

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    tiny = find("classifier_free", tiny=True)
    return replace(
        tiny,
        system=replace(
            tiny.system, network=MLPConfig(width=16, depth=1), steps=Steps(num_steps=2, max_steps=4)
        ),
        data=Digits(data_dir=str(tmp_path_factory.mktemp("data"))),
        training=Training(num_steps=4, batch_size=8, log_every=2, eval_every=4, checkpoint_every=4),
        evaluation=Evaluation(num_samples=200, scales=(1.0, 3.0), batch_size=100),
        expected={"min_nearest_ratio": (0.0, 0.01)},
    )


@pytest.fixture(scope="module")
def workdir(experiment, tmp_path_factory):
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("run")
    train_command.train(experiment, folder)
    return folder


def longer(experiment, num_steps):
    return replace(experiment, training=replace(experiment.training, num_steps=num_steps))


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def test_a_run_leaves_configuration_checkpoint_log_and_sample_grid(experiment, workdir):
    assert find(str(workdir)) == experiment
    assert restore_stage(workdir)[0] == 4
    assert [step for step, _ in rows_of(workdir)] == [2, 4]
    picture = Image.open(workdir / "metrics.images" / "samples_00000004.png")
    assert picture.size == (10 * 8, 4 * 8)


def test_a_run_in_two_parts_equals_one_in_one(experiment, tmp_path):
    train_command.train(longer(experiment, 2), tmp_path / "parts")
    parts = train_command.train(experiment, tmp_path / "parts")
    whole = train_command.train(experiment, tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")


def test_a_run_may_be_spread_guarded_and_read_otherwise_in_its_second_part(experiment, tmp_path):
    """On two devices, with fsdp, a guard that finds nothing, a worker, and a trace."""
    train_command.train(longer(experiment, 2), tmp_path / "parts")
    changed = replace(
        experiment.training,
        fsdp=2,
        guard=Guard(max_skipped=2, spike=1e6),
        on_bad_example="skip",
        num_workers=1,
    )
    parts = train_command.train(
        replace(experiment, training=changed), tmp_path / "parts", trace=True
    )
    whole = train_command.train(experiment, tmp_path / "whole")
    for a, b in zip(*(jax.tree.leaves(state.trainable) for state in (parts, whole)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    losses = [[loss for _, loss in rows_of(tmp_path / name)] for name in ("parts", "whole")]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_process_0_alone_has_loggers_and_none_of_them_can_stop_a_run(tmp_path, monkeypatch):
    options = {"tensorboard": False, "wandb": None, "values": {}}
    with pytest.raises(KeyError), run.open_loggers(tmp_path, **options) as loggers:
        assert [type(logger.logger) for logger in loggers] == [StdoutLogger, JSONLLogger]
        assert all(type(logger) is Tolerant for logger in loggers)
        raise KeyError
    monkeypatch.setattr(processes, "is_writer", lambda: False)
    with run.open_loggers(tmp_path / "other", **options) as loggers:
        assert loggers == [] and not (tmp_path / "other").exists()


def test_a_logger_that_cannot_be_opened_is_left_out(tmp_path, monkeypatch):
    def refused(**options):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refused, Image=None))
    with pytest.warns(UserWarning, match="left out, ConnectionError: no network"):
        with run.open_loggers(tmp_path, tensorboard=False, wandb="mine", values={}) as loggers:
            assert len(loggers) == 2


def test_a_second_run_touches_nothing_of_the_first(experiment, tmp_path):
    train_command.train(longer(experiment, 2), tmp_path)
    before = (tmp_path / "config.json").read_text()
    with run.checkpoints(tmp_path) as first:
        first.claim()
        with pytest.raises(CheckpointError, match="another run writes"):
            train_command.train(experiment, tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_addresses_are_no_working_directories(experiment):
    with pytest.raises(ValueError, match="must be a local or mounted folder, got gs:/bucket/run"):
        train_command.train(experiment, Path("gs://bucket/run"))


def test_weights_and_biases_get_the_configuration(tmp_path, monkeypatch):
    seen = {}
    started = SimpleNamespace(define_metric=lambda *a, **k: None, finish=lambda: None)
    wandb = SimpleNamespace(init=lambda **k: seen.update(k) or started, Image=None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with run.open_loggers(tmp_path, tensorboard=False, wandb="mine", values={"a": 1}) as loggers:
        assert len(loggers) == 3
    assert (seen["project"], seen["config"], seen["dir"]) == ("mine", {"a": 1}, str(tmp_path))


def test_a_directory_belongs_to_one_experiment(experiment, workdir):
    other = replace(experiment, training=replace(experiment.training, batch_size=16))
    with pytest.raises(ValueError, match=r"other values of training\.batch_size"):
        train_command.train(other, workdir)


def read(folder):
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("0*.png"))])


def test_sampling_writes_images_that_do_not_depend_on_the_batch(workdir, tmp_path):
    call = ["sample", str(workdir), "--labels", "3", "5", "--num-images", "6", "--scale", "2"]
    assert cli.main([*call, "--out", str(tmp_path / "a")]) == 0
    assert cli.main([*call, "--out", str(tmp_path / "b"), "--batch-size", "2"]) == 0
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert a.shape == (6, 8, 8)
    # Images are equal to 1e-5, so rounding to bytes may differ by one level.
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
    settings = json.loads(Image.open(tmp_path / "a" / "00001.png").text["diffusion_jax"])
    assert settings["label"] == 5 and settings["index"] == 1 and settings["scale"] == 2.0
    assert Image.open(tmp_path / "a" / "grid.png").size == (48, 8)


def test_evaluation_scores_draws_and_is_not_repeated(workdir, capsys):
    assert cli.main(["evaluate", str(workdir)]) == 1  # the expectation cannot be met
    shown = capsys.readouterr().out
    assert "held-out" in shown and "scale 3" in shown and "NOT MET" in shown
    report = json.loads((workdir / "metrics.json").read_text())
    assert report["rows"]["held-out"]["accuracy"] >= 0.99
    assert report["rows"]["shuffled labels"]["accuracy"] <= 0.2
    for name in ("samples", "guidance", "loss"):
        assert Image.open(workdir / f"{name}.png").size[0] > 300
    assert report["frechet"] == "Fréchet distance over pixels"
    assert not (workdir / "evaluation").exists()
    before = (workdir / "metrics.json").stat().st_mtime_ns
    assert cli.main(["evaluate", str(workdir)]) == 1
    assert (workdir / "metrics.json").stat().st_mtime_ns == before


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(workdir, tmp_path, monkeypatch):
    """Stopped after its second batch of five; what was drawn is not drawn again."""
    shutil.copytree(workdir, tmp_path / "run")
    run = tmp_path / "run"
    (run / "metrics.json").unlink(missing_ok=True)
    call = ["evaluate", str(run), "--num-samples", "150", "--evaluation.batch-size", "30"]
    assert cli.main(call) == 1
    whole = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").unlink()

    written, original = [], evaluate_command.write_arrays

    def stop_after_two(path, arrays):
        original(path, arrays)
        written.append(int(arrays["count"]))
        if len(written) == 2:
            raise KeyboardInterrupt("stopped")

    monkeypatch.setattr(evaluate_command, "write_arrays", stop_after_two)
    monkeypatch.setattr(evaluate_command, "SAVE_EVERY_SECONDS", 0.0)
    assert cli.main(call) == 130
    assert cli.main(call) == 1
    assert written == [30, 60, 90, 120, 150] + [30, 60, 90, 120, 150]
    parts = json.loads((run / "metrics.json").read_text())
    assert parts["rows"] == whole["rows"]
    assert parts["rows"]["scale 1"]["num_samples"] == 150


def test_a_partial_evaluation_with_other_settings_is_thrown_away(tmp_path):
    folder = evaluate_command._partial_folder(tmp_path, {"seed": 1})
    (folder / "scale_1.npz").write_text("old")
    assert (evaluate_command._partial_folder(tmp_path, {"seed": 1}) / "scale_1.npz").exists()
    assert not (evaluate_command._partial_folder(tmp_path, {"seed": 2}) / "scale_1.npz").exists()


def test_a_reference_file_gives_one_more_distance(workdir, tmp_path, capsys):
    stats = GaussianStats.of(np.random.default_rng(0).standard_normal((70, 64)))
    pixels = Pixels().feature
    path = tmp_path / "reference.npz"
    save_reference(path, stats, feature=pixels, image_size=(8, 8), source="noise")
    shutil.copytree(workdir, tmp_path / "run")
    call = ["evaluate", str(tmp_path / "run"), "--num-samples", "100"]
    assert cli.main([*call, "--evaluation.reference", str(path)]) == 1
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
    assert rows["scale 1"]["frechet_reference"] > 1.0
    capsys.readouterr()
    save_reference(path, stats, feature=pixels, image_size=(4, 16), source="noise")
    assert cli.main([*call, "--evaluation.reference", str(path), "--evaluation.seed", "5"]) == 2
    assert "do not compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num-images", "0"], "num_images must be at least 1"),
        (["--labels", "10"], "0 … 9"),
        (["--num-steps", "0"], "num_steps must be at least 1"),
        (["--num-steps", "5"], "num_steps = 5 exceeds max_steps = 4"),
        (["--scale", "nan"], "finite"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--workdir", "nowhere"], "nowhere holds no run"),
    ],
)
def test_wrong_calls_of_sample_are_refused_before_compiling(
    workdir, capsys, monkeypatch, arguments, message
):
    monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("compiled"))
    assert cli.main(["sample", str(workdir), *arguments]) == 2
    assert message in capsys.readouterr().err


def source_of(image, label=0):
    return Arrays({"image": np.asarray(image)[None], "label": np.asarray([label])})


class Fixed:
    """A data configuration around a source."""

    num_classes = 10

    def __init__(self, source):
        self._source = source

    def source(self):
        return self._source


GOOD = np.zeros((8, 8, 1), np.float32)


@pytest.mark.parametrize(
    "source, changes, message",
    [
        (source_of(np.zeros((8, 8), np.float32)), {}, "shape"),
        (source_of(np.zeros((8, 8, 1), np.uint8)), {}, "uint8"),
        (source_of(255 * np.ones((8, 8, 1), np.float32)), {}, r"\[-1, 1\]"),
        (source_of(np.zeros((16, 16, 1), np.float32)), {}, "the data's images are"),
        (source_of(GOOD, 11), {}, "0 … 9"),
        (Arrays({"image": GOOD[None]}), {}, "needs labels"),
        (Arrays({"image": GOOD[None][:0]}), {}, "no examples"),
        (source_of(GOOD), {"batch_size": 7}, "does not split over 2 devices"),
        (source_of(GOOD), {"stage": "prior"}, "stage must be one of"),
        (source_of(GOOD), {"batch_size": 2}, "fewer than one batch"),
        (source_of(GOOD), {"num_steps": 1201}, "learning rate is 0 after"),
        (
            Arrays({"image": GOOD[None].repeat(8, 0), "label": np.zeros(8, np.int32)}),
            {"batch_size": 2, "trainable": ("encoder/**",)},
            "'encoder/\\*\\*' matches no parameter",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_compiling(
    experiment, tmp_path, monkeypatch, source, changes, message
):
    wrong = replace(
        experiment, data=Fixed(source), training=replace(experiment.training, **changes)
    )
    monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("compiled"))
    with pytest.raises(ValueError, match=message):
        train_command.train(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_network_than_the_trained_one_is_refused(workdir, capsys):
    for call in (["sample"], ["evaluate"]):
        for wrong, message in (
            (["classifier_free"], "image_size, channels, network, schedule"),
            (["ddpm"], "trained as ClassifierFreeSystem"),
            ([str(workdir), "--system.schedule", "linear"], "other values of schedule"),
        ):
            assert cli.main([*call, *wrong, "--workdir", str(workdir)]) == 2
            assert message in capsys.readouterr().err


def test_a_network_of_the_wrong_size_is_refused_before_anything_is_written(experiment, tmp_path):
    network = replace(experiment.system.network, out_channels=2)
    wrong = replace(experiment, system=replace(experiment.system, network=network))
    with pytest.raises(ValueError, match=r"returned \(8, 8, 8, 2\)"):
        train_command.train(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_sheet_leaves_cells_empty_where_a_class_has_too_few_images(tmp_path):
    few = {"image": np.zeros((3, 8, 8, 1), np.float32), "label": np.asarray([0, 1, 1])}
    figures.class_sheet(tmp_path / "sheet.png", few, few, title="few")
    assert Image.open(tmp_path / "sheet.png").size[0] > 300


def test_a_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"


def test_the_number_of_classes_must_agree(experiment, tmp_path):
    wrong = replace(experiment, system=replace(experiment.system, num_classes=12))
    with pytest.raises(ValueError, match="the data has 10 classes, the system 12"):
        train_command.train(wrong, tmp_path / "run")


def test_data_without_a_held_out_split_cannot_be_compared(experiment):
    with pytest.raises(ValueError, match="no held-out split"):
        evaluate_command.real_data(replace(experiment, data=Fixed(source_of(GOOD))))
    shapes = replace(experiment, data=ShapesData(image_size=8, num_examples=5))
    with pytest.raises(ValueError, match=r"expected images \(8, 8, 1\), got \(8, 8, 3\)"):
        evaluate_command.real_data(shapes)
    reference = evaluate_command.real_data(
        replace(shapes, system=replace(experiment.system, channels=3))
    )
    assert reference.oracle is None and reference.test.count == 5


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    """A run of classifier guidance: four steps of the base, four of the classifier."""
    folder, data = tmp_path_factory.mktemp("stages"), tmp_path_factory.mktemp("data")
    training = Training(num_steps=4, batch_size=8, log_every=2, checkpoint_every=4)
    for stage, tiny in find_stages("classifier_guidance", tiny=True).items():
        system = replace(
            tiny.system,
            network=MLPConfig(width=16, depth=1),
            classifier=MLPClassifierConfig(width=16, depth=1),
            steps=Steps(num_steps=2, max_steps=4),
        )
        small = replace(
            tiny,
            system=system,
            data=Digits(data_dir=str(data)),
            training=replace(training, stage=stage),
            evaluation=Evaluation(num_samples=100, scales=(0.0, 3.0), batch_size=100),
            expected={},
        )
        train_command.train(small, folder)
    return folder


def test_every_stage_of_a_run_has_a_folder_of_its_own(two_stages):
    assert list(find_stages(str(two_stages))) == ["base", "classifier"]
    for stage in ("base", "classifier"):
        assert restore_stage(two_stages / stage)[0] == 4
    rows = (two_stages / "classifier" / "metrics.jsonl").read_text().splitlines()
    assert "accuracy" in json.loads(rows[-1])
    # Under the same command it is finished, so nothing is trained again.
    assert cli.main(["train", str(two_stages)]) == 0


def test_all_stages_sample_and_are_evaluated_together(two_stages, tmp_path):
    call = ["sample", str(two_stages), "--num-images", "4", "--out", str(tmp_path)]
    assert cli.main([*call, "--scale", "2"]) == 0
    guided = read(tmp_path)
    assert cli.main([*call, "--scale", "0"]) == 0
    assert guided.shape == (4, 8, 8) and (guided != read(tmp_path)).any()
    assert cli.main(["evaluate", str(two_stages)]) == 0
    rows = json.loads((two_stages / "metrics.json").read_text())["rows"]
    assert {"scale 0", "scale 3"} <= set(rows) and "accuracy" in rows["scale 3"]


def test_a_folder_of_runs_is_no_run_of_several_stages(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "base")
    with pytest.raises(ValueError, match="no experiment"):
        find_stages(str(tmp_path))


def test_a_run_that_was_left_before_its_second_stage_says_so(two_stages, tmp_path, capsys):
    shutil.copytree(two_stages / "base", tmp_path / "run" / "base")
    assert cli.main(["train", str(tmp_path / "run")]) == 2
    assert "not begun the stages ['classifier']" in capsys.readouterr().err


def test_variance_channels_keep_their_meaning(tmp_path):
    tiny = find("improved_ddpm", tiny=True)
    save(tiny, tmp_path / "config.json")
    system = replace(tiny.system, loss=Hybrid("learned"), sampler=DDPM("learned"))
    with pytest.raises(ValueError, match="what the variance channels mean"):
        check_same_model(replace(tiny, system=system), tmp_path)


def test_options_of_a_stage_need_its_name(two_stages, capsys):
    assert cli.main(["train", str(two_stages), "--training.num-steps", "5"]) == 2
    assert "choose one with --stage" in capsys.readouterr().err
    assert cli.main(["train", str(two_stages), "--stage", "upsampler"]) == 2
    assert "no stage 'upsampler'" in capsys.readouterr().err


def test_a_run_that_lacks_a_stage_is_not_sampled(two_stages, tmp_path, capsys):
    shutil.copytree(two_stages / "base", tmp_path / "run" / "base")
    assert cli.main(["sample", str(tmp_path / "run"), "--num-images", "1"]) == 2
    assert "classifier" in capsys.readouterr().err


def test_summary_finds_the_best_scale_and_the_fall_of_recall():
    def row(train, test, recall):
        return {
            "frechet_train": train,
            "frechet_test": test,
            "recall": recall,
            "nearest_ratio": 1.0,
        }

    scores = summary(
        {
            "held-out": {"frechet_train": 2.0},
            "scale 1": row(1.0, 4.0, 0.9),
            "scale 2": row(3.0, 3.0, 0.7),
            "scale 3": row(5.0, 6.0, 0.4),
        }
    )
    assert (scores["best_scale_train"], scores["best_scale_test"]) == (1.0, 2.0)
    assert scores["best_frechet_train_ratio"] == 0.5
    assert scores["best_frechet_test_ratio"] == 1.5
    assert scores["recall_drop"] == pytest.approx(0.5)
    assert scores["scale 2/recall"] == 0.7


def test_expectations_are_checked_and_must_have_been_measured():
    rows = check_expected({"a": 0.5, "b": 2.0}, {"a": (0.0, 1.0), "b": (0.0, 1.0)})
    assert [row[-1] for row in rows] == [True, False]
    with pytest.raises(ValueError, match=r"\['c'\] were not measured"):
        check_expected({"a": 0.5}, {"c": (0.0, 1.0)})


def test_a_table_has_a_line_a_row_and_leaves_gaps():
    lines = table({"a": {"x": 1.0, "num_samples": 30.0}, "bb": {"x": 0.25}}).splitlines()
    assert lines[0].split() == ["x", "num_samples"]
    assert lines[1].split() == ["a", "1.000", "30"] and lines[2].split() == ["bb", "0.250"]

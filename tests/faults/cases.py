"""What can happen to a run, and what must come of it."""

import functools
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion_jax.io.checkpoint import Checkpoints
from tests.faults.damage import DAMAGES, flipped
from tests.faults.lab import ROOT, SAVES, STEPS, End, Lab, curve, rows


@dataclass(frozen=True)
class Fault:
    """A row of the table in docs/faults.md, and the function that tries it.

    Attributes:
      name: what happens.
      tried: how it is made to happen.
      sees: what the user sees.
      lost: what is lost.
      run: tries it in a lab; an AssertionError says what did not hold.
      quick: whether it belongs to the short form, too.
    """

    name: str
    tried: str
    sees: str
    lost: str
    run: Callable[[Lab], None]
    quick: bool = False


FAULTS: list[Fault] = []


def fault(name: str, *, tried: str, sees: str, lost: str, quick: bool = False) -> Callable:
    """Enters a function into FAULTS."""

    def enter(run: Callable[[Lab], None]) -> Callable[[Lab], None]:
        FAULTS.append(Fault(name, tried, sees, lost, run, quick))
        return run

    return enter


def _folder(lab: Lab, name: str) -> Path:
    folder = lab.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _killed_in_save(lab: Lab, milliseconds: int) -> None:
    workdir = _folder(lab, f"save-{milliseconds}")
    kill = {"kill_in_save": [16, milliseconds / 1000]}
    lab.run(workdir, fault=kill, expect=-signal.SIGKILL)
    complete = lab.steps(workdir)
    assert complete[0] == 8 and complete == SAVES[: len(complete)], complete
    end = lab.run(workdir)
    assert f"going on from the checkpoint of step {complete[-1]}" in end.text
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    lab.check_same(workdir)


for _milliseconds in (0, 50, 300):
    fault(
        f"kill -9, {_milliseconds} ms after a save began",
        tried="SIGKILL from a thread of the process",
        sees="the next start deletes what is half written, says so, and goes on",
        lost="the updates since the last complete checkpoint are made again",
        quick=_milliseconds == 50,
    )(functools.partial(_killed_in_save, milliseconds=_milliseconds))


@fault(
    "kill -9 three times at random moments",
    tried="SIGKILL 0 to 1.5 s after the first update, three times",
    sees="each start goes on from the newest complete checkpoint",
    lost="the updates since the last complete checkpoint are made again",
)
def _killed_often(lab: Lab) -> None:
    workdir, moments = _folder(lab, "often"), np.random.default_rng(7).uniform(0.0, 1.5, size=3)
    for seconds in moments:
        lab.wait(lab.start(workdir, fault={"kill_after": float(seconds)}))
    lab.run(workdir)
    lab.check_same(workdir)


@fault(
    "the disk fills up during a save",
    tried="a tmpfs that a file fills after the free space was looked at; where nothing may be "
    "mounted, the write ends with ENOSPC",
    sees="`the checkpoint of step 16 was not written; the newest is of step 8`, the bytes that "
    "are free, exit code 2",
    lost="nothing that was complete; with room again the same command goes on",
)
def _full(lab: Lab) -> None:
    workdir = _folder(lab, "full")
    end = (
        _filled_up(lab, workdir)
        if _may_mount()
        else lab.wait(lab.start(workdir, fault={"no_space": 16}))
    )
    assert end.code == 2 and "step 16 was not written; the newest is of step 8" in end.text, end
    assert "No space left" in end.text and "bytes are free" in end.text, end.text
    assert lab.steps(workdir) == (8,)
    assert "going on from the checkpoint of step 8" in lab.run(workdir).text
    lab.check_same(workdir)


def _may_mount() -> bool:
    command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def _filled_up(lab: Lab, workdir: Path) -> End:
    """The end of a run whose checkpoints are on a file system that fills up."""
    room, script = workdir / "checkpoints", lab.folder / "full.sh"
    room.mkdir(parents=True)
    # The file system ends with the shell, so that what is on it is copied.
    script.write_text(
        'mount -t tmpfs -o size=3m none "$1" || exit 99\n'
        "shift\n"
        '"$@"; code=$?\n'
        'rm "$ROOM/filler"; cp -r "$ROOM" "$ROOM.kept"\n'
        "exit $code\n"
    )
    within, variables = ("unshare", "-m", "sh", str(script), str(room)), {"ROOM": str(room)}
    end = lab.wait(
        lab.start(workdir, fault={"full_disk": 16}, within=within, environment=variables)
    )
    room.rmdir()
    Path(f"{room}.kept").rename(room)
    return end


@fault(
    "too little room for a checkpoint",
    tried="the free space is reported as 1 MB",
    sees="before anything is written, how many bytes it takes and how many are free; exit code 2",
    lost="nothing that was complete",
    quick=True,
)
def _no_room(lab: Lab) -> None:
    workdir = _folder(lab, "no-room")
    end = lab.run(workdir, fault={"small_disk": 16}, expect=2)
    assert "the newest is of step 8: it takes" in end.text and "are free in" in end.text
    lab.run(workdir)
    lab.check_same(workdir)


def _damaged(lab: Lab, how: str) -> None:
    whole, copies = lab.undisturbed / "checkpoints", _folder(lab, f"file {how}")
    # Orbax writes much about what it cannot read, some of it past Python.
    command = [sys.executable, "-m", "tests.faults.damage", str(whole), str(copies), how]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]


for _how in DAMAGES:
    fault(
        f"a file of a checkpoint {_how}",
        tried="every file of the newest checkpoint, one at a time",
        sees="a warning that names step, file or leaf, and the newest good checkpoint; an error if "
        "that step was asked for",
        lost="the updates since the checkpoint before, if the file mattered",
    )(functools.partial(_damaged, how=_how))


@fault(
    "a run whose newest checkpoint is damaged",
    tried="one bit flipped in its largest file, then the same command",
    sees="a warning, the checkpoint renamed to 16.corrupted, and training from the one before",
    lost="the updates since the checkpoint before are made again",
    quick=True,
)
def _damaged_run(lab: Lab) -> None:
    workdir = _folder(lab, "damaged-run")
    _damage_newest(lab, workdir)
    end = lab.run(workdir)
    assert "going on from the checkpoint of step 8" in end.text, end.text
    assert "step 16" in end.text and "passed over" in end.text, end.text
    assert (workdir / "checkpoints" / "16.corrupted").is_dir()
    lab.check_same(workdir)


@fault(
    "two processes whose newest checkpoint is damaged",
    tried="one bit flipped in its largest file, then the same commands",
    sees="the warning in both, and training from the checkpoint before",
    lost="the updates since the checkpoint before are made again",
)
def _damaged_two(lab: Lab) -> None:
    workdir = _folder(lab, "damaged-two")
    _damage_newest(lab, workdir)
    ends = lab.wait_two(lab.start_two(workdir))
    assert [end.code for end in ends] == [0, 0], ends
    assert "going on from the checkpoint of step 8" in ends[0].text, ends[0].text
    assert all("step 16" in end.text and "passed over" in end.text for end in ends), ends
    lab.check_close(workdir)


def _damage_newest(lab: Lab, workdir: Path) -> None:
    """The undisturbed run as it was after step 16, with a bit flipped in what it saved then."""
    shutil.copytree(lab.undisturbed, workdir)
    shutil.rmtree(workdir / "checkpoints" / "24")
    files = (path for path in (workdir / "checkpoints" / "16").rglob("*") if path.is_file())
    harmed = max(files, key=lambda path: path.stat().st_size)
    harmed.write_bytes(flipped(harmed.read_bytes()))


@fault(
    "SIGTERM",
    tried="during update 12 of 24",
    sees="the update is finished and saved, exit code 143; the same command goes on",
    lost="nothing",
    quick=True,
)
def _terminated(lab: Lab) -> None:
    workdir = _folder(lab, "terminated")
    lab.run(workdir, fault={"signals": [12, 1]}, expect=143)
    assert lab.steps(workdir) == (8, 12)
    lab.run(workdir)
    lab.check_same(workdir)


@fault(
    "SIGTERM twice",
    tried="both during update 12 of 24",
    sees="the process ends at once, by the signal",
    lost="the updates since the last checkpoint are made again",
)
def _terminated_twice(lab: Lab) -> None:
    workdir = _folder(lab, "twice")
    lab.run(workdir, fault={"signals": [12, 2]}, expect=-signal.SIGTERM)
    # That of step 8 may have been under way.
    assert lab.steps(workdir) in ((), (8,))
    lab.run(workdir)
    lab.check_same(workdir)


@fault(
    "a batch of NaN",
    tried="the images of update 20 are NaN",
    sees="`update 20 is bad: loss=nan, grad_norm=nan`, the last checkpoint's step, exit code 2",
    lost="the updates since the last checkpoint are made again",
    quick=True,
)
def _nan(lab: Lab) -> None:
    workdir = _folder(lab, "nan")
    end = lab.run(workdir, fault={"nan_at": [20, 1]}, expect=2)
    assert "update 20 is bad: loss=nan, grad_norm=nan" in end.text, end.text
    assert "the last checkpoint is of step 16" in end.text and lab.steps(workdir) == (8, 16)
    lab.run(workdir)
    lab.check_same(workdir)


@fault(
    "batches of NaN where two may be skipped",
    tried="the images of updates 12 and 13, then those of 20 to 22, with guard.max-skipped 2",
    sees="`skipped 1` in the log; at the third in a row the error above",
    lost="what the bad updates would have taught; none is ever applied",
)
def _skipped(lab: Lab) -> None:
    workdir, guard = _folder(lab, "skipped"), ("--training.guard.max-skipped", "2")
    lab.run(workdir, *guard, fault={"nan_at": [12, 2]})
    found = {row["step"]: row for row in rows(workdir)}
    assert [step for step, row in found.items() if row.get("skipped")] == [12, 13]
    assert np.isfinite([row["loss"] for row in found.values() if "loss" in row]).all()
    workdir = _folder(lab, "skipped-too-many")
    end = lab.run(workdir, *guard, fault={"nan_at": [20, 3]}, expect=2)
    assert "update 22 is bad" in end.text and "not applied, as the 2 before it" in end.text
    lab.run(workdir, *guard)
    lab.check_close(workdir, rtol=1e-6)


@fault(
    "the log cannot be written",
    tried="every row from update 10 on raises ENOSPC",
    sees="one warning of every kind, and at the end how many rows are missing",
    lost="the rows of the log",
)
def _no_log(lab: Lab) -> None:
    workdir = _folder(lab, "no-log")
    end = lab.run(workdir, fault={"log_fails": 10})
    assert end.text.count("scalars failed: OSError: [Errno 28] No space left") == 1, end.text
    assert "15 calls of JSONLLogger failed in this run" in end.text, end.text
    assert lab.digest(workdir) == lab.digest(lab.undisturbed)


@fault(
    "two runs in one directory",
    tried="a second process with the same working directory",
    sees="`another run writes checkpoints into …`, exit code 2; the first goes on",
    lost="nothing",
)
def _twice(lab: Lab) -> None:
    workdir = _folder(lab, "two-runs")
    with Checkpoints(workdir / "checkpoints") as first:
        first.claim()
        end = lab.run(workdir, expect=2)
    assert "another run writes checkpoints into" in end.text, end.text
    lab.run(workdir)
    lab.check_same(workdir)


@fault(
    "SIGTERM to one of two processes",
    tried="two processes with two devices each; the second gets it during update 12",
    sees="both finish the same update, save and exit with 143; the same commands go on",
    lost="nothing",
    quick=True,
)
def _terminated_two(lab: Lab) -> None:
    workdir = _folder(lab, "terminated-two")
    ends = lab.wait_two(lab.start_two(workdir, fault={"signals": [12, 1]}))
    assert [end.code for end in ends] == [143, 143], ends
    saved = lab.steps(workdir)
    assert saved[0] == 8 and 12 <= saved[1] < STEPS, saved
    ends = lab.wait_two(lab.start_two(workdir))
    assert [end.code for end in ends] == [0, 0], ends
    assert f"going on from the checkpoint of step {saved[1]}" in ends[0].text
    lab.check_close(workdir)


@fault(
    "SIGTERM to one of two processes that just went on",
    tried="during the first update after a checkpoint of step 16",
    sees="both save and exit with 143",
    lost="nothing",
)
def _terminated_early(lab: Lab) -> None:
    workdir = _folder(lab, "terminated-early")
    shutil.copytree(lab.undisturbed, workdir)
    shutil.rmtree(workdir / "checkpoints" / "24")
    ends = lab.wait_two(lab.start_two(workdir, fault={"signals": [17, 1]}))
    assert [end.code for end in ends] == [143, 143], ends
    assert 17 <= lab.steps(workdir)[-1] <= STEPS, lab.steps(workdir)
    lab.run(workdir)
    lab.check_close(workdir)


@fault(
    "Ctrl-C in both of two processes",
    tried="both get SIGINT during update 12, as in a terminal",
    sees="both finish the same update, save and exit with 130",
    lost="nothing",
)
def _interrupted_both(lab: Lab) -> None:
    workdir = _folder(lab, "interrupted-both")
    ends = lab.wait_two(lab.start_two(workdir, fault={"ctrl_c": 12}, of=(0, 1)))
    assert [end.code for end in ends] == [130, 130], ends
    saved = lab.steps(workdir)
    assert saved[0] == 8 and 12 <= saved[1] < STEPS, saved
    assert f"interrupted after step {saved[1]}; the same command goes on" in ends[0].text
    lab.run(workdir)
    lab.check_close(workdir)


@fault(
    "a process of two dies",
    tried="SIGKILL to the second of two processes during a run, heartbeat 10 s",
    sees="the other ends with an error of jax; whoever started both starts them again",
    lost="the updates since the last complete checkpoint are made again",
)
def _dying_peer(lab: Lab) -> None:
    workdir = _folder(lab, "dying")
    processes = lab.start_two(workdir, fault={"kill_in_save": [16, 0.0]})
    ends = lab.wait_two(processes)
    assert ends[1].code == -signal.SIGKILL and ends[0].code not in (0, 2), ends
    ends = lab.wait_two(lab.start_two(workdir))
    assert [end.code for end in ends] == [0, 0], ends
    lab.check_close(workdir)


@fault(
    "processes that disagree",
    tried="two processes with the learning rates 4e-3 and 2e-3",
    sees="both name the option, its values and who has which; exit code 2",
    lost="nothing, for nothing began",
)
def _disagreeing(lab: Lab) -> None:
    workdir = _folder(lab, "disagreeing")
    options = [("--optimizer.learning-rate", rate) for rate in ("4e-3", "2e-3")]
    ends = lab.wait_two(lab.start_two(workdir, *options))
    assert [end.code for end in ends] == [2, 2], ends
    for end in ends:
        assert "processes of this job disagree" in end.text, end.text
        assert "optimizer.learning_rate: 0.004 in [0], 0.002 in [1]" in end.text, end.text
    lab.run(workdir)
    lab.check_same(workdir)


@fault(
    "other numbers of processes and devices",
    tried="16 updates in two processes of two devices with fsdp 4, the others in one of one device",
    sees="a warning that results now agree to rounding",
    lost="equality of the last bits",
)
def _another_layout(lab: Lab) -> None:
    workdir = _folder(lab, "layout")
    split = ("--training.fsdp", "4", "--training.num-steps", "16")
    ends = lab.wait_two(lab.start_two(workdir, split, split))
    assert [end.code for end in ends] == [0, 0], ends
    assert "agree with an uninterrupted run up to rounding" in lab.run(workdir).text
    lab.check_close(workdir)


@fault(
    "pictures that cannot be read",
    tried="two of 300 pictures in a folder are cut off; on_bad_example raise, skip, and kill -9",
    sees="with raise the file's name and exit code 2; with skip a warning for each, at most 1 %",
    lost="the broken pictures, if they are to be skipped",
)
def _broken_pictures(lab: Lab) -> None:
    pictures = _folder(lab, "pictures")
    _write_pictures(pictures, broken=(17, 203))
    data = ("--data", "folder", "--data.path", str(pictures), "--data.image-size", "8")
    skip = (*data, "--training.on-bad-example", "skip")
    end = lab.run(_folder(lab, "raise"), *data, expect=2)
    assert "017.png" in end.text or "203.png" in end.text, end.text
    whole, workdir = _folder(lab, "skip"), _folder(lab, "skip-killed")
    end = lab.run(whole, *skip)
    assert "017.png" in end.text and "203.png" in end.text, end.text
    lab.run(workdir, *skip, fault={"kill_in_save": [16, 0.05]}, expect=-signal.SIGKILL)
    lab.run(workdir, *skip)
    assert lab.digest(workdir) == lab.digest(whole) and curve(workdir) == curve(whole)


def _write_pictures(folder: Path, broken: tuple[int, ...]) -> None:
    from PIL import Image

    rng = np.random.default_rng(3)
    folder.mkdir()
    for number in range(300):
        file = folder / f"{number:03d}.png"
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
        if number in broken:
            file.write_bytes(file.read_bytes()[:60])

"""Tables of results in Markdown, and what claims accept."""

from dataclasses import replace

import numpy as np
import pytest

from diffusion_jax.commands import proof as proof_command
from diffusion_jax.commands.proof import (
    PROOFS,
    Bench,
    Claim,
    Proof,
    ablate,
    find_proof,
    prove,
    show,
)
from diffusion_jax.commands.results import append_row, mean_and_error
from diffusion_jax.experiment import find


def table(path, section):
    lines = path.read_text().split("\n")
    start = lines.index(f"## {section}") + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip()[1:-1].split("|")])
    return rows


def test_rows_are_appended_and_new_columns_are_filled_up(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n\n## other\n\nText.\n")
    append_row(path, "proof a", {"seed": 0, "x": 0.123456})
    append_row(path, "proof b", {"seed": 0})
    append_row(path, "proof a", {"seed": 1, "y": 2.0})
    append_row(path, "proof a", {"seed": 1, "y": 2.0})
    assert table(path, "proof a") == [
        ["seed", "x", "y"],
        ["---", "---", "---"],
        ["0", "0.1235", ""],
        ["1", "", "2"],
    ]
    assert table(path, "proof b")[-1] == ["0"]
    assert path.read_text().startswith("# Results\n\n## other\n\nText.\n")


def test_mean_and_standard_error():
    """1, 2, 3: mean 2, standard deviation 1, standard error 1/√3."""
    assert mean_and_error([1.0, 2.0, 3.0]) == "2 ± 0.58"
    assert mean_and_error([0.25]) == "0.25"


def test_a_claim_holds_inside_of_its_bounds_and_never_for_nan():
    claim = Claim("x", low=0.5)
    assert claim.holds({"x": 0.5}) and not claim.holds({"x": 0.4})
    assert not claim.holds({"x": float("nan")})
    assert Claim("x", high=1.0).bounds() == "<= 1" and Claim("x", 0.0, 1.0).bounds() == "0 to 1"


def test_a_control_that_does_not_fail_makes_the_proof_void(capsys):
    claims = (Claim("good", low=0.9), Claim("broken", high=0.2, control=True))
    assert show("p", claims, {"good": 0.95, "broken": 0.1})
    assert not show("p", claims, {"good": 0.95, "broken": 0.9})
    assert "void" in capsys.readouterr().out
    assert not show("p", claims, {"good": 0.5, "broken": 0.1})
    assert "the proof fails" in capsys.readouterr().out


def test_what_was_measured_is_not_measured_again(tmp_path):
    calls = []

    def row(bench):
        calls.append(bench.seed)
        return {"x": np.float32(0.5)}

    proof = Proof(arms={}, rows={"a": row}, derive=dict, claims=(), draw=lambda *_: None)
    for _ in range(2):
        assert Bench(proof, tmp_path, 3).measured(proof.rows) == {"a/x": 0.5}
    assert calls == [3]


class AnyScore(dict):
    """Scores of every name, to see which ones are derived."""

    def __missing__(self, key):
        return 0.5


@pytest.mark.parametrize("name", PROOFS)
def test_every_proof_is_whole(name):
    """Every claim is about a row that is measured or a score that is derived."""
    proof = find_proof(name)
    assert proof.claims and any(claim.control for claim in proof.claims)
    derived = set(proof.derive(AnyScore()))
    for claim in proof.claims:
        assert claim.score in derived or claim.score.rpartition("/")[0] in proof.rows, claim.score
    assert len({claim.score for claim in proof.claims}) == len(proof.claims)


class Stopped(Exception):
    """Stands for a Ctrl-C."""


def fake_proof(calls, stop=()):
    """A proof of one row, whose score is the seed's tenth, and of one more row for `ablate`."""

    def measure(row):
        def scores(bench):
            if row in stop:
                raise Stopped
            calls.append((row, bench.seed))
            return {"x": bench.seed / 10}

        return scores

    return Proof(
        arms={},
        rows={"first": measure("first"), "second": measure("second")},
        derive=lambda scores: {"sum": scores["first/x"] + scores["second/x"]},
        claims=(Claim("sum", high=0.6), Claim("first/x", high=0.3, control=True)),
        draw=lambda bench, path: path.write_text("picture"),
        ablation_rows={"third": measure("third")},
    )


@pytest.mark.slow
def test_a_proof_goes_on_where_it_was_and_is_recorded_once(tmp_path, monkeypatch, capsys):
    calls = []
    call = {"workdir": tmp_path / "runs", "seed": 2, "results": tmp_path / "R.md"}
    monkeypatch.setattr(proof_command, "find_proof", lambda name: fake_proof(calls, ["second"]))
    with pytest.raises(Stopped):
        prove("p", **call)
    monkeypatch.setattr(proof_command, "find_proof", lambda name: fake_proof(calls))
    assert prove("p", **call) and prove("p", **call)
    assert calls == [("first", 2), ("second", 2)]
    header, _, *rows = table(tmp_path / "R.md", "proof p")
    assert len(rows) == 1
    row = dict(zip(header, rows[0], strict=True))
    assert row["seed"] == "2" and row["sum"] == "0.4" and row["verdict"] == "holds"
    assert row["command"] == "`diffusion-jax proof p --seed 2`" and "jax" in row["versions"]
    assert (tmp_path / "pictures" / "p-seed-2.png").read_text() == "picture"
    assert "the proof holds" in capsys.readouterr().out


def test_measurements_of_another_experiment_are_refused(tmp_path):
    proof = replace(fake_proof([]), arms={"a": find("ddpm", tiny=True)})
    Bench(proof, tmp_path, 0).measured(proof.rows)
    other = replace(proof, arms={"a": find("improved_ddpm", tiny=True)})
    with pytest.raises(ValueError, match="measurements of other experiments"):
        Bench(other, tmp_path, 0).measured(proof.rows)


def test_an_ablation_records_means_and_asks_for_a_margin(tmp_path, monkeypatch):
    """Sums of 0, 0.2 and 0.4: mean 0.2, standard error 0.115, so 0.6 holds and 0.4 does not."""
    calls = []
    monkeypatch.setattr(proof_command, "find_proof", lambda name: fake_proof(calls))
    call = {"workdir": tmp_path / "runs", "results": tmp_path / "R.md"}
    assert ablate("p", **call) and ablate("p", **call)
    assert sorted(calls) == [(row, s) for row in ("first", "second", "third") for s in range(3)]
    assert len(table(tmp_path / "R.md", "proof p")) == 2 + 3
    header, _, *rows = table(tmp_path / "R.md", "ablation p")
    scores = {row[header.index("arm")]: row[header.index("scores")] for row in rows}
    assert scores["claims"] == "sum 0.2 ± 0.12, first/x 0.1 ± 0.058"
    assert scores["third"] == "x 0.1 ± 0.058" and len(rows) == 4
    strict = replace(fake_proof(calls), claims=(Claim("sum", high=0.4),))
    monkeypatch.setattr(proof_command, "find_proof", lambda name: strict)
    assert not ablate("p", **call)


def test_an_unknown_proof_is_refused():
    with pytest.raises(ValueError, match="no proof 'glide'"):
        find_proof("glide")

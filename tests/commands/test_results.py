"""Tables of results in Markdown, and what claims accept."""

import numpy as np
import pytest

from diffusion_jax.commands.proof import PROOFS, Bench, Claim, Proof, find_proof, show
from diffusion_jax.commands.results import append_row, mean_and_error


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


@pytest.mark.parametrize("name", PROOFS)
def test_every_proof_is_whole(name):
    """Its rows belong to its arms' names, and every claim is about something it measures."""
    proof = find_proof(name)
    assert proof.claims and any(claim.control for claim in proof.claims)
    rows = {claim.score.split("/")[0] for claim in proof.claims if "/" in claim.score}
    assert rows <= set(proof.rows)
    assert len({claim.score for claim in proof.claims}) == len(proof.claims)


def test_an_unknown_proof_is_refused():
    with pytest.raises(ValueError, match="no proof 'glide'"):
        find_proof("glide")

from __future__ import annotations

import pytest

from resnet_bk.errors import DataError
from resnet_bk.experiments.rows import questions, read_rows
from resnet_bk.experiments.summary import Spread, comparison_table, summarise, tokens_to_equal, verdict


def row(arm: str, rate: float, seed: int, perplexity: float, *, outcome: str = "done", curve: str = "") -> dict:
    metrics = {
        "arm": arm, "learning_rate": rate, "outcome": outcome, "validation_loss": perplexity, "reading": "stream",
        "validation_perplexity": perplexity, "tokens_per_second": 10.0, "peak_bytes": None, "curve": curve,
    }  # fmt: skip
    return {"seeds": [seed], "metrics": metrics, "parameters": {"without_embeddings": 5}}


ROWS = [
    row("a", 1e-3, 0, 10.0, curve="100:9.0:8.0 400:7.0:6.0"),
    row("a", 2e-3, 0, 11.0),
    row("a", 4e-3, 0, 0.0, outcome="diverged by step 2"),
    row("a", 1e-3, 1, 12.0, curve="100:9.0:8.0 400:7.0:6.0"),
    row("b", 2e-3, 0, 20.0, curve="100:9.0:6.5 400:7.0:5.5"),
    row("b", 2e-3, 1, 22.0, curve="100:9.0:6.5 400:7.0:5.5"),
    row("c", 2e-3, 0, 11.5),
    row("c", 2e-3, 1, 13.0),
]


def test_means_are_over_the_seeds_of_the_best_rate():
    a, b, c = summarise(ROWS)
    assert (a.rate, a.seeds, a.validation.values) == (1e-3, (0, 1), (10.0, 12.0))
    assert a.validation.mean == 11 and a.validation.deviation == pytest.approx(2**0.5)
    assert a.at_edge and not b.at_edge
    assert a.test is None and a.bits_per_byte is None
    assert verdict(b, a) == "1.909"
    assert verdict(c, a) == "1.114 (within the seeds' spread)"


def test_one_seed_has_no_spread():
    a, c = summarise([ROWS[0], ROWS[-2]])
    assert verdict(c, a) == "1.150 (one seed)"
    assert a.validation.deviation is None and str(a.validation) == "10.000"


@pytest.mark.parametrize(
    ("one", "other", "covered"),
    [((1.0, 2.0), (2.0, 3.0), True), ((1.0, 2.0), (2.1, 3.0), False), ((1.0, 4.0), (2.0, 3.0), True)],
)
def test_spreads_overlap_or_not(one, other, covered):
    assert Spread(one).overlaps(Spread(other)) is Spread(other).overlaps(Spread(one)) is covered


def test_tokens_to_equal_is_a_share_of_the_reference():
    a, b, c = summarise(ROWS)
    # b falls from 6.5 at 100 tokens to 5.5 at 400: 6.0, where a ends, lies half way in the logarithm.
    assert tokens_to_equal(b, a) == pytest.approx(200 / 400)
    assert tokens_to_equal(a, b) is None and tokens_to_equal(c, a) is None


def test_the_table_relates_everything_to_its_reference():
    lines = comparison_table(summarise(ROWS), reference="a").splitlines()
    assert lines[0].split()[:2] == ["arm", "parameters"] and "/ a" in lines[0]
    assert len(lines) == 5 and "at the edge" in lines[-1]
    assert "50%" in lines[2] and "1.909" in lines[2] and "21.000 ± 1.414" in lines[2]
    alone = comparison_table(summarise(ROWS[4:]), reference="a").splitlines()
    assert alone[1].split()[:7] == ["b", "5", "0.002", "2", "21.000", "±", "1.414"] and alone[1].split()[7] == "10"


def test_rows_tell_their_names_and_their_faults(tmp_path):
    assert read_rows("none", tmp_path) == [] and questions(tmp_path) == []
    path = tmp_path / "results" / "one.jsonl"
    path.parent.mkdir()
    path.write_text('{"config_hash": "x"}\n')
    with pytest.raises(DataError, match="line 1 has no 'seeds'"):
        read_rows("one", tmp_path)
    path.write_text('{"config_hash": "x"\n')
    with pytest.raises(DataError, match="line 1 is not a row"):
        read_rows("one", tmp_path)
    assert questions(tmp_path) == ["one"]


def test_other_models_of_the_same_name_are_arms_of_their_own():
    plain, dropped = row("a", 1e-3, 0, 10.0), row("a", 1e-3, 0, 9.0)
    plain["metrics"]["model"], dropped["metrics"]["model"] = "d_model=8 dropout=0.1", "d_model=8 dropout=0.3"
    assert [(arm.name, arm.validation.values) for arm in summarise([plain, dropped])] == [
        ("a", (10.0,)),
        ("a (dropout=0.3)", (9.0,)),
    ]


def test_a_run_made_twice_counts_once():
    (a,) = summarise([ROWS[0], ROWS[3], row("a", 1e-3, 0, 10.5)])
    assert a.seeds == (0, 1) and a.validation.values == (10.0, 12.0)

from __future__ import annotations

import dataclasses
import json

import pytest

from resnet_bk.errors import ConfigError
from resnet_bk.experiments.arms import make_arms, named_arms
from resnet_bk.experiments.compare import Comparison, compare, default_rates, parse_numbers, recipe
from resnet_bk.experiments.corpora import CorpusSource
from resnet_bk.experiments.rows import read_rows
from resnet_bk.experiments.trial import TrialResult


@pytest.fixture
def comparison(toy_model, toy_training) -> Comparison:
    return Comparison(make_arms(toy_model, named_arms(["bk", "transformer"])), toy_training, (1e-3, 1e-2), seeds=(0, 1))


@pytest.fixture
def run(token_folder, tmp_path):
    """Runs a comparison in a ledger of its own; returns its rows, and the lines printed in `run.lines`."""

    def run(comparison: Comparison, **options):
        run.lines = []
        options = {"benchmarks": tmp_path / "benchmarks", "work_dir": tmp_path / "work", **options}
        source = CorpusSource(str(token_folder))
        return compare(comparison, source, command="test", commit="c", report=run.lines.append, **options)

    return run


def test_every_arm_has_the_same_sweep_and_batches(comparison, run, tmp_path):
    rows = run(comparison)
    assert len(rows) == 2 * 2 + 2 == len(read_rows("compare", tmp_path / "benchmarks"))
    for arm in ("bk", "transformer"):
        found = {(row["metrics"]["learning_rate"], row["seeds"][0]) for row in rows if row["metrics"]["arm"] == arm}
        assert found == {(1e-3, 0), (1e-2, 0), (1e-2, 1)}
    batches = {seed: {row["metrics"]["batches"] for row in rows if row["seeds"] == [seed]} for seed in (0, 1)}
    assert [len(digests) for digests in batches.values()] == [1, 1] and batches[0] != batches[1]
    assert len({row["tokens"] for row in rows}) == 1
    sizes = [row["parameters"]["without_embeddings"] for row in rows]
    assert max(sizes) <= 1.02 * min(sizes)


def test_arms_take_turns(comparison, run):
    order = [row["metrics"]["arm"] for row in run(comparison)]
    assert order == ["bk", "transformer"] * 3


def test_the_table_says_what_was_found(comparison, run):
    run(comparison)
    text = "\n".join(run.lines)
    assert "6 of at least 6 runs have results, 6 new." in text
    table = text[text.index("arm ") :].splitlines()
    assert table[1].split()[0] == "bk" and table[2].split()[0] == "transformer"
    assert "The best rate of bk, transformer is at the edge of the sweep" in text


def test_a_second_call_only_adds_what_is_missing(comparison, run):
    first = run(comparison)
    assert run(comparison) == first
    assert "0 new" in "\n".join(run.lines)
    more = run(dataclasses.replace(comparison, seeds=(0, 1, 2)))
    assert len(more) == len(first) + 2 and {row["row"] for row in first} < {row.get("row") for row in more}
    again = run(dataclasses.replace(comparison, label="again"))
    assert len(again) == len(first) and not {row["config_hash"] for row in again} & {r["config_hash"] for r in first}


def test_without_time_nothing_is_lost(comparison, run, tmp_path):
    assert run(comparison, budget=0.0) == []
    assert "The time was up; the same command continues." in run.lines
    assert len(run(comparison)) == 6


@pytest.mark.slow
def test_several_processes_come_to_the_same(comparison, run, tmp_path):
    def results(rows):
        return {row["config_hash"]: (row["metrics"]["validation_loss"], row["metrics"]["batches"]) for row in rows}

    alone = results(run(comparison))
    together = results(run(comparison, parallel=2, benchmarks=tmp_path / "other"))
    assert together.keys() == alone.keys()
    for key, (loss, batches) in together.items():
        assert loss == pytest.approx(alone[key][0], rel=1e-5) and batches == alone[key][1]
    assert run(comparison, parallel=2, benchmarks=tmp_path / "third", budget=0.0) == []


def test_divergence_is_a_row_and_failure_is_tried_again(comparison, run, monkeypatch, tmp_path):
    outcomes = iter(["diverged by step 3", "out of memory: too large"])
    monkeypatch.setattr(
        "resnet_bk.experiments.pool.run_trial", lambda *_, **__: TrialResult(next(outcomes), {}, tokens=0)
    )
    single = dataclasses.replace(comparison, rates=(1e-3,))
    rows = run(single)
    assert [row["metrics"]["outcome"] for row in rows] == ["diverged by step 3"]
    assert len(read_rows("compare", tmp_path / "benchmarks")) == 2
    assert any("tried again" in line and "too large" in line for line in run.lines)
    monkeypatch.undo()
    assert {row["metrics"]["arm"] for row in run(single) if row["metrics"]["outcome"] == "done"} == {"transformer"}


def test_what_cannot_be_fair_is_refused(comparison, run, toy_model):
    for changes, said in (
        ({"rates": ()}, "at least one learning rate"),
        ({"seeds": (1, 1)}, "all different"),
        ({"arms": comparison.arms[:1] * 2}, "different names"),
    ):
        with pytest.raises(ConfigError, match=said):
            dataclasses.replace(comparison, **changes)
    accumulating = dataclasses.replace(comparison.training, gradient_accumulation_steps=2)
    with pytest.raises(ConfigError, match="one pass a step"):
        dataclasses.replace(comparison, training=accumulating)
    small = dataclasses.replace(toy_model, vocab_size=100)
    with pytest.raises(ConfigError, match="the corpus has"):
        run(dataclasses.replace(comparison, arms=make_arms(small, named_arms(["bk"]))))
    with pytest.raises(ConfigError, match="parallel is 0"):
        run(comparison, parallel=0)


def test_rows_are_plain_json_without_paths(comparison, run, token_folder, tmp_path):
    run(dataclasses.replace(comparison, rates=(1e-3,), seeds=(0,)))
    (path,) = (tmp_path / "benchmarks" / "results").iterdir()
    text = path.read_text()
    assert str(token_folder) not in text and str(tmp_path) not in text
    assert [json.loads(line)["metrics"]["kind"] for line in text.splitlines()] == ["compare"] * 2


def test_a_recipe_tells_everything_that_is_not_as_usual(comparison):
    arm = comparison.arms[0]
    usual = "8 steps of 3 x 16, cosine, warm-up 2, decay 0.1, clip 1.0, float32"
    assert recipe(comparison.trial(arm, 1e-3, 0)) == usual
    other = dataclasses.replace(comparison, training=dataclasses.replace(comparison.training, beta2=0.99))
    assert recipe(other.trial(arm, 1e-3, 0)) == f"{usual}, beta2 0.99"


def test_numbers_of_an_option():
    assert parse_numbers("1e-3, 2e-3", "rates") == (1e-3, 2e-3)
    assert default_rates(1e-3) == (5e-4, 1e-3, 2e-3)
    with pytest.raises(ConfigError, match="--seeds is '0,x'"):
        parse_numbers("0,x", "seeds", int)


def test_dynamic_rates_need_a_test_split(comparison, corpus, tmp_path):
    wanted = dataclasses.replace(comparison, dynamic_rates=(1e-4,))
    assert wanted.trial(wanted.arms[0], 1e-3, 0).dynamic_rates == (1e-4,)
    options = {"command": "test", "commit": "c", "benchmarks": tmp_path, "work_dir": tmp_path}
    with pytest.raises(ConfigError, match="no test split"):
        compare(wanted, CorpusSource(), corpus=dataclasses.replace(corpus, test=None), **options)

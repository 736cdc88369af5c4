"""Every label is found again by a slow solver that shares nothing with the generators but the definition."""

from __future__ import annotations

import json
import math
from itertools import permutations

import pytest
import torch

from resnet_bk.errors import ConfigError
from resnet_bk.experiments.tasks import TASKS, make_task
from resnet_bk.experiments.tasks.base import prefix_products
from resnet_bk.experiments.tasks.groups import ModularGroupWords, PermutationWords
from resnet_bk.experiments.tasks.induction import InductionHeads
from resnet_bk.experiments.tasks.modular import ModularExpressions, ModularSums
from resnet_bk.experiments.tasks.parity import Parity
from resnet_bk.experiments.tasks.passkey import Passkey
from resnet_bk.experiments.tasks.recall import AssociativeRecall
from resnet_bk.experiments.tasks.selective_copy import SelectiveCopy
from resnet_bk.experiments.tasks.uniform import UniformTokens


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TASKS)
def test_drawing_does_not_wait_for_the_device(name):
    source = torch.Generator("cuda").manual_seed(0)
    task = TASKS[name]()
    task.sample(4, source)  # tables are copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        task.sample(4, source)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def solve_recall(task, row):
    """The pairs are the leading couples (key, value); a query is a known key at an even place behind them."""
    half, memory, place = task.vocabulary // 2, {}, 0
    while place < len(row) and 0 < row[place] < half <= row[place + 1] and len(memory) < task.pairs:
        if row[place] in memory:
            break
        memory[row[place]] = row[place + 1]
        place += 2
    answers, asked = {}, set()
    for t in range(place, len(row) - 1, 2):
        if row[t] in memory and row[t] not in asked:
            asked.add(row[t])
            answers[t + 1] = memory[row[t]]
    return answers


def solve_selective_copy(task, row):
    symbols = [token for token in row if token < task.symbols]
    markers = [t for t, token in enumerate(row) if token == task.symbols + 1]
    return {t + 1: symbol for t, symbol in zip(markers, symbols, strict=False)}


def solve_passkey(task, row):
    start = row.index(10 + task.filler) + 1
    question = row.index(11 + task.filler)
    return {question + 1 + n: row[start + n] for n in range(task.digits)}


def solve_parity(task, row):
    return {t + 1: row[: t + 1].count(1) % 2 for t in range(len(row) - 1)}


def solve_modular_sums(task, row):
    return {t + 1: sum(row[: t + 1]) % task.modulus for t in range(len(row) - 1)}


def solve_modular_expressions(task, row):
    k, answers = task.modulus, {}
    for t in range(0, len(row) - 1, 2):
        text = "".join(str(token) if token < k else "+-*"[token - k] for token in row[: t + 1])
        answers[t + 1] = eval(text) % k
    return answers


def solve_permutation_words(task, row):
    elements = list(permutations(range(task.degree)))
    letters, answers = list(range(task.degree)), {}
    for t, token in enumerate(row[:-1]):
        letters = [elements[token][letter] for letter in letters]
        answers[t + 1] = elements.index(tuple(letters))
    return answers


def solve_modular_group_words(task, row):
    p, point, answers = task.prime, 0, {}
    infinity = p
    for t, letter in enumerate(row[:-1]):
        if letter == 0:
            if point in (0, infinity):
                point = infinity if point == 0 else 0
            else:
                point = next(x for x in range(p) if x * point % p == p - 1)
        elif point != infinity:
            point = (point + (1 if letter == 1 else -1)) % p
        answers[t + 1] = point
    return answers


def solve_induction(task, row):
    return {len(row) - 1: row[row.index(task.symbols) + 1]}


def solve_uniform(task, row):
    return dict(enumerate(row))


SOLVERS = {
    "recall": solve_recall,
    "selective_copy": solve_selective_copy,
    "passkey": solve_passkey,
    "parity": solve_parity,
    "modular_sums": solve_modular_sums,
    "modular_expressions": solve_modular_expressions,
    "permutation_words": solve_permutation_words,
    "modular_group_words": solve_modular_group_words,
    "induction": solve_induction,
    "uniform": solve_uniform,
}

SMALL = [
    (AssociativeRecall(pairs=8, random_filler=False), 40),
    (AssociativeRecall(pairs=8, random_filler=False), 32),
    (AssociativeRecall(pairs=8), 33),
    (AssociativeRecall(pairs=16, fewest_pairs=2, vocabulary=64, random_filler=False, length=64), 90),
    (SelectiveCopy(count=4), 9),
    (SelectiveCopy(count=4), 50),
    (Passkey(digits=3), 8),
    (Passkey(digits=3), 40),
    (Passkey(digits=1, depth=0.5), 21),
    (Parity(), 2),
    (Parity(), 37),
    (ModularSums(), 30),
    (ModularSums(modulus=3), 31),
    (ModularExpressions(), 2),
    (ModularExpressions(), 3),
    (ModularExpressions(modulus=7), 40),
    (ModularExpressions(modulus=2), 41),
    (PermutationWords(), 2),
    (PermutationWords(), 40),
    (PermutationWords(degree=5), 23),
    (ModularGroupWords(), 40),
    (ModularGroupWords(prime=2), 41),
    (ModularGroupWords(prime=7), 33),
    (InductionHeads(), 4),
    (InductionHeads(), 30),
    (UniformTokens(), 30),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("task, length", SMALL, ids=lambda value: getattr(value, "name", value))
def test_labels_are_those_of_a_slow_solver(task, length, device):
    source = torch.Generator(device).manual_seed(1)
    tokens, labels = task.sample(40, source, length=length)
    assert tokens.device.type == labels.device.type == device
    assert tokens.shape == labels.shape == (40, length)
    assert tokens.dtype == labels.dtype == torch.int64
    assert 0 <= tokens.min() and tokens.max() < task.vocab_size
    assert labels.max() < task.vocab_size
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        scored = {t: value for t, value in enumerate(label) if value != -100}
        assert scored == SOLVERS[task.name](task, row)
        assert 0 < len(scored) - (task.name == "uniform") <= task.scored(length)


def test_every_task_has_a_solver_and_its_own_name():
    assert list(SOLVERS) == list(TASKS)
    assert all(TASKS[name].name == name for name in TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_usual_sizes_can_be_drawn_and_described(name):
    task = TASKS[name]()
    tokens, labels = task.sample(2, generator())
    assert tokens.shape == (2, task.length)
    again = task.sample(2, generator())
    assert torch.equal(again.input_ids, tokens) and torch.equal(again.labels, labels)
    assert not torch.equal(task.sample(2, generator(1)).input_ids, tokens)
    description = task.describe()
    assert description["task"] == name
    assert json.loads(json.dumps(description)) == description
    for other in task.evaluations().values():
        assert other.vocab_size == task.vocab_size
        assert other.sample(1, generator(), length=max(other.evaluation_lengths)).input_ids.shape[0] == 1
    assert 0 < task.chance <= 0.5


@pytest.mark.parametrize("task", [task for task, _ in SMALL if task.name not in ("recall", "selective_copy")][::2])
def test_answers_occur_about_equally_often(task):
    """A task whose answers are skewed could be half solved by a guess."""
    labels = task.sample(4000, generator(2), length=max(task.shortest, 24)).labels
    last = labels[:, 1:][labels[:, 1:] != -100].view(4000, -1)[:, -1]
    share = last.bincount().float() / 4000
    best = share.max().item()
    if task.name == "modular_expressions":  # a product is zero more often than not
        assert best < 0.5 if task.modulus > 2 else best < 0.8
    else:
        assert best < task.chance + 5 * math.sqrt(task.chance / 4000)


def test_recall_queries_every_key_once_and_near_ones_more():
    task = AssociativeRecall(pairs=8, length=256)
    tokens, labels = task.sample(300, generator(3))
    assert ((labels != -100).sum(1) == 8).all()
    places = (labels != -100).nonzero()[:, 1]
    assert (places % 2 == 1).all() and places.min() >= 17
    queried = tokens[:, :-1][labels[:, 1:] != -100].view(300, 8)
    assert torch.equal(queried.sort(1).values, tokens[:, :16:2].sort(1).values)
    # Weights (place + 1)^-0.99 over 120 places: the nearest is nearly certain to be among 8 draws, the far half rare.
    assert (labels[:, 17] != -100).float().mean() > 0.75
    assert (places >= 136).float().mean() < 0.3


def test_recall_mixes_numbers_of_pairs_in_training_only():
    task = AssociativeRecall(
        pairs=32, fewest_pairs=4, length=256, evaluation_lengths=(128, 256), evaluation_pairs=(8, 64)
    )
    held = (task.sample(500, generator(4)).labels != -100).sum(1)
    assert held.min() == 4 and held.max() == 32
    assert 0.2 < (held < 8).float().mean() < 0.45  # log-uniform: ln(8 / 4) / ln(33 / 4) = 0.33
    evaluations = task.evaluations()
    assert list(evaluations) == ["", "pairs_8", "pairs_64"]
    for name, pairs, length in (("", 32, 128), ("pairs_8", 8, 256), ("pairs_64", 64, 256)):
        assert ((evaluations[name].sample(20, generator(), length=length).labels != -100).sum(1) == pairs).all()
    assert evaluations["pairs_64"].evaluation_lengths == (256,)


def test_recall_trains_on_rows_of_several_lengths():
    task = AssociativeRecall(pairs=32, fewest_pairs=2, length=256, shortest_length=32)
    assert [task.training_length(step) for step in range(6)] == [256, 128, 64, 32, 256, 128]
    for length, most in ((256, 32), (64, 8), (32, 4)):
        batch = task.sample(200, generator(), length=length)
        held = (batch.labels != -100).sum(1)
        assert batch.input_ids.shape == (200, length) and task.scored(length) == most
        assert held.min() == 2 and held.max() == most
    assert ((task.evaluations()[""].sample(20, generator(), length=512).labels != -100).sum(1) == 32).all()
    with pytest.raises(ConfigError, match="at least 16 tokens"):
        task.sample(2, generator(), length=15)


def test_passkey_depths():
    task = Passkey(length=64)
    assert list(task.evaluations()) == ["", "depth_0", "depth_0.25", "depth_0.5", "depth_0.75", "depth_1"]
    for depth, place in ((0.0, 0), (0.5, 26), (1.0, 52)):
        rows = task.evaluations()[f"depth_{depth:g}"].sample(10, generator()).input_ids
        assert ((rows == 26).int().argmax(1) == place).all()
    starts = (task.sample(2000, generator()).input_ids == 26).int().argmax(1)
    assert starts.bincount(minlength=53).min() > 10  # 38 expected at each of 53 places


def test_modular_group_is_the_whole_line():
    """PSL(2, F_p) moves 0 to every point."""
    for prime in (2, 3, 5, 7):
        labels = ModularGroupWords(prime=prime, length=64).sample(100, generator()).labels
        assert set(labels.unique().tolist()) == {-100, *range(prime + 1)}


def test_prefix_products_of_matrices():
    matrices = torch.rand(2, 13, 3, 3, generator=generator(), dtype=torch.float64)
    found = prefix_products((matrices,), lambda first, second: (second[0] @ first[0],))[0]
    product = torch.eye(3, dtype=torch.float64)
    for t in range(13):
        product = matrices[:, t] @ product
        torch.testing.assert_close(found[:, t], product.expand(2, 3, 3))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AssociativeRecall(pairs=200), "length 512; expected at least 800"),
        (lambda: AssociativeRecall(pairs=40, vocabulary=64), "recall.pairs is 40; expected 1 to 31"),
        (lambda: AssociativeRecall(fewest_pairs=65), "recall.fewest_pairs is 65; expected 0 to 64"),
        (lambda: AssociativeRecall(shortest_length=1024), "recall.shortest_length is 1024; expected 0, or 8"),
        (lambda: Passkey(depth=1.5), "passkey.depth is 1.5"),
        (lambda: Parity(length=1), "length 1; expected at least 2"),
        (lambda: ModularSums(modulus=1), "modular_sums.modulus is 1"),
        (lambda: ModularExpressions(modulus=0), "modular_expressions.modulus is 0"),
        (lambda: PermutationWords(degree=6), "degree is 6; expected 2 to 5"),
        (lambda: ModularGroupWords(prime=9), "prime is 9; expected a prime"),
        (lambda: Parity().sample(1, generator(), length=1), "length is 1; the task 'parity' needs at least 2"),
    ],
)
def test_bad_fields(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_tasks_from_text():
    assert make_task("parity") == Parity()
    found = make_task(" recall:pairs=256:length=1024:random_filler=False")
    assert found == AssociativeRecall(pairs=256, length=1024, evaluation_lengths=(1024, 2048), random_filler=False)
    assert found.label == "recall:length=1024:pairs=256:random_filler=False"
    assert make_task(found.label) == found
    fixed = make_task("passkey:length=64:evaluation_lengths=64/512:depth=0.5:evaluation_depths=0/1")
    assert fixed == Passkey(length=64, evaluation_lengths=(64, 512), depth=0.5, evaluation_depths=(0.0, 1.0))
    assert fixed.label == "passkey:length=64:depth=0.5:evaluation_depths=0.0/1.0"
    assert make_task("passkey:depth=none").label == "passkey"


@pytest.mark.parametrize(
    "text, message",
    [
        ("recal", "Unknown task 'recal'; did you mean 'recall'"),
        ("recall:pair=3", "'recall.pair'; did you mean 'recall.pairs'"),
        ("recall:pairs", "'pairs'; expected field=value"),
        ("recall:pairs=many", "recall.pairs is 'many'; expected a value such as 64"),
        ("recall:random_filler=1", "recall.random_filler is '1'"),
        ("parity:length=1", "at least 2"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(ConfigError, match=message):
        make_task(text)

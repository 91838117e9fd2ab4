"""What a run warns of, and that it says the same after a restart."""

import json

import pytest

from she_jax.rollouts.monitor import (
    DRIFT,
    FALLEN,
    PATHS,
    SILENT,
    WINDOW,
    TrainingMonitor,
    collapse,
    drift,
)

FINE = {"entropy": 0.5, "zero_variance": 0.3, "paths": 4.0}


def test_drift_is_a_score_that_rises_while_the_disagreement_does():
    """Of the last updates against as many before; nothing else is drift."""
    early, late = [[0.5, 0.1]] * WINDOW, [[0.6, 0.2]] * WINDOW
    assert "rose from 0.500 to 0.600" in drift([*early, *late])
    assert "from 0.100 to 0.200" in drift([*early, *late])
    assert not drift([*early, *late][1:])  # too early to tell
    assert not drift([*late, *early])
    assert not drift([*early, *[[0.6, 0.1]] * WINDOW])  # right to be content
    assert not drift([*early, *[[0.5, 0.2]] * WINDOW])  # not even pleased
    assert not drift([*early, *[[0.5 + DRIFT / 2, 0.2]] * WINDOW])


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({}, []),
        ({"entropy": 0.9 * FALLEN * 0.5}, ["entropy fell from 0.500 to 0.135"]),
        ({"entropy": 1.01 * FALLEN * 0.5}, []),
        ({"zero_variance": SILENT + 0.01}, ["81% of the groups"]),
        ({"paths": PATHS - 0.1}, ["1.10 different paths"]),
        ({"zero_variance": 1.0, "paths": 1.0}, ["100% of the groups", "1.00 different paths"]),
    ],
)
def test_a_collapse_is_named(figures, words):
    told = collapse([list((FINE | figures).values())] * 3, 0.5)
    assert [word in one for word, one in zip(words, told, strict=True)] == [True] * len(words)


def test_a_collapse_is_said_once_a_window_and_against_the_stages_beginning():
    watch = TrainingMonitor()
    said = [watch.warnings(FINE) for _ in range(WINDOW)]
    said += [watch.warnings(FINE | {"entropy": 0.1}) for _ in range(2 * WINDOW)]
    assert [n for n, own in enumerate(said) if own] == [2 * WINDOW - 1, 3 * WINDOW - 1]


def test_a_restored_watch_says_what_the_first_one_would():
    def figures(n):
        more = {"examiner": n / 50, "disagreement": n / 50, "entropy": 0.5 / (1 + n)}
        return FINE | more

    one, other = TrainingMonitor(), TrainingMonitor()
    for n in range(WINDOW + 3):
        one.warnings(figures(n))
    other.restore(json.loads(json.dumps(one.state)))
    rest = range(WINDOW + 3, 4 * WINDOW)
    said = [one.warnings(figures(n)) for n in rest]
    assert said == [other.warnings(figures(n)) for n in rest]
    assert any(said)
    assert one.state == other.state

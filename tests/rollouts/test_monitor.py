"""What training is monitored for, and that a resumed run gives the same warnings."""

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

HEALTHY = {"entropy": 0.5, "zero_variance": 0.3, "paths": 4.0}


def test_drift_is_a_score_that_rises_while_the_disagreement_does():
    """Of the last updates against as many before; nothing else is drift."""
    early, late = [[0.5, 0.1]] * WINDOW, [[0.6, 0.2]] * WINDOW
    assert "rose from 0.500 to 0.600" in drift([*early, *late])
    assert "from 0.100 to 0.200" in drift([*early, *late])
    assert not drift([*early, *late][1:])  # too few updates
    assert not drift([*late, *early])
    assert not drift([*early, *[[0.6, 0.1]] * WINDOW])  # the score is right
    assert not drift([*early, *[[0.5, 0.2]] * WINDOW])  # the score does not rise
    assert not drift([*early, *[[0.5 + DRIFT / 2, 0.2]] * WINDOW])


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({}, []),
        ({"entropy": 0.9 * FALLEN * 0.5}, ["entropy fell from 0.500 to 0.135"]),
        ({"entropy": 1.01 * FALLEN * 0.5}, []),
        ({"zero_variance": SILENT + 0.01}, ["81% of the groups"]),
        ({"paths": PATHS - 0.1}, ["1.10 different paths"]),
        ({"zero_variance": 1.0, "paths": 1.0}, ["100% of the groups", "1.00 different paths"]),
    ],
)
def test_a_collapse_is_named(metrics, words):
    warnings = collapse([list((HEALTHY | metrics).values())] * 3, 0.5)
    for word, warning in zip(words, warnings, strict=True):
        assert word in warning


def test_a_collapse_since_the_stage_began_is_warned_of_once_a_window():
    monitor = TrainingMonitor()
    warnings = [monitor.warnings(HEALTHY) for _ in range(WINDOW)]
    warnings += [monitor.warnings(HEALTHY | {"entropy": 0.1}) for _ in range(2 * WINDOW)]
    assert [n for n, some in enumerate(warnings) if some] == [2 * WINDOW - 1, 3 * WINDOW - 1]


def test_a_restored_monitor_gives_the_warnings_of_the_first():
    def metrics(n):
        rising = {"prm": n / 50, "disagreement": n / 50, "entropy": 0.5 / (1 + n)}
        return HEALTHY | rising

    monitor, restored = TrainingMonitor(), TrainingMonitor()
    for n in range(WINDOW + 3):
        monitor.warnings(metrics(n))
    restored.restore(json.loads(json.dumps(monitor.state)))
    rest = range(WINDOW + 3, 4 * WINDOW)
    warnings = [monitor.warnings(metrics(n)) for n in rest]
    assert warnings == [restored.warnings(metrics(n)) for n in rest]
    assert any("learning to exploit" in warning for some in warnings for warning in some)
    assert any("entropy fell" in warning for some in warnings for warning in some)
    assert monitor.state == restored.state

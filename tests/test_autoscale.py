"""The autoscaler's rule, as Kubernetes documents it, and a short simulation with the real queue."""

import sys

import pytest
from harness import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import autoscale
from autoscale_rule import Autoscaler, Rule

import settings


@pytest.mark.parametrize(
    ("replicas", "metric", "wanted"),
    [
        (2, 40, 4),  # ceil(40 / 10)
        (2, 41, 5),
        (4, 43, 4),  # within the tolerance of 10%
        (4, 45, 5),
        (4, 1000, 8),  # no more than `most`
    ],
)
def test_replicas_follow_the_formula(replicas: int, metric: float, wanted: int) -> None:
    assert Autoscaler(Rule(target=10, most=8, down_window=0)).decide(0, replicas, metric) == wanted


def test_first_look_at_an_empty_queue_removes_nothing() -> None:
    assert Autoscaler(Rule(target=10)).decide(0, 4, 0) == 4


def test_replicas_fall_only_to_the_highest_recommendation_of_the_window() -> None:
    autoscaler = Autoscaler(Rule(target=10, down_window=60))
    metrics = [40, 20, 10, 10, 10, 10, 10]  # every 15 seconds, with 4 replicas

    decided = [autoscaler.decide(15 * turn, 4, metric) for turn, metric in enumerate(metrics)]

    assert decided == [4, 4, 4, 4, 4, 2, 1]


def test_replicas_rise_only_to_the_lowest_recommendation_of_the_window() -> None:
    autoscaler = Autoscaler(Rule(target=10, up_window=30))

    assert [autoscaler.decide(15 * turn, 2, metric) for turn, metric in enumerate([20, 60, 60, 60])] == [2, 2, 2, 6]


def test_replicas_never_fall_below_the_least() -> None:
    autoscaler = Autoscaler(Rule(target=10, least=2, down_window=0))

    assert [autoscaler.decide(turn, 4, 0) for turn in range(1, 3)] == [2, 2]


def test_policy_limits_how_many_are_added_within_its_period() -> None:
    autoscaler = Autoscaler(Rule(target=1, up_pods=1, up_percent=50, up_period=60))
    replicas = [4]

    for turn in range(1, 6):
        replicas.append(autoscaler.decide(15 * turn, replicas[-1], 100))

    assert replicas == [4, 6, 6, 6, 6, 9]


def test_swings_are_changes_of_direction_beyond_one_rise_and_one_fall() -> None:
    def swings(*replicas: int) -> int:
        return autoscale.Run(rows=[(0.0, 0.0, 0, 0, count) for count in replicas]).swings()

    assert swings(4, 4, 4) == 0
    assert swings(4, 6, 8, 8, 5, 4) == 0
    assert swings(4, 8, 6, 7) == 1
    assert swings(4, 2, 8, 4) == 1  # it fell before the load rose
    assert swings(4, 8, 1, 6, 2) == 2


@pytest.mark.alone("simulates 12 minutes in one, so each delay counts ten times")
def test_replicas_follow_a_load_that_doubles_without_loss_or_swings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_HOST", "REDIS_PORT", "REQUEST_TIMEOUT", "REDIS_TIMEOUT"):
        monkeypatch.setattr(settings, name, getattr(settings, name))  # simulate() changes them

    run = autoscale.simulate(autoscale.RECOMMENDED, "pending", 10, phases=((60, 1), (240, 2), (420, 1)))

    assert not run.failures
    assert len(run.waits) == pytest.approx(14 * (60 + 420) + 28 * 240, rel=0.05)
    assert max(run.waits) < 45  # seconds, of 60
    assert run.replicas[0] == 4
    assert max(run.replicas) >= 6  # 28 images/s need 5.6
    assert run.replicas[-1] < max(run.replicas)
    assert run.swings() == 0

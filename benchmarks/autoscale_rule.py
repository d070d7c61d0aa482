"""The rule by which Kubernetes' HorizontalPodAutoscaler sets the number of replicas from an external metric.

KEDA hands it the metric with a target for each replica (AverageValue). The rule is that of autoscaling/v2: the formula,
its tolerance, the stabilization windows, and the policies for how fast replicas may be added. Times are in seconds.
"""

import math
from dataclasses import dataclass, field

EPSILON = 1e-6  # seconds


@dataclass(frozen=True)
class Rule:
    """The settings of an autoscaler. The defaults are Kubernetes', except those that it has none for."""

    target: float  # of the metric, for each replica
    least: int = 1
    most: int = 20
    every: float = 15.0  # between two decisions
    tolerance: float = 0.1
    up_window: float = 0.0
    down_window: float = 300.0
    up_pods: int = 4  # this many, or up_percent, whichever is more, may be added within up_period
    up_percent: float = 100.0
    up_period: float = 15.0


@dataclass
class Autoscaler:
    """An autoscaler at work: its rule, what it has recommended, and how it has changed the number of replicas."""

    rule: Rule
    recommended: list[tuple[float, int]] = field(default_factory=list)  # (time, replicas)
    changes: list[tuple[float, int]] = field(default_factory=list)  # (time, replicas added or removed)

    def decide(self, now: float, replicas: int, metric: float) -> int:
        """Return the number of replicas to have from now on; call it every `rule.every` seconds."""
        if not self.recommended:  # as Kubernetes does, so that the first look can't remove replicas
            self.recommended.append((now - EPSILON, replicas))
        self.recommended.append((now, self._by_formula(replicas, metric)))
        stable = self._stabilized(now, replicas)
        chosen = max(self.rule.least, min(stable, self._most_allowed(now, replicas), self.rule.most))
        self.changes.append((now, chosen - replicas))
        return chosen

    def _by_formula(self, replicas: int, metric: float) -> int:
        if abs(metric / (self.rule.target * replicas) - 1) <= self.rule.tolerance:
            return replicas
        return math.ceil(metric / self.rule.target)

    def _stabilized(self, now: float, replicas: int) -> int:
        """Return the lowest recent recommendation if that is more than `replicas`, the highest one if it is less."""
        lowest = min(count for at, count in self.recommended if at >= now - self.rule.up_window)
        highest = max(count for at, count in self.recommended if at >= now - self.rule.down_window)
        return min(max(replicas, lowest), highest)

    def _most_allowed(self, now: float, replicas: int) -> int:
        before = replicas - sum(change for at, change in self.changes if at > now - self.rule.up_period)
        return max(before + self.rule.up_pods, math.ceil(before * (1 + self.rule.up_percent / 100)))

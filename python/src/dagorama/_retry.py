"""`Retry`: how often and how patiently a failing action is tried again."""

from __future__ import annotations


class Retry:
    """How often and how patiently a failing action is tried again.

    ``delay * factor ** (failures - 1)`` seconds, at most ``max_delay``, spread by
    ``jitter`` (a fraction).  Only exceptions in ``on`` (and not in ``never``) are
    retried.  A worker that dies costs a *loss*, not an attempt: after ``losses`` of them
    the node is quarantined.  Without a `Retry`: one attempt, three losses.
    """

    def __init__(
        self, attempts: int = 3, *, delay: float = 1.0, factor: float = 2.0, max_delay: float = 300.0,
        jitter: float = 0.1, losses: int = 3, on: tuple[type[BaseException], ...] = (Exception,),
        never: tuple[type[BaseException], ...] = (),
    ) -> None:
        if attempts < 1 or losses < 1:
            raise ValueError(f"attempts is {attempts} and losses is {losses}: both must be at least 1")
        if delay < 0 or max_delay < 0 or factor < 0 or jitter < 0:
            raise ValueError("delay, max_delay, factor and jitter must not be negative")
        self.attempts = attempts
        self.delay = delay
        self.factor = factor
        self.max_delay = max_delay
        self.jitter = jitter
        self.losses = losses
        self.on = on
        self.never = never

    def _covers(self, kind: type[BaseException]) -> bool:
        """Whether an exception of that class is worth another attempt."""
        return issubclass(kind, self.on) and not issubclass(kind, self.never)

    def _wire(self) -> dict[str, int]:
        """As the protocol writes it."""
        return {
            "max_attempts": self.attempts, "max_losses": self.losses, "delay_ms": round(self.delay * 1000),
            "factor_milli": round(self.factor * 1000), "max_delay_ms": round(self.max_delay * 1000),
            "jitter_milli": round(self.jitter * 1000),
        }

    def __repr__(self) -> str:
        return f"Retry({self.attempts}, delay={self.delay}, factor={self.factor}, losses={self.losses})"


ONCE = Retry(1)

"""The actions of `dagorama bench fanout-python`: no-op bodies, so that what is measured is the machinery."""

from dagorama import action


@action
def leaf(n: int) -> int:
    return n


@action
def join(values: list[int]) -> int:
    return len(values)


@action
def fan(n: int) -> int:
    return join([leaf(i) for i in range(n)])

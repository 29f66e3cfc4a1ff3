"""The types that callers see, asserted for both checkers."""

from collections.abc import Sequence
from typing import TypeVar, assert_type

from dagorama import Outcome, Run, action, batch_action, current, outcome

T = TypeVar("T")


@action
def fetch(url: str, *, tries: int = 1) -> str:
    return url


@action(queue="gpu", timeout=3)
def add(a: int, b: int) -> int:
    return a + b


@action
async def load(key: str) -> bytes:
    return key.encode()


@batch_action(max_size=8)
def embed(pages: list[str]) -> list[float]:
    return [float(len(page)) for page in pages]


@batch_action()
async def aembed(pages: list[str]) -> list[float]:
    return [float(len(page)) for page in pages]


@action
def first(items: Sequence[T]) -> T:
    return items[0]


@action
def judge(result: Outcome[str]) -> bool:
    return result.ok and result.value == ""


class Shop:
    @action
    def price(self, item: str) -> int:
        return len(item)


@action
def flow(urls: list[str]) -> list[float]:
    pages = [fetch(url, tries=2) for url in urls]
    assert_type(pages, list[str])
    assert_type(load("k"), bytes)
    assert_type(embed(pages[0]), float)
    assert_type(aembed(pages[0]), float)
    assert_type(first([1, 2]), int)
    assert_type(judge(outcome(fetch("a"))), bool)
    assert_type(fetch.map(urls), list[str])
    assert_type(load.map(urls), list[bytes])
    assert_type(add.starmap([(1, 2)]), list[int])
    assert_type(Shop().price("a"), int)
    assert_type(Shop.price(Shop(), "a"), int)
    assert_type(add.options(priority=3)(1, 2), int)
    assert_type(current().run_id, str)
    return embed.map(pages)


def outside() -> None:
    run = flow.submit(["a"])
    assert_type(run, Run[list[float]])
    assert_type(run.result(), list[float])
    assert_type(load.submit("k"), Run[bytes])
    assert_type(embed.submit("page").result(), float)
    assert_type(add.local(1, 2), int)


async def inside() -> None:
    assert_type(await load.submit("k"), bytes)
    assert_type(await load.local("k"), bytes)
    assert_type(await fetch.asubmit("k"), Run[str])
    assert_type(await load.asubmit("k"), Run[bytes])

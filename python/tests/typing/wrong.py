"""Every line with a comment is wrong, and both type checkers say so with the codes in the comment (mypy | pyright)."""

from collections.abc import Sequence
from typing import TypeVar

from dagorama import ActionFailed, Client, Outcome, Retry, Run, Worker, action, batch_action, current, outcome

T = TypeVar("T")


@action
def fetch(url: str) -> str:
    return url


@action
def add(a: int, b: int = 0) -> int:
    return a + b


@action
async def load(key: str) -> bytes:
    return key.encode()


@batch_action(max_size=8)
def embed(pages: list[str]) -> list[float]:
    return [float(len(page)) for page in pages]


@action
def first(items: Sequence[T]) -> T:
    return items[0]


@action
def judge(result: Outcome[str]) -> bool:
    return result.ok


class Shop:
    @action
    def price(self, item: str) -> int:
        return len(item)


fetch(1)  # arg-type | reportArgumentType
fetch("a", "b")  # call-arg | reportCallIssue
fetch()  # call-arg | reportCallIssue
fetch(uri="a")  # call-arg | reportCallIssue
x1: int = fetch("a")  # assignment | reportAssignmentType
x2: str = load("a")  # assignment | reportAssignmentType
fetch.submit(b"a")  # arg-type | reportArgumentType
x3: Run[int] = fetch.submit("a")  # assignment | reportAssignmentType
x4: str = add.submit(1).result()  # assignment | reportAssignmentType
embed(["a"])  # arg-type | reportArgumentType
x5: list[float] = embed("a")  # assignment | reportAssignmentType
add(fetch("a"))  # arg-type | reportArgumentType
fetch.map([1, 2])  # list-item | reportArgumentType
x6: list[int] = fetch.map(["a"])  # assignment | reportAssignmentType
add.starmap([("a", 1)])  # list-item | reportArgumentType
x7: str = first([1, 2])  # assignment | reportAssignmentType
judge("a")  # arg-type | reportArgumentType
judge(outcome(1))  # arg-type | reportArgumentType
Shop().price(1)  # arg-type | reportArgumentType
x8: str = Shop().price("a")  # assignment | reportAssignmentType
fetch.options(retry=3)  # arg-type | reportArgumentType
fetch.options(prio=1)  # call-arg | reportCallIssue
action(queue=1)  # call-overload | reportArgumentType
Retry(on=ValueError)  # arg-type | reportArgumentType
Worker("app", isolation="fork")  # arg-type | reportArgumentType
x9: int = current().run_id  # assignment | reportAssignmentType
Client().run(7)  # arg-type | reportArgumentType
fetch.submit("a").cancel(reason=1)  # arg-type | reportArgumentType


@batch_action(max_size=8)  # arg-type | reportArgumentType, reportCallIssue
def broken(pages: list[str]) -> float:
    return 1.0


@action(timeout="soon")  # call-overload, untyped-decorator | reportArgumentType
def late() -> None: ...


async def waits() -> None:
    y1: int = await fetch.submit("a")  # assignment | reportAssignmentType
    y2: str = await load.submit("a")  # assignment | reportAssignmentType
    y3: Run[str] = fetch.asubmit("a")  # assignment | reportAssignmentType
    try:
        await add.submit(1)
    except ActionFailed as error:
        print(error.nodes)  # attr-defined | reportAttributeAccessIssue

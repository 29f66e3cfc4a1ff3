"""``python -m dagorama worker MODULE…``, which the binary's ``dagorama worker`` calls."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ._connection import warn
from ._errors import DagoramaError
from ._worker import Worker


EXIT_CODES = {"UNAUTHENTICATED": 5, "BROKER_UNAVAILABLE": 4}  # docs/ERRORS.md; all else: it could not start


def module_name(given: str) -> str:
    """The module that was meant: ``pkg.my_module``, or ``./pkg/my_module.py``, as shells complete it."""
    name = given
    if given.endswith(".py") or "/" in given:
        path = os.path.normpath(given.removesuffix(".py"))
        if os.path.isabs(path):
            path = os.path.relpath(path)
        name = path.removesuffix("/__init__").replace("/", ".")
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{given!r} is not a module: write it as in `import my_module`, and run this in the directory "
                         "that has my_module.py")
    return name


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of the package; the exit code."""
    parser = argparse.ArgumentParser(prog="dagorama", description="Run nodes of durable task graphs.")
    commands = parser.add_subparsers(dest="command", required=True)
    worker = commands.add_parser("worker", help="run the actions of Python modules",
                                 epilog="example: dagorama worker my_module --queue default --queue gpu --tolerate gpu")
    worker.add_argument("modules", nargs="+", metavar="MODULE", help="module that defines actions (as in `import MODULE`)")
    worker.add_argument("--queue", action="append", metavar="NAME", help="serve this queue (repeatable; default: default)")
    worker.add_argument("--tolerate", action="append", default=[], metavar="TAINT", help="run actions with this taint too")
    worker.add_argument("--concurrency", type=int, metavar="N", help="how many calls at once (default: one per CPU)")
    worker.add_argument("--isolation", choices=("process", "thread", "none"), default="process",
                        help="where calls run; timeouts end a call only with `process`")
    worker.add_argument("--url", help="the broker (default: DAGORAMA_URL, else dagorama://127.0.0.1:7373)")
    worker.add_argument("--until-idle", action="store_true", help="end when the broker has no open node left")
    said = parser.parse_args(argv)
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        modules = [module_name(given) for given in said.modules]
        served = Worker(*modules, queues=said.queue or ("default",), tolerate=said.tolerate, concurrency=said.concurrency,
                        isolation=said.isolation, url=said.url)
        served._talks = True
        served.run(until_idle=said.until_idle)
        if served._signals > 1:
            return 128 + served._signal
    except (DagoramaError, ValueError) as error:
        warn(str(error))
        return EXIT_CODES.get(getattr(error, "code", ""), 2)
    except KeyboardInterrupt:
        return 130
    return 0


def worker_main() -> int:
    """``dagorama-worker MODULE…``."""
    return main(["worker", *sys.argv[1:]])

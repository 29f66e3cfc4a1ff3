"""``python -m dagorama worker MODULE…``, which the binary's ``dagorama worker`` calls."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ._connection import warn
from ._errors import DagoramaError
from ._worker import Worker


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
    modules = [name.removesuffix(".py").replace("/", ".") if name.endswith(".py") else name for name in said.modules]
    try:
        Worker(*modules, queues=said.queue or ("default",), tolerate=said.tolerate, concurrency=said.concurrency,
               isolation=said.isolation, url=said.url).run(until_idle=said.until_idle)
    except ModuleNotFoundError as error:
        warn(f"{error}: run this where the module can be imported")
        return 2
    except (DagoramaError, ValueError) as error:
        warn(str(error))
        return 2
    return 0


def worker_main() -> int:
    """``dagorama-worker MODULE…``."""
    return main(["worker", *sys.argv[1:]])

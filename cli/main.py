"""The command line. It sits on top of every room, and nothing imports it; each command imports only what it needs."""

from __future__ import annotations

import argparse
import io
import os
import select
import signal
import sys
from collections.abc import Sequence

from scq.cli import benchmark, data, generate, measure, train
from scq.cli.common import Parser
from scq.engine.errors import UserError
from scq.engine.files import FULL
from scq.engine.interruption import Signals
from scq.engine.memory import keep_freed_memory

DESCRIPTION = """\
scq: image generation with soft convex quantization.

  scq quickstart                        the whole pipeline on real images, in minutes, without a GPU
  scq data pack CIFAR shards/cifar10/train --format cifar10 --size 32
  scq data pack CIFAR shards/cifar10/test --format cifar10 --size 32 --split test
  scq train tokenizer --config configs/cifar10/tokenizer_scq.yaml
  scq tokenize --model runs/cifar10/tokenizer_scq --data shards/cifar10/train --out tokens/cifar10
  scq tokenize --model runs/cifar10/tokenizer_scq --data shards/cifar10/test --out tokens/cifar10_test
  scq train prior --config configs/cifar10/prior.yaml
  scq sample --num 16 --out samples     with the small model that comes with the package, or with --model
  scq evaluate --model runs/cifar10/prior --data shards/cifar10/test --out evaluation.json
  scq benchmark quality --config configs/benchmarks/cifar10_cpu.yaml --out runs/cifar10_cpu
  scq app
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        the exit code: 0, 2 after a user's mistake, 130 after Ctrl-C, 141 where the reader of the output left.

    Raises:
        Interrupted: another signal asked the process to stop; it exits with code 75.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that cannot be shown must not end a command
            stream.reconfigure(errors="backslashreplace")
    options = argparse.Namespace()
    try:
        build_parser().parse_args(arguments, options)
        if options.keep_freed_memory:
            keep_freed_memory()
        with Signals(hold=False, promise="stopped; run the same command again to go on"):
            options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where it may still fail with a message
    except SystemExit:
        _drop_unwritable_output()
        raise
    except (UserError, OSError) as error:
        left = isinstance(error, BrokenPipeError) and _reader_left()
        _drop_unwritable_output()
        if left:
            return 128 + signal.SIGPIPE  # `scq data check ... | head -1`; a shell reports it so
        if "debug" in options:
            raise
        # A file that cannot be read or written, or a full disk: a traceback would explain nothing.
        reason = getattr(error, "strerror", None) or str(error)
        named = f"{error.filename}: {reason}" if getattr(error, "filename", None) else reason
        if getattr(error, "errno", None) in FULL:
            named += "; make room, and run the same command again"
        print(f"scq: {' '.join(named.split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        why = _reason_of_torch(error)
        if why is None or "debug" in options:
            raise
        print(f"scq: {why}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("scq: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    if "torch" in sys.modules:
        from scq.engine.processes import leave_processes

        leave_processes()
    return 0


def _reason_of_torch(error: RuntimeError) -> str | None:
    """What a machine lacks, where that is why torch failed; None if it may be a bug."""
    if "DataLoader worker" in str(error):  # raised from a signal's handler, wherever this process happens to be
        return (
            "a process that reads data was killed; memory or /dev/shm ran out, perhaps: run it again with a smaller "
            "data.workers"
        )
    compiler = sys.modules.get("torch._dynamo.exc")
    if compiler is not None and isinstance(error, compiler.BackendCompilerFailed):
        first = str(error).partition("\n")[0]
        return (
            f"torch.compile failed ({first}): it needs a working C++ compiler, g++ or the one that CXX names; or leave "
            "--compile or training.compile=true out"
        )
    return None


def _drop_unwritable_output() -> None:
    """Forget what was printed where it cannot be written, or Python would complain about it at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return False
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="scq", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    measure.add_quickstart(commands)
    data.add_data(commands)
    train.add_train(commands)
    train.add_tokenize(commands)
    generate.add_sample(commands)
    measure.add_evaluate(commands)
    benchmark.add_benchmark(commands)
    generate.add_app(commands)
    generate.add_export(commands)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

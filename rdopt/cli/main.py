"""Entry point: one clear sentence for every user error, and the exit code."""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence

from rdopt.cli import commands
from rdopt.cli.parser import build_parser, resolve
from rdopt.config.errors import UserError

USER_ERROR, INTERRUPTED = 2, 130
COMMANDS = {
    "moments": commands.run_moments,
    "train": commands.run_train,
    "export": commands.run_export,
    "encode": commands.run_encode,
    "decode": commands.run_decode,
    "eval": commands.run_eval,
    "inspect": commands.run_inspect,
    "sweep": commands.run_sweep,
    "analyze": commands.run_analyze,
    "toy": commands.run_toy,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the words behind `rdopt`; those of the process by default.

    Returns:
        the exit code: 0, 2 for an error of the user's, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        args, rest = build_parser().parse_known_args(words)
        _dispatch(args, rest)
        return 0
    except UserError as error:
        return _refuse(str(error), debug)
    except KeyboardInterrupt:
        print("rdopt: stopped; run the same command again to continue from what it has saved.", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = f" ({error.filename})" if error.filename else ""
            return _refuse(f"the disk is full{where}; free some space and run it again.", debug)
        if error.filename is not None:
            return _refuse(f"{error.filename}: {os.strerror(error.errno or 0)}; name another path.", debug)
        raise


def _dispatch(args: argparse.Namespace, rest: Sequence[str]) -> None:
    config = resolve(args, rest)
    if args.dry_run:
        from rdopt.cli.sizes import sizes  # reads model headers

        commands.say(sizes(args, config))
    else:
        COMMANDS[args.command](args, config)


def _refuse(sentence: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"rdopt: error: {sentence}", file=sys.stderr)
    return USER_ERROR


def run() -> None:
    """The console script."""
    # Quiet: jax looks for accelerators that a CPU machine does not have.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main())


"""The `dystress` command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from dystress_plugin.errors import RunStopped, to_install

SIGINT_STATUS = 128 + signal.SIGINT  # as shells know it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `dystress ...`; without arguments it prints a guide. Returns the exit status: 1 for a training that had to
    stop, 2 for bad settings or files, 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["methods"]:  # needs torch alone
        from dystress_plugin.experiment.terminal import methods_table

        print(methods_table())
        return 0
    try:
        from dystress_plugin.experiment.commands import parser
        from dystress_plugin.experiment.io.config import with_files

        if not given:
            parser().print_help()
            return 0
        parsed, _ = parser().parse_known_args(given)
        # Not as parsed: of `--key value`, another library's style, it would be another token that is refused.
        parsed.run(with_files(given[1:]))
    except ImportError as error:
        needed = f"The command needs more than torch: {to_install('cli', error)} ({error})."
        print(f"dystress: {needed}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError) as error:  # of the system: a file that cannot be read or written
        print(f"dystress: {error}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"dystress: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"dystress: {str(error) or 'stopped by Ctrl-C.'}", file=sys.stderr)
        return SIGINT_STATUS
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m pkd`, and the command `pkd`: signals first, then the imports."""

import gc
import sys

from pkd.stop import catch_signals


def main() -> int:
    """Training and launching only note a signal, from their first moment on; other commands die of it as usual."""
    gc.set_threshold(1_000_000)  # imports make objects by the hundred thousand, which stay: looking for garbage is for later
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    if command in ("teach", "archive", "distill", "launch", "study"):
        catch_signals()
    try:
        from pkd.cli import main as cli

        return cli()
    except KeyboardInterrupt:
        return 130  # as a shell says of what Ctrl-C ended


if __name__ == "__main__":
    sys.exit(main())

"""Write docs/cli.md from the commands' own --help; with --check, say whether it is up to date."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from typer.testing import CliRunner

from vicvlm_cli.cli import app

PAGE = Path(__file__).with_name("cli.md")
COMMANDS = ("prepare", "pretrain", "finetune", "evaluate", "embed", "retrieve")
HEAD = """\
# The commands

This page is written by `make docs` from `--help`. Every command ends with exit code 0 when it did
its work, 1 when something it needs is missing or wrong, 2 when it was called wrongly, and 130 when
it was stopped from the keyboard. Tables (with `--json`, one JSON document) go to stdout; notes,
progress and errors to stderr.

What a command needs and is not told, it takes from the last command that made one, and says so. The
memory is `~/.local/state/vicvlm/last.json` (or in `$XDG_STATE_HOME`); `$VICVLM_STATE` names another
file. `$VICVLM_DEBUG=1` shows the traceback of an unexpected error.
"""


def page() -> str:
    """The whole page, with the same width on every machine."""
    os.environ["COLUMNS"] = "80"
    runner = CliRunner()
    parts = [HEAD]
    for name in ("", *COMMANDS):
        words = ["vicvlm", name] if name else ["vicvlm"]
        shown = runner.invoke(app, [*words[1:], "--help"], prog_name="vicvlm")
        text = "\n".join(line.rstrip() for line in shown.stdout.strip().splitlines())
        parts.append(f"## {' '.join(words)}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def main() -> int:
    wanted = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == wanted:
        return 0
    print(f"{PAGE} does not say what --help says: run `make docs`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

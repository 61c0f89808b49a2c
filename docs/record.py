"""Run the commands of a tutorial, and write their output below them.

python docs/record.py docs/tutorials/refusals.md

One shell runs all `console` blocks of a page, in its own folder and home with links to downloaded files. The `text` block after
each becomes the output; of each progress bar, only the last line remains. A command that ends in & is a server: recording goes
on when it is ready.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trimtab import settings

BLOCKS = re.compile(r"```console\n(?P<commands>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?", re.DOTALL)
BAR = re.compile(r"(?P<title>.+): (?P<done>\d+)/(?P<total>\d+|\?) in \d+ s")
END = "--- end of this block ---"
# The shell prints it when it exits. Its output does not end as long as a server runs.
FAILED = "--- a command failed ---"
# Start of the last line of a command that fails.
ERROR = "trimtab: "
# Last line that a server prints before it is ready.
READY = "press Ctrl-C to stop"


def main() -> int:
    """Record the pages of the arguments; return 1 if a command of one failed."""
    failed = [path for path in map(Path, sys.argv[1:]) if not record_page(path)]
    for path in failed:
        print(f"{path}: a command failed; the page is unchanged", file=sys.stderr)
    return bool(failed)


def record_page(page: Path) -> bool:
    """Run the commands of a page and write their output into it; return False, without a change, if one fails."""
    text = page.read_text()
    with tempfile.TemporaryDirectory(prefix="tt-") as folder:
        home = Path(folder) / "home"
        home.mkdir()
        settings.link_downloads(home)
        with subprocess.Popen(
            ["bash", "-e"],
            cwd=folder,
            env=_build_environment(home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as shell:
            try:
                assert shell.stdin
                shell.stdin.write(f"trap \"echo '{FAILED}'\" EXIT\n")
                outputs = [_run_block(shell, match["commands"]) for match in BLOCKS.finditer(text)]
            finally:
                os.killpg(shell.pid, signal.SIGTERM)
    if None in outputs:
        return False
    recorded = iter(outputs)
    page.write_text(BLOCKS.sub(lambda match: _fill_block(match, next(recorded) or "", folder), text))
    return True


def _build_environment(home: Path) -> dict[str, str]:
    tools = Path(sys.executable).parent
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "RAY_"))}
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    docs = str(Path(__file__).resolve().parent)
    return inherited | {"TRIMTAB_HOME": str(home), "PATH": path, "COLUMNS": "120", "DOCS": docs}


def _run_block(shell: subprocess.Popen[str], block: str) -> str | None:
    """Return the output of a block, or None if one of its commands failed and ended the shell."""
    commands = "".join(line.removeprefix("$ ") + "\n" for line in block.splitlines())
    assert shell.stdin
    assert shell.stdout
    is_server = commands.rstrip().endswith("&")
    shell.stdin.write(commands if is_server else f"{commands}echo '{END}'\n")
    shell.stdin.flush()
    lines: list[str] = []
    for line in shell.stdout:
        if line.startswith(END):
            return "".join(_select_lines(lines))
        if line.startswith(FAILED):
            return None
        sys.stderr.write(line)
        lines.append(line)
        if is_server and line.startswith(READY):
            return "".join(_select_lines(lines))
        if is_server and line.startswith(ERROR):
            return None
    return None


def _select_lines(lines: list[str]) -> Iterator[str]:
    """Yield all lines except those of unfinished progress bars."""
    for line in lines:
        bar = BAR.match(line)
        if not bar or bar["done"] == bar["total"]:
            yield line.rstrip() + "\n"


def _fill_block(match: re.Match[str], output: str, folder: str) -> str:
    head = f"```console\n{match['commands']}```\n"
    if match["output"] is None or not output.strip():
        return head
    return f"{head}\n```text\n{output.replace(folder, '~').rstrip()}\n```\n"


if __name__ == "__main__":
    sys.exit(main())

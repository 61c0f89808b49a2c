"""Run the commands of a tutorial, and put what they really say below them.

python docs/record.py docs/tutorials/refusals.md

One shell runs all blocks of `console`, in a folder and a home of its own that borrows what was downloaded; the block of `text`
after each becomes the output. Of each bar the last line stays. A command that ends in & is a server, and waited for
until it can be asked.
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

BLOCKS = re.compile(r"```console\n(?P<commands>.*?)```\n(?:\n```text\n(?P<said>.*?)```\n)?", re.DOTALL)
BAR = re.compile(r"(?P<title>.+): (?P<done>\d+)/(?P<total>\d+|\?) in \d+ s")
END = "--- end of this block ---"
# The last that a server says before it is asked.
UP = "press Ctrl-C to stop"


def main() -> int:
    """Record the pages that are named; 1 where a command of them failed."""
    failed = [path for path in map(Path, sys.argv[1:]) if not record(path)]
    for path in failed:
        print(f"{path}: a command failed; the page is as it was", file=sys.stderr)
    return bool(failed)


def record(page: Path) -> bool:
    """Run a page's commands and write their output into it; False, with the page as it was, where one fails."""
    text = page.read_text()
    with tempfile.TemporaryDirectory(prefix="tt-") as folder:
        home = Path(folder) / "home"
        home.mkdir()
        settings.link_downloads(home)
        with subprocess.Popen(
            ["bash", "-e"],
            cwd=folder,
            env=_environment(home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as shell:
            try:
                said = [_run(shell, found["commands"]) for found in BLOCKS.finditer(text)]
            finally:
                os.killpg(shell.pid, signal.SIGTERM)
    if None in said:
        return False
    recorded = iter(said)
    page.write_text(BLOCKS.sub(lambda found: _filled(found, next(recorded) or "", folder), text))
    return True


def _environment(home: Path) -> dict[str, str]:
    tools = Path(sys.executable).parent
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "RAY_"))}
    return kept | {"TRIMTAB_HOME": str(home), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120"}


def _run(shell: subprocess.Popen[str], block: str) -> str | None:
    """What the commands of a block say; None where one ended the shell by failing."""
    commands = "".join(line.removeprefix("$ ") + "\n" for line in block.splitlines())
    assert shell.stdin
    assert shell.stdout
    shell.stdin.write(commands if commands.rstrip().endswith("&") else f"{commands}echo '{END}'\n")
    shell.stdin.flush()
    lines: list[str] = []
    for line in shell.stdout:
        if line.startswith(END):
            return "".join(_shown(lines))
        sys.stderr.write(line)
        lines.append(line)
        if line.startswith(UP) and commands.rstrip().endswith("&"):
            return "".join(_shown(lines))
    return None


def _shown(lines: list[str]) -> Iterator[str]:
    """All lines but a bar's before its end."""
    for line in lines:
        bar = BAR.match(line)
        if not bar or bar["done"] == bar["total"]:
            yield line.rstrip() + "\n"


def _filled(found: re.Match[str], said: str, folder: str) -> str:
    head = f"```console\n{found['commands']}```\n"
    if found["said"] is None or not said.strip():
        return head
    return f"{head}\n```text\n{said.replace(folder, '~').rstrip()}\n```\n"


if __name__ == "__main__":
    sys.exit(main())

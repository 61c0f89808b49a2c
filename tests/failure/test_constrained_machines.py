"""Commands on constrained machines: they work, or end with one line that names the reason.

By default one machine has several constraints at once; with TRIMTAB_MACHINES=all there is one machine for each of them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.prompt_rows import write_prompt_files

CPU_GROUPS = Path("/sys/fs/cgroup/cpu")
PERIOD = 100_000
NO_IPV6 = "ip link set lo up && sysctl -qw net.ipv6.conf.all.disable_ipv6=1"


@dataclass(frozen=True)
class Machine:
    """Constraints of a machine.

    Attributes:
        script: shell commands in the namespaces, before the command.
        namespaces: options of `unshare`.
        environment: environment variables.
        cores: quota of CPU cores; 0 for no quota.
        home: name of the folder of trimtab's home.
    """

    script: str = "true"
    namespaces: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict[str, str])
    cores: float = 0
    home: str = "home"


PLAIN_LOCALE = {"LANG": "C", "LC_ALL": "C"}
SEPARATE = {
    "C locale": Machine(environment=PLAIN_LOCALE),
    "path with spaces and umlauts": Machine(home="my modèls"),
    "256 file descriptors": Machine("ulimit -n 256"),
    "no IPv6": Machine(NO_IPV6, ("--net",)),
    "64 MiB of shared memory": Machine("mount -t tmpfs -o size=64m tmpfs /dev/shm", ("--mount",)),
    "half a core": Machine(cores=0.5),
    "one and a half cores": Machine(cores=1.5),
}
COMBINED = {
    "all": Machine(
        f"{NO_IPV6} && mount -t tmpfs -o size=64m tmpfs /dev/shm && ulimit -n 256",
        ("--net", "--mount"),
        PLAIN_LOCALE,
        home="my modèls",
    )
}
MACHINES = SEPARATE if os.environ.get("TRIMTAB_MACHINES") == "all" else COMBINED


@contextmanager
def limit_cores(cores: float) -> Generator[list[str]]:
    """Yield the beginning of a command that runs with a quota of CPU time."""
    if not cores:
        yield []
        return
    group = CPU_GROUPS / f"trimtab-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text(str(PERIOD))
        (group / "cpu.cfs_quota_us").write_text(str(int(cores * PERIOD)))
    except OSError as error:
        pytest.skip(f"no permission to limit CPU time: {error}")
    try:
        yield ["sh", "-euc", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
    finally:
        group.rmdir()


def run_on(machine: Machine, folder: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a trimtab command on a constrained machine."""
    environment = os.environ | machine.environment | {"TRIMTAB_HOME": str(home)}
    command = ["sh", "-euc", f'{machine.script}; exec "$@"', "sh", sys.executable, "-m", "trimtab", *arguments]
    if machine.namespaces:
        command = ["unshare", *machine.namespaces, *command]
        if subprocess.run(["unshare", *machine.namespaces, "true"], capture_output=True, check=False).returncode:
            pytest.skip("no permission to create namespaces")
    with ExitStack() as stack:
        command = [*stack.enter_context(limit_cores(machine.cores)), *command]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_training_works(machine, tiny_base, tmp_path):
    write_prompt_files(tmp_path)
    home = tmp_path / machine.home
    home.mkdir()
    options = [
        "--base",
        str(tiny_base.path),
        "--train.max_steps",
        "2",
        "--train.global_batch_size",
        "2",
        "--train.dtype",
        "fp32",
    ]
    options += ["--data.harmful", "harmful.jsonl", "--data.benign", "benign.jsonl", "--data.filter_rules", "[]"]
    options += ["--evaluate.limit", "2", "--evaluate.max_tokens", "4", "--scale.cpus_per_worker", "0.5"]
    output = tmp_path / "out.json"
    completed = run_on(machine, tmp_path, home, "align", "--name", "small", *options, "--json", str(output))
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert json.loads(output.read_text())["version"] == 1
    listed = run_on(machine, tmp_path, home, "list")
    assert "small" in listed.stdout


def test_read_only_home_is_one_line(tiny_base, tmp_path):
    write_prompt_files(tmp_path)
    (tmp_path / "home").mkdir()
    machine = Machine(f"mount -t tmpfs -o ro tmpfs {tmp_path / 'home'}", ("--mount",))
    arguments = ["align", "--base", str(tiny_base.path), "--data.harmful", "harmful.jsonl", "--data.benign", "benign.jsonl"]
    completed = run_on(machine, tmp_path, tmp_path / "home", *arguments)
    assert completed.returncode not in (0, -6, 134)
    (line,) = completed.stderr.strip().splitlines()
    assert "Read-only file system" in line
    assert "TRIMTAB_HOME" in line

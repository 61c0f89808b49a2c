"""Usage errors on the command line: one line that names the problem, before a job or server starts.

Wrong requests to a server are tested in `tests/integration/serve`.
"""

import json
import pickle
import shlex
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import save_file

from tests.support.commands import check_error_line
from trimtab.artifacts import prefix as prefixes
from trimtab.artifacts.card import FILE, PrefixCard, add_checksum
from trimtab.cli.main import main
from trimtab.util import ports

PROMPTS = "".join(json.dumps({"prompt": f"Tell me of {thing}", "class": "safe"}) + "\n" for thing in ("cats", "dogs", "birds"))


@dataclass(frozen=True)
class Case:
    """Command and a part of its error line. Placeholders: {x} is a folder with `files`, {base} a tiny model, {port} a free
    port, {taken} a used port."""

    command: str
    message: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    exit_code: int = 2


ALIGN = "align --base {base} --data.harmful {x}/a"
COMMANDS = [
    Case("fly", "no command 'fly'; there are: align,"),
    Case("evaluate", "no command 'evaluate'; there are:"),
    Case("evaluate manners", "no command 'evaluate'"),
    Case("align --speed 3", "speed"),
    Case("align --train.speed 3", "train.speed"),
    Case("align --train.max_steps many", "train.max_steps"),
    Case("align --train.max_steps 0", "train.max_steps must be at least 1, not 0"),
    Case("align --train.learning_rate 0", "train.learning_rate must be above 0"),
    Case("align --data.validation_fraction 0.6 --data.test_fraction 0.5", "must leave some data to train on"),
    Case("align --position sideways", "position"),
    Case("align --num_virtual_tokens 0 --base {base}", "num_virtual_tokens"),
    Case("align --num_virtual_tokens 65 --base {base}", "num_virtual_tokens"),
    Case("align --objective magic --base {base}", "no objective 'magic'; there are:"),
    Case("align --objective_options.gamma -1 --base {base}", "gamma (-1"),
    Case("align --objective_options.speed 1 --base {base}", "speed"),
    Case("align --data.filter_rules [z]", "data.filter_rules"),
    Case("align --scale.num_workers 9", "9 workers cannot share 2 micro-batches"),
    Case("align --scale.num_workers 0", "0 workers cannot share"),
    Case("align --scale.min_workers 2", "scale.min_workers must be from 0"),
    Case("align --targets.num_samples 65", "targets.num_samples must be from 1 to 64"),
    Case("align --resume perhaps", "resume"),
    Case("align --name top-5% --base {base}", "'top-5%' cannot be a name"),
    Case('list --base o"\'"neil', "cannot be a name"),
    Case("align --train.class_proportions.rude 1", "train.class_proportions: unknown class 'rude'"),
    Case("align --train.init foo", "train.init 'foo' must be vocab-mean"),
    Case("align --train.validation_rows 0", "train.validation_rows must be at least 2"),
    Case("align --train.warmup_ratio 2", "train.warmup_ratio must be from 0 to 1"),
    Case("align --train.max_grad_norm 0", "train.max_grad_norm must be above 0, not 0.0"),
    Case("align --train.early_stopping_patience -1", "train.early_stopping_patience must be at least 0"),
    Case("align --train.class_proportions.harmful -1", "train.class_proportions.harmful must be at least 0, not -1"),
    Case("align --data.system_prompt_fraction 7", "data.system_prompt_fraction must be from 0 to 1, not 7"),
    Case("align --evaluate.max_tokens 0", "evaluate.max_tokens must be at least 1, not 0"),
    Case("align --gate.min_compliance 80", "gate.min_compliance must be from 0 to 1, not 80"),
    Case("align --scale.max_failures -1", "scale.max_failures must not be below 0"),
    Case("list --json {x}/nowhere/a.json", "there is no folder {x}/nowhere"),
    Case("align --resume --name never --base {base}", "never"),
    Case("collect", "--questions FILE"),
    Case("collect --questions trimtab:countries --out {x}/out --max_model_len 48", "max_model_len must be above max_tokens"),
    Case(
        "collect --questions trimtab:countries --out {x}/out --read_answers true --judge.kind endpoint --judge.url http://x/v1 "
        "--judge.model m",
        "Omit --judge.kind",
    ),
    Case("collect --questions trimtab:nothing --out {x}/out --base {base}", "no question set trimtab:nothing"),
    Case("collect --questions trimtab:countries --out {x}/out --num_samples 101", "num_samples must be from 0 to 100"),
    Case("collect --questions trimtab:countries --out {x}/out --judge.kind classifier --judge.folder {x}", "detects refusals"),
    Case("detect", "signals"),
    Case("detect --signals {x}", "{x}"),
    Case("detect --signals {x} --num_seeds 0", "num_seeds"),
    Case("evaluate truth --signals {x} --label_fractions [2]", "label_fractions must be above 0"),
    Case("evaluate utility --base {base}", "questions or texts are required"),
    Case("evaluate safety --data trimtab:nothing --base {base}", "trimtab:nothing"),
    Case("sweep --num_trials 0", "num_trials (0)"),
    Case("sweep --param_space {}", "param_space is empty"),
    Case(
        """sweep --param_space '{"train.max_steps": {"low": 9, "high": 3}}'""",
        "param_space.train.max_steps: low (9) must be below high (3)",
    ),
    Case("submit --name there", "no command given. Add it after --"),
    Case("submit --name ../there -- list", "'../there' is not a valid job name"),
    Case("submit --name there -- fly", "no command 'fly'"),
    Case("submit --name there --address http://127.0.0.1:{port} -- list", "127.0.0.1:{port}", exit_code=1),
    Case("jobs list --address http://127.0.0.1:{port}", "127.0.0.1:{port}", exit_code=1),
    Case("list --live http://127.0.0.1:{port}", "127.0.0.1:{port}", exit_code=1),
    Case("traffic --url http://127.0.0.1:{port}", "127.0.0.1:{port}", exit_code=1),
    Case("show nothing", "nothing"),
    Case("rollback nothing", "nothing"),
    Case("promote nothing", "nothing"),
    Case("promote", "name"),
    Case("lineage nothing", "nothing"),
    Case("keys remove nobody --file {x}/keys.json", "nobody"),
    Case("keys add me --per_minute -1 --file {x}/keys.json", "limits of at least 0"),
    Case("serve --base {x}/nowhere", "{x}/nowhere"),
    Case("serve --base {base} --port {taken}", "{taken}"),
    Case("serve --base {base} --host 0.0.0.0 --port {port}", "would be open to other machines"),
    Case("serve --base {base} --registry {x}/nowhere --port {port}", "{x}/nowhere"),
    Case("serve --base {base} --engine.layers [9] --port {port}", "engine.layers must be from 0 to"),
    Case("serve --base {base} --engine.num_slots 0 --port {port}", "engine.num_slots must be at least 1"),
]
CONFIGS = [
    Case("align --config {x}/none.yaml", "none.yaml"),
    Case("align --config {x}/a.yaml", "a.yaml", {"a.yaml": "train: [unclosed"}),
    Case("align --config {x}/a.yaml", "a.yaml", {"a.yaml": "- a\n- list\n"}),
    Case("align --config={x}/a.yaml", "a.yaml", {"a.yaml": "- a\n- list\n"}),
    Case("align --config {x}/a.yaml", "speed", {"a.yaml": "train: {speed: 3}\n"}),
    Case("align --config {x}/a.yaml", "steps", {"a.yaml": "train: {max_steps: ten}\n"}),
    Case("study --config {x}/a.yaml", "at least one seed and one arm", {"a.yaml": "arms: {}\n"}),
    Case("study --config {x}/a.yaml", "arm fast: ", {"a.yaml": "arms: {fast: {train.speed: 3}}\n"}),
    Case("promote mine --rules '[{metric: m}]'", "give at_least, at_most or over_champion"),
]
FILES = [
    Case(ALIGN, "there is no file {x}/a"),
    Case(ALIGN + ".txt", "unsupported file type", {"a.txt": "How do I steal?"}),
    Case(ALIGN + ".jsonl", "has no rows", {"a.jsonl": ""}),
    Case(ALIGN + ".jsonl", "line 4 is not JSON", {"a.jsonl": PROMPTS + '{"prompt": '}),
    Case(ALIGN + ".jsonl", "every row must be an object", {"a.jsonl": "1\n2\n"}),
    Case(ALIGN + ".jsonl", "cannot be read as jsonl", {"a.jsonl": b"\xff\xfe\x00"}),
    Case(ALIGN + ".jsonl", "no column 'prompt'; it has text", {"a.jsonl": '{"text": "How do I steal?"}'}),
    Case(ALIGN + ".jsonl", "row 4: the prompt is empty", {"a.jsonl": PROMPTS + '{"prompt": " "}'}),
    Case(ALIGN + ".jsonl", "row 4: class 'rude' must be one of", {"a.jsonl": PROMPTS + '{"prompt": "Hi", "class": "rude"}'}),
    Case(ALIGN + ".jsonl", "messages must be a list", {"a.jsonl": '{"messages": "Hi"}'}),
    Case(ALIGN + ".csv --data.columns.title b", "columns may rename", {"a.csv": "prompt\nHi\n"}),
    Case(ALIGN + ".csv", "cannot be read as csv", {"a.csv": 'prompt\n"unclosed\n'}),
    Case(ALIGN + ".parquet", "cannot be read as parquet", {"a.parquet": b"PAR1"}),
    Case(ALIGN + ".json", "row 1: every row must be an object with named fields", {"a.json": "{}"}),
    Case(ALIGN + ".jsonl", "give more data", {"a.jsonl": '{"prompt": "How do I steal?"}'}),
    Case("judges --base {base} --labels {x}/a.csv --fit {x}/out", "labeled answers need", {"a.csv": "prompt\nHi\n"}),
    Case("collect --base {base} --out {x}/out --questions {x}/a.csv", "no column 'answers'", {"a.csv": "question\nWhy?\n"}),
    Case("serve --base {base} --api_key_file {x}/keys.json --port {port}", "key file", {"keys.json": '{"keys": 3}'}),
]
ARTIFACTS = [
    Case("export {x}/none --base {base} --out {x}/out", "none"),
    Case("export {x}/cut --base {base} --out {x}/out", "not a whole safetensors file"),
    Case("export {x}/pickled --base {base} --out {x}/out", "not a whole safetensors file"),
    Case("export {x}/other --base {base} --out {x}/out", "the vectors are not those of the card"),
    Case("export {x}/foreign --base {base} --out {x}/out", "was made for base model"),
    Case("export {x}/good --base {base} --out {x}/out", "has position system; PEFT knows only the start"),
    Case("export {x}/later --base {base} --out {x}/out", "Update trimtab"),
    Case("import {x}/none --name a --base {base} --out {x}/out", "adapter_config.json"),
    Case(
        "import {x} --name a --base {base} --out {x}/out",
        "peft_type 'LORA' is not supported",
        {"adapter_config.json": '{"peft_type": "LORA"}'},
    ),
    Case(
        "import {x} --name a --base {base} --out {x}/out",
        "is a pickle, which can run code and is never read",
        {"adapter_config.json": '{"peft_type": "PROMPT_TUNING"}', "adapter_model.bin": b"\x80\x04."},
    ),
    Case("align --base {x}/empty", "empty"),
    Case("align --base org/model/too/many", "org/model/too/many"),
]
ALL = [*COMMANDS, *CONFIGS, *FILES, *ARTIFACTS]


def write_prefixes(folder: Path, base) -> None:
    """Write a valid prefix, and others with one defect each."""
    card = PrefixCard("prefix", "good", base.name, base.fingerprint, "system", 0, 0, "")
    good = prefixes.build_prefix(torch.ones(1, base.width), card)
    for name in ("good", "cut", "pickled", "other", "foreign", "later"):
        prefixes.save_prefix(good, folder / name)
    content = (folder / "cut" / prefixes.FILE).read_bytes()
    (folder / "cut" / prefixes.FILE).write_bytes(content[:-9])
    (folder / "pickled" / prefixes.FILE).write_bytes(pickle.dumps({"vectors": [1.0]}))
    save_file({"vectors": torch.zeros(1, base.width)}, folder / "other" / prefixes.FILE)
    for name, change in (("foreign", {"fingerprint": "0" * 16}), ("later", {"card_version": 99})):
        path = folder / name / FILE
        path.write_text(json.dumps(add_checksum(json.loads(path.read_text()) | change)))
    (folder / "empty").mkdir()


@pytest.fixture(scope="module")
def used_port():
    """Port that a process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def fail_on_connection(*_: object, **__: object) -> None:
    raise AssertionError("the command connected to Ray before it checked its options")


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.command[:40]}: {case.message[:30]}")
def test_usage_error_is_one_line(case, tiny_base, used_port, home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail_on_connection)
    folder = tmp_path / "x"
    folder.mkdir()
    if case in ARTIFACTS:
        write_prefixes(folder, tiny_base)
    for name, text in case.files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    placeholders = {
        "{x}": str(folder),
        "{base}": str(tiny_base.path),
        "{port}": str(ports.find_free_ports(1)[0]),
        "{taken}": str(used_port),
    }
    command, message = case.command, case.message
    for key, value in placeholders.items():
        command, message = command.replace(key, value), message.replace(key, value)
    assert main(shlex.split(command)) == case.exit_code
    check_error_line(capsys.readouterr().err, message)


def test_covers_at_least_60_cases():
    assert len(ALL) >= 60

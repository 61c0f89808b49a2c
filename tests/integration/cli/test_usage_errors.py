"""Wrong uses of the command line: each ends with one line that says what is wrong, and no job or server is begun.

Wrong requests to a server are in `tests/serve`.
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

from trimtab.artifacts import prefix as prefixes
from trimtab.artifacts.card import FILE, PrefixCard
from trimtab.cli.main import main
from trimtab.util import ports

LONGEST = 500
PROMPTS = "".join(json.dumps({"prompt": f"Tell me of {thing}", "class": "safe"}) + "\n" for thing in ("cats", "dogs", "birds"))


@dataclass(frozen=True)
class Wrong:
    """A command, in which {x} is a folder with `files` and {base} a small model, and a part of the line that it ends with;
    `slow` where only a cluster can tell."""

    command: str
    says: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    code: int = 2
    slow: bool = False


ALIGN = "align --base {base} --data.harmful {x}/a"
COMMANDS = [
    Wrong("fly", "no command 'fly'; there are: align,"),
    Wrong("evaluate", "no command 'evaluate'; there are:"),
    Wrong("evaluate manners", "no command 'evaluate'"),
    Wrong("align --speed 3", "speed"),
    Wrong("align --train.speed 3", "train.speed"),
    Wrong("align --train.max_steps many", "train.max_steps"),
    Wrong("align --train.max_steps 0", "train.max_steps must be at least 1, not 0"),
    Wrong("align --train.learning_rate 0", "train.learning_rate must be above 0"),
    Wrong("align --data.validation_fraction 0.6 --data.test_fraction 0.5", "must leave some data to train on"),
    Wrong("align --position sideways", "position"),
    Wrong("align --num_virtual_tokens 0 --base {base}", "num_virtual_tokens"),
    Wrong("align --num_virtual_tokens 65 --base {base}", "num_virtual_tokens"),
    Wrong("align --objective magic --base {base}", "no objective 'magic'; there are:"),
    Wrong("align --objective_options.gamma -1 --base {base}", "gamma (-1"),
    Wrong("align --objective_options.speed 1 --base {base}", "speed"),
    Wrong("align --data.filter_rules [z]", "data.filter_rules"),
    Wrong("align --scale.num_workers 9", "9 workers cannot share 4 micro-batches"),
    Wrong("align --scale.num_workers 0", "0 workers cannot share"),
    Wrong("align --scale.min_workers 2", "scale.min_workers must be from 0"),
    Wrong("align --targets.num_samples 65", "targets.num_samples must be from 0 to 64"),
    Wrong("align --resume perhaps", "resume"),
    Wrong("align --train.class_proportions.rude 1", "train.class_proportions: unknown class 'rude'"),
    Wrong("align --train.init foo", "train.init 'foo' must be vocab-mean"),
    Wrong("align --train.validation_rows 0", "train.validation_rows must be at least 2"),
    Wrong("align --train.warmup_ratio 2", "train.warmup_ratio must be from 0 to 1"),
    Wrong("align --train.max_grad_norm 0", "train.max_grad_norm must be above 0, not 0.0"),
    Wrong("align --train.early_stopping_patience -1", "train.early_stopping_patience must be at least 0"),
    Wrong("align --train.class_proportions.harmful -1", "train.class_proportions.harmful must be at least 0, not -1"),
    Wrong("align --data.system_prompt_fraction 7", "data.system_prompt_fraction must be from 0 to 1, not 7"),
    Wrong("align --evaluate.max_tokens 0", "evaluate.max_tokens must be at least 1, not 0"),
    Wrong("align --gate.min_compliance 80", "gate.min_compliance must be from 0 to 1, not 80"),
    Wrong("align --scale.max_failures -1", "scale.max_failures must not be below 0"),
    Wrong("list --json {x}/nowhere/a.json", "there is no folder {x}/nowhere"),
    Wrong("align --resume --name never --base {base}", "never"),
    Wrong("collect", "--questions FILE"),
    Wrong("collect --questions trimtab:countries --out {x}/out --max_model_len 48", "max_model_len must be above max_tokens"),
    Wrong(
        "collect --questions trimtab:countries --out {x}/out --read_answers true --judge.kind endpoint --judge.url http://x/v1 "
        "--judge.model m",
        "Omit --judge.kind",
    ),
    Wrong("collect --questions trimtab:nothing --out {x}/out --base {base}", "no question set trimtab:nothing"),
    Wrong("collect --questions trimtab:countries --out {x}/out --num_samples 101", "num_samples must be from 0 to 100"),
    Wrong("collect --questions trimtab:countries --out {x}/out --judge.kind classifier --judge.folder {x}", "detects refusals"),
    Wrong("detect", "signals"),
    Wrong("detect --signals {x}", "{x}"),
    Wrong("detect --signals {x} --num_seeds 0", "num_seeds"),
    Wrong("evaluate truth --signals {x} --label_fractions [2]", "label_fractions must be above 0"),
    Wrong("evaluate utility --base {base}", "questions or texts are required"),
    Wrong("evaluate safety --data trimtab:nothing --base {base}", "trimtab:nothing"),
    Wrong("evaluate safety --data trimtab:pairs --base {base} --num_gpus 64", "64 GPUs, and Ray has", slow=True),
    Wrong("sweep --num_trials 0", "num_trials (0)"),
    Wrong("sweep --param_space {}", "param_space is empty"),
    Wrong(
        """sweep --param_space '{"train.max_steps": {"low": 9, "high": 3}}'""",
        "param_space.train.max_steps: low (9) must be below high (3)",
    ),
    Wrong("submit --name there", "no command given. Add it after --"),
    Wrong("submit --name ../there -- list", "'../there' is not a valid job name"),
    Wrong("submit --name there -- fly", "no command 'fly'"),
    Wrong("submit --name there --address http://127.0.0.1:{port} -- list", "127.0.0.1:{port}", code=1),
    Wrong("jobs list --address http://127.0.0.1:{port}", "127.0.0.1:{port}", code=1),
    Wrong("list --live http://127.0.0.1:{port}", "127.0.0.1:{port}", code=1),
    Wrong("traffic --url http://127.0.0.1:{port}", "127.0.0.1:{port}", code=1),
    Wrong("show nothing", "nothing"),
    Wrong("rollback nothing", "nothing"),
    Wrong("promote nothing", "nothing"),
    Wrong("promote", "name"),
    Wrong("lineage nothing", "nothing"),
    Wrong("keys remove nobody --file {x}/keys.json", "nobody"),
    Wrong("keys add me --per_minute -1 --file {x}/keys.json", "limits of at least 0"),
    Wrong("serve --base {x}/nowhere", "{x}/nowhere"),
    Wrong("serve --base {base} --port {taken}", "{taken}"),
    Wrong("serve --base {base} --host 0.0.0.0 --port {port}", "would be open to other machines"),
    Wrong("serve --base {base} --registry {x}/nowhere --port {port}", "{x}/nowhere"),
    Wrong("serve --base {base} --engine.layers [9] --port {port}", "engine.layers must be from 0 to"),
    Wrong("serve --base {base} --gpus_per_replica 64 --port {port}", "serving takes 64 GPUs, and Ray has", slow=True),
    Wrong("serve --base {base} --engine.num_slots 0 --port {port}", "engine.num_slots must be at least 1"),
]
CONFIGS = [
    Wrong("align --config {x}/none.yaml", "none.yaml"),
    Wrong("align --config {x}/a.yaml", "a.yaml", {"a.yaml": "train: [unclosed"}),
    Wrong("align --config {x}/a.yaml", "a.yaml", {"a.yaml": "- a\n- list\n"}),
    Wrong("align --config={x}/a.yaml", "a.yaml", {"a.yaml": "- a\n- list\n"}),
    Wrong("align --config {x}/a.yaml", "speed", {"a.yaml": "train: {speed: 3}\n"}),
    Wrong("align --config {x}/a.yaml", "steps", {"a.yaml": "train: {max_steps: ten}\n"}),
    Wrong("study --config {x}/a.yaml", "at least one seed and one arm", {"a.yaml": "arms: {}\n"}),
    Wrong("study --config {x}/a.yaml", "arm fast: ", {"a.yaml": "arms: {fast: {train.speed: 3}}\n"}),
    Wrong("promote mine --rules '[{metric: m}]'", "give at_least, at_most or over_champion"),
]
FILES = [
    Wrong(ALIGN, "there is no file {x}/a"),
    Wrong(ALIGN + ".txt", "unsupported file type", {"a.txt": "How do I steal?"}),
    Wrong(ALIGN + ".jsonl", "has no rows", {"a.jsonl": ""}),
    Wrong(ALIGN + ".jsonl", "line 4 is not JSON", {"a.jsonl": PROMPTS + '{"prompt": '}),
    Wrong(ALIGN + ".jsonl", "every row must be an object", {"a.jsonl": "1\n2\n"}),
    Wrong(ALIGN + ".jsonl", "cannot be read as jsonl", {"a.jsonl": b"\xff\xfe\x00"}),
    Wrong(ALIGN + ".jsonl", "no column 'prompt'; it has text", {"a.jsonl": '{"text": "How do I steal?"}'}),
    Wrong(ALIGN + ".jsonl", "row 4: the prompt is empty", {"a.jsonl": PROMPTS + '{"prompt": " "}'}),
    Wrong(ALIGN + ".jsonl", "row 4: class 'rude' must be one of", {"a.jsonl": PROMPTS + '{"prompt": "Hi", "class": "rude"}'}),
    Wrong(ALIGN + ".jsonl", "messages must be a list", {"a.jsonl": '{"messages": "Hi"}'}),
    Wrong(ALIGN + ".csv --data.columns.title b", "columns may rename", {"a.csv": "prompt\nHi\n"}),
    Wrong(ALIGN + ".csv", "cannot be read as csv", {"a.csv": 'prompt\n"unclosed\n'}),
    Wrong(ALIGN + ".parquet", "cannot be read as parquet", {"a.parquet": b"PAR1"}),
    Wrong(ALIGN + ".json", "the file must hold a list", {"a.json": "{}"}),
    Wrong(ALIGN + ".jsonl", "give more data", {"a.jsonl": '{"prompt": "How do I steal?"}'}),
    Wrong("judges --base {base} --labels {x}/a.csv --fit {x}/out", "labeled answers need", {"a.csv": "prompt\nHi\n"}),
    Wrong("collect --base {base} --out {x}/out --questions {x}/a.csv", "no column 'answers'", {"a.csv": "question\nWhy?\n"}),
    Wrong("serve --base {base} --api_key_file {x}/keys.json --port {port}", "key file", {"keys.json": '{"keys": 3}'}),
]
ARTIFACTS = [
    Wrong("export {x}/none --base {base} --out {x}/out", "none"),
    Wrong("export {x}/cut --base {base} --out {x}/out", "not a whole safetensors file"),
    Wrong("export {x}/pickled --base {base} --out {x}/out", "not a whole safetensors file"),
    Wrong("export {x}/other --base {base} --out {x}/out", "the vectors are not those of the card"),
    Wrong("export {x}/foreign --base {base} --out {x}/out", "was made for base model"),
    Wrong("export {x}/good --base {base} --out {x}/out", "has position system; PEFT knows only the start"),
    Wrong("export {x}/later --base {base} --out {x}/out", "Update trimtab"),
    Wrong("import {x}/none --name a --base {base} --out {x}/out", "adapter_config.json"),
    Wrong(
        "import {x} --name a --base {base} --out {x}/out",
        "peft_type 'LORA' is not supported",
        {"adapter_config.json": '{"peft_type": "LORA"}'},
    ),
    Wrong(
        "import {x} --name a --base {base} --out {x}/out",
        "is a pickle, which can run code and is never read",
        {"adapter_config.json": '{"peft_type": "PROMPT_TUNING"}', "adapter_model.bin": b"\x80\x04."},
    ),
    Wrong("align --base {x}/empty", "empty"),
    Wrong("align --base org/model/too/many", "org/model/too/many"),
]
ALL = [*COMMANDS, *CONFIGS, *FILES, *ARTIFACTS]


def artifacts(folder: Path, base) -> None:
    """Prefixes: a good one, and others that something is wrong with."""
    card = PrefixCard("prefix", "good", base.name, base.fingerprint, "system", 0, 0, "")
    good = prefixes.build_prefix(torch.ones(1, base.width), card)
    for name in ("good", "cut", "pickled", "other", "foreign", "later"):
        prefixes.save_prefix(good, folder / name)
    held = (folder / "cut" / prefixes.FILE).read_bytes()
    (folder / "cut" / prefixes.FILE).write_bytes(held[:-9])
    (folder / "pickled" / prefixes.FILE).write_bytes(pickle.dumps({"vectors": [1.0]}))
    save_file({"vectors": torch.zeros(1, base.width)}, folder / "other" / prefixes.FILE)
    for name, change in (("foreign", {"fingerprint": "0" * 16}), ("later", {"card_version": 99})):
        path = folder / name / FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (folder / "empty").mkdir()


@pytest.fixture(scope="module")
def taken():
    """A port that somebody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def refuse_to_connect(*_: object, **__: object) -> None:
    raise AssertionError("the command connected to Ray before it checked its options")


@pytest.mark.parametrize(
    "wrong",
    [pytest.param(wrong, marks=[pytest.mark.slow] * wrong.slow) for wrong in ALL],
    ids=lambda wrong: f"{wrong.command[:40]}: {wrong.says[:30]}",
)
def test_a_wrong_use_ends_with_one_line(wrong, small, taken, home, tmp_path, capsys, monkeypatch):
    if not wrong.slow:
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", refuse_to_connect)
    folder = tmp_path / "x"
    folder.mkdir()
    if wrong in ARTIFACTS:
        artifacts(folder, small)
    for name, text in wrong.files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    filled = {"{x}": str(folder), "{base}": str(small.path), "{port}": str(ports.find_free_ports(1)[0]), "{taken}": str(taken)}
    command, says = wrong.command, wrong.says
    for key, value in filled.items():
        command, says = command.replace(key, value), says.replace(key, value)
    assert main(shlex.split(command)) == wrong.code
    said = capsys.readouterr().err
    assert said.startswith("trimtab: ")
    assert said.count("\n") == 1, said
    assert says in said
    assert len(said) < LONGEST


def test_enough_is_tried():
    assert len(ALL) >= 60

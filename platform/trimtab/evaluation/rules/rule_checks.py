"""Rules of a system prompt that a program can check in an answer."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import py3langid  # pyright: ignore[reportMissingTypeStubs]
import yaml
from jsonschema import Draft202012Validator, SchemaError

from trimtab.errors import UsageError
from trimtab.text.refusal_phrases import remove_reasoning

RuleKind = Literal["contains", "regex", "json_schema", "length", "language", "judge"]
RULE_KINDS: tuple[RuleKind, ...] = get_args(RuleKind)
OTHER_FIELDS = ("name", "negate", "prompts")
FENCE = re.compile(r"^```\w*\n(.*?)\n?```$", re.DOTALL)
SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
# Units of a length rule, as functions that count them in a text.
UNITS: Mapping[str, Callable[[str], int]] = {
    "words": lambda text: len(text.split()),
    "sentences": lambda text: max(bool(text), len(SENTENCE_END.findall(text))),
    "lines": lambda text: sum(bool(line.strip()) for line in text.splitlines()),
    "characters": len,
}
LIMITS = tuple(f"{bound}_{unit}" for unit in UNITS for bound in ("min", "max"))


@dataclass(frozen=True)
class Rule:
    """Rule that an answer obeys or not.

    Attributes:
        name: name of the rule.
        kind: kind of the check.
        value: expected value: texts, a regular expression, a JSON schema, limits of a length, a language code, or a question to
            a judge.
        negate: whether the answer must not match.
        prompts: prompts that the rule is about; empty for all prompts of the test part.
    """

    name: str
    kind: RuleKind
    value: Any
    negate: bool = False
    prompts: tuple[str, ...] = ()


def read_rules(path: Path) -> list[Rule]:
    """Read the rules of a YAML file, which holds a list.

    Raises:
        UsageError: if the file cannot be read, or a rule is invalid.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"reading {path} failed: {' '.join(str(error).split())[:200]}. Give a YAML file of rules") from error
    if not isinstance(content, list) or not content:
        raise UsageError(f"reading {path} failed: it has no list of rules. Begin each rule with `- name:`")
    rules = [parse_rule(raw, f"{path}, rule {number}") for number, raw in enumerate(content, 1)]
    names = [rule.name for rule in rules]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"reading {path} failed: two rules have the name {repeated[0]!r}. Rename one")
    return rules


def parse_rule(raw: Any, where: str) -> Rule:
    """Parse a rule.

    Args:
        raw: mapping with `name`, one of `RULE_KINDS`, and optionally `negate` and `prompts`.
        where: place of the rule, for error messages.

    Raises:
        UsageError: if the rule is invalid.
    """
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        raise UsageError(f"{where}: a rule is a mapping with a name")
    if unknown := raw.keys() - {*RULE_KINDS, *OTHER_FIELDS}:
        raise UsageError(f"{where}: unknown field {min(map(str, unknown))!r}. Kinds of rules: {', '.join(RULE_KINDS)}")
    kinds: list[RuleKind] = [kind for kind in RULE_KINDS if kind in raw]
    if len(kinds) != 1:
        raise UsageError(f"{where}: a rule needs exactly one of {', '.join(RULE_KINDS)}")
    prompts, negate = raw.get("prompts", []), raw.get("negate", False)
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise UsageError(f"{where}: prompts must be a list of texts")
    if not isinstance(negate, bool):
        raise UsageError(f"{where}: negate must be true or false")
    return Rule(raw["name"], kinds[0], _parse_value(kinds[0], raw[kinds[0]], where), negate, tuple(prompts))


def check_answer(rule: Rule, answer: str) -> bool:
    """Return whether an answer obeys a rule, except for rules of kind `judge`. Reasoning before the answer is not read."""
    text = remove_reasoning(answer).strip()
    return CHECKS[rule.kind](rule.value, text) != rule.negate


def _parse_value(kind: RuleKind, value: Any, where: str) -> Any:
    if kind == "contains":
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise UsageError(f"{where}: contains must be a text or a list of texts")
        return tuple(text.casefold() for text in texts)
    if kind == "json_schema":
        schema = {} if value is True else value
        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            raise UsageError(f"{where}: json_schema is not a JSON schema ({error.message[:120]})") from error
        return schema
    if kind == "length":
        if not isinstance(value, dict) or not value or value.keys() - set(LIMITS):
            raise UsageError(f"{where}: length needs limits of {', '.join(LIMITS)}")
        if not all(type(limit) is int and limit >= 0 for limit in value.values()):
            raise UsageError(f"{where}: limits of a length are whole numbers from 0")
        return value
    if not isinstance(value, str) or not value:
        raise UsageError(f"{where}: {kind} must be a text")
    if kind == "regex":
        try:
            re.compile(value)
        except re.error as error:
            raise UsageError(f"{where}: regex {value[:60]!r} is not valid ({error})") from error
    return value


def _contains(texts: Sequence[str], answer: str) -> bool:
    folded = answer.casefold()
    return all(text in folded for text in texts)


def _matches(pattern: str, answer: str) -> bool:
    return re.search(pattern, answer, re.MULTILINE) is not None


def _fits_schema(schema: Any, answer: str) -> bool:
    fenced = FENCE.match(answer)
    try:
        value = json.loads(fenced.group(1) if fenced else answer)
    except ValueError:
        return False
    return Draft202012Validator(schema).is_valid(value)


def _has_length(limits: Mapping[str, int], answer: str) -> bool:
    counts = {name: UNITS[name.partition("_")[2]](answer) for name in limits}
    return all(counts[name] >= limit if name.startswith("min") else counts[name] <= limit for name, limit in limits.items())


def _has_language(code: str, answer: str) -> bool:
    return bool(answer) and py3langid.classify(answer)[0] == code


CHECKS: Mapping[RuleKind, Callable[[Any, str], bool]] = {
    "contains": _contains,
    "regex": _matches,
    "json_schema": _fits_schema,
    "length": _has_length,
    "language": _has_language,
}

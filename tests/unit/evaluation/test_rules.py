"""Rules of a system prompt: files, checks, and the share of the prompt's effect."""

import pytest

from trimtab.errors import UsageError
from trimtab.evaluation.rules.rule_checks import check_answer, parse_rule, read_rules
from trimtab.evaluation.rules.rule_results import RuleVerdicts, compute_recovered_share


def check(answer, **fields):
    return check_answer(parse_rule({"name": "r"} | fields, "here"), answer)


@pytest.mark.parametrize(
    ("fields", "obeyed", "broken"),
    [
        ({"contains": ["Paris", "France"]}, "paris is in FRANCE", "Paris"),
        ({"regex": r"\AHello!"}, "Hello! Yes.", "Yes. Hello!"),
        ({"regex": r"^- ", "negate": True}, "One - two", "List:\n- one"),
        ({"length": {"max_words": 3}}, "one two three", "one two three four"),
        ({"length": {"max_sentences": 1, "min_words": 2}}, "Version 1.5 works.", "Yes. It works."),
        ({"length": {"max_lines": 2}}, "a\n\nb", "a\nb\nc"),
        ({"json_schema": True}, '```json\n{"a": 1}\n```', "{'a': 1}"),
        ({"json_schema": {"type": "object", "required": ["a"]}}, '{"a": 1}', "[1]"),
        (
            {"language": "de"},
            "Das Wetter ist heute sehr schön, und wir gehen.",
            "The weather is nice today, so we walk.",
        ),
        ({"contains": "plan"}, "<think>secret</think>The plan.", "<think>The plan.</think>Done."),
    ],
)
def test_answers_are_checked(fields, obeyed, broken):
    assert check(obeyed, **fields)
    assert not check(broken, **fields)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"contains": "x"}, "a rule is a mapping with a name"),
        ({"name": "r"}, "exactly one of"),
        ({"name": "r", "contains": "x", "regex": "y"}, "exactly one of"),
        ({"name": "r", "regex": "("}, "is not valid"),
        ({"name": "r", "length": {"words": 3}}, "length needs limits of min_words"),
        ({"name": "r", "length": {"max_words": -1}}, "whole numbers"),
        ({"name": "r", "json_schema": {"type": 5}}, "not a JSON schema"),
        ({"name": "r", "contains": [""]}, "a text or a list of texts"),
        ({"name": "r", "contains": "x", "prompts": "Hi"}, "prompts must be a list"),
        ({"name": "r", "contains": "x", "negate": "no"}, "negate must be true or false"),
        ({"name": "r", "contents": "x"}, "unknown field 'contents'"),
    ],
)
def test_rejects_invalid_rules(raw, message):
    with pytest.raises(UsageError, match=f"here: .*{message}"):
        parse_rule(raw, "here")


def test_reads_a_file(tmp_path):
    path = tmp_path / "checks.yaml"
    path.write_text("- {name: a, contains: x}\n- {name: b, regex: y, negate: true, prompts: [Hi]}\n")
    first, second = read_rules(path)
    assert (first.value, first.prompts, second.negate, second.prompts) == (("x",), (), True, ("Hi",))
    path.write_text("- {name: a, contains: x}\n- {name: a, contains: y}\n")
    with pytest.raises(UsageError, match="two rules have the name 'a'"):
        read_rules(path)
    path.write_text("name: a")
    with pytest.raises(UsageError, match="has no list of rules"):
        read_rules(path)
    with pytest.raises(UsageError, match="No such file"):
        read_rules(tmp_path / "none.yaml")


def build_verdicts(base, system, own):
    rule = parse_rule({"name": "r", "contains": "x"}, "here")
    arms = {"base": base, "system prompt": system, "mine": own}
    return RuleVerdicts(rule, {arm: [index < hits for index in range(20)] for arm, hits in arms.items()})


def test_recovered_share_is_over_rules_that_the_prompt_improves():
    results = [build_verdicts(0, 10, 8), build_verdicts(0, 20, 16), build_verdicts(10, 13, 0)]
    assert [result.counts for result in results] == [True, True, False]
    share = compute_recovered_share(results, "mine")
    assert share.value == pytest.approx(24 / 30)
    assert share.low < 0.8 < share.high
    assert compute_recovered_share(results, "system prompt").value == pytest.approx(1)
    assert compute_recovered_share(results[2:], "mine") is None

"""Selection of the parser of tool calls."""

import pytest

from trimtab.engine.vllm_ext.tool_parsers import PARSERS_BY_MARKER, find_parser, select_tool_parser
from trimtab.errors import UsageError

TEMPLATES = {
    "qwen": ("{{ '<tool_call>' }}{{ call | tojson }}{{ '</tool_call>' }}", "hermes"),
    "qwen coder": ("<tool_call>\n<function=name>\n<parameter=x>", "qwen3_coder"),
    "llama": ("{{- 'Environment: ipython\\n' }}{{ '<|python_tag|>' }}", "llama3_json"),
    "mistral": ("{{ '[TOOL_CALLS] [' }}", "mistral"),
    "granite": ("{{ '<|tool_call|>' }}", "granite"),
    "glm": ("<tool_call>name\n<arg_key>x</arg_key>", "glm45"),
    "without tools": ("{% for message in messages %}{{ message['content'] }}{% endfor %}", "hermes"),
}


@pytest.mark.parametrize(("template", "parser"), TEMPLATES.values(), ids=TEMPLATES)
def test_parser_follows_from_the_template(template, parser):
    assert find_parser(template) == parser


@pytest.mark.slow
def test_parsers_exist_in_vllm(base):
    for name in {*PARSERS_BY_MARKER.values(), "hermes"}:
        assert select_tool_parser(base, name) == name


@pytest.mark.slow
def test_options_of_the_server(base):
    assert select_tool_parser(base, "auto") == "hermes"
    assert select_tool_parser(base, "none") is None
    with pytest.raises(UsageError, match=r"engine\.tool_parser: vLLM has no parser 'none at all'\. Use auto, none, or one of"):
        select_tool_parser(base, "none at all")

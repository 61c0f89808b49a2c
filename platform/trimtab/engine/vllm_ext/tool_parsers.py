"""Selection of vLLM's parser of tool calls by the chat template of a model."""

from trimtab.errors import UsageError
from trimtab.model.base_model import BaseModel

AUTO, NONE = "auto", "none"
# Parsers by what a chat template contains, the most specific first.
PARSERS_BY_MARKER = {
    "<|start|>assistant<|channel|>": "openai",
    "<|tool_calls_section_begin|>": "kimi_k2",
    "DSML": "deepseek_v32",
    "tool▁calls▁begin": "deepseek_v3",
    "<start_function_call>": "functiongemma",
    "<|tool_call_start|>": "lfm2",
    "<arg_key>": "glm45",
    "<function=": "qwen3_coder",
    "<function_calls>": "olmo3",
    "<minimax:tool_call>": "minimax_m2",
    "[TOOL_CALLS]": "mistral",
    "<|action_start|>": "internlm",
    "<tool_calls>": "hunyuan_a13b",
    "<|tool|>": "phi4_mini_json",
    "<|tool_call|>": "granite",
    "<|header_start|>": "llama4_pythonic",
    "<|python_tag|>": "llama3_json",
    "Environment: ipython": "llama3_json",
}
# Qwen, Hermes and many others; also for templates that show no tools, where tool choice `required` still works.
DEFAULT_PARSER = "hermes"


def select_tool_parser(base: BaseModel, name: str) -> str | None:
    """Return the name of vLLM's parser of tool calls for a base model; None if tool choice is off.

    Args:
        base: base model.
        name: `auto`, `none`, or the name of a parser of vLLM.

    Raises:
        UsageError: if vLLM has no parser of this name.
    """
    if name == NONE:
        return None
    if name == AUTO:
        return find_parser(_get_template(base))
    # Imported lazily: vLLM takes seconds to import.
    from vllm.tool_parsers import ToolParserManager

    parsers = ToolParserManager.list_registered()
    if name not in parsers:
        raise UsageError(f"engine.tool_parser: vLLM has no parser {name!r}. Use auto, none, or one of {', '.join(parsers)}")
    return name


def find_parser(template: str) -> str:
    """Return the parser for the tool calls that a chat template writes.

    Args:
        template: text of the template, in Jinja.
    """
    return next((parser for marker, parser in PARSERS_BY_MARKER.items() if marker in template), DEFAULT_PARSER)


def _get_template(base: BaseModel) -> str:
    template = base.tokenizer().chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""

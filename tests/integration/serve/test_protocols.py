"""OpenAI's responses and Anthropic's messages with prefixes and detectors, through the clients of their vendors."""

import asyncio
import re

import anthropic
import httpx
import openai
import pytest
from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, set_tracing_disabled

from tests.support.chat_client import BASE, chat
from tests.support.factories import QUESTIONS, TOKENS

QUESTION = QUESTIONS[0]
STEERED = f"{BASE}:one"
SLOT_TOKEN = "<|trimtab_slot"
FLAGGED = {"policy": "refuse", "risk_threshold": 0.0, "refusal_text": "I would rather not say."}
# Token that ends a turn.
END = 2
LAMP = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}


@pytest.fixture(scope="module")
def anthropic_client(url) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", timeout=120, max_retries=0)


def respond(client: openai.OpenAI, model: str, text: str = QUESTION, **options):
    return client.responses.create(**({"model": model, "input": text, "max_output_tokens": TOKENS, "temperature": 0} | options))


def send_message(client: anthropic.Anthropic, model: str, text: str = QUESTION, trimtab: dict | None = None, **options):
    return client.messages.create(**(build_message(model, text, trimtab) | options))


def build_message(model: str, text: str = QUESTION, trimtab: dict | None = None) -> dict:
    """Arguments of a greedy request. The client has no temperature, as models of the vendor ignore it."""
    extra = {"temperature": 0} | ({"trimtab": trimtab} if trimtab else {})
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": TOKENS, "extra_body": extra}


def get_field(body) -> dict:
    return body.model_extra["trimtab"]


@pytest.mark.parametrize("model", [BASE, STEERED, f"{BASE}:two", f"{BASE}:three"])
def test_all_protocols_give_the_same_answer_and_risk(client, anthropic_client, model):
    """At the positions `system`, `user` and `start`, and without a prefix."""
    expected = chat(client, model, QUESTION)
    response, message = respond(client, model), send_message(anthropic_client, model)
    assert response.output_text == message.content[0].text == expected.choices[0].message.content
    assert response.model == message.model == expected.model
    assert response.usage.input_tokens == message.usage.input_tokens == expected.usage.prompt_tokens
    fields = [get_field(body) for body in (response, message)]
    assert fields == [get_field(expected)] * 2
    assert fields[0]["detectors"][0]["status"] == "scored"


def test_streams_equal_the_complete_answers(client, anthropic_client):
    expected = respond(client, STEERED)
    events = list(respond(client, STEERED, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected.output_text
    assert events[0].response.model == events[-1].response.model == f"{STEERED}@1"
    assert get_field(events[-1].response) == get_field(expected)
    assert all("trimtab" not in (event.response.model_extra or {}) for event in events[:2])
    with anthropic_client.messages.stream(**build_message(STEERED)) as stream:
        parts = list(stream)
        message = stream.get_final_message()
    assert message.content[0].text == expected.output_text
    assert message.model == f"{STEERED}@1"
    assert message.stop_reason == send_message(anthropic_client, STEERED).stop_reason
    (end,) = [part for part in parts if part.type == "message_delta"]
    assert get_field(end) == get_field(expected)
    last = list(send_message(anthropic_client, STEERED, stream=True))[-1]
    assert last.type == "message_stop"
    assert get_field(last) == get_field(expected)


def test_running_risks_in_streams(client, anthropic_client):
    trimtab = {"running_risk": True}
    response = respond(client, BASE, stream=True, extra_body={"trimtab": trimtab})
    message = send_message(anthropic_client, BASE, trimtab=trimtab, stream=True)
    events = [event for event in response if event.type == "response.output_text.delta"]
    blocks = [event for event in message if event.type == "content_block_delta"]
    for deltas in (events, blocks):
        risks = [
            delta.model_extra["trimtab"]["detectors"][0]["probability"] for delta in deltas if "trimtab" in delta.model_extra
        ]
        assert len(set(risks)) > 2


def test_withheld_answers_use_the_terms_of_the_protocol(client, anthropic_client):
    options = {"extra_body": {"trimtab": FLAGGED}}
    response, message = respond(client, BASE, **options), send_message(anthropic_client, BASE, trimtab=FLAGGED)
    assert response.output_text == message.content[0].text == FLAGGED["refusal_text"]
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "content_filter")
    assert message.stop_reason == "refusal"
    last = list(respond(client, BASE, stream=True, **options))[-1]
    assert last.type == "response.incomplete"
    assert get_field(last.response)["withheld"] is True
    events = list(send_message(anthropic_client, BASE, trimtab=FLAGGED, stream=True))
    assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == FLAGGED["refusal_text"]


def test_echoed_fields_contain_no_slot_token(client):
    parts = [{"type": "input_text", "text": QUESTION}]
    for model in (STEERED, f"{BASE}:two"):
        response = client.responses.create(
            model=model, instructions="Be brief.", input=[{"role": "user", "content": parts}], max_output_tokens=2, store=True
        )
        assert response.instructions == "Be brief."
        assert SLOT_TOKEN not in response.model_dump_json()
        answer = chat(client, model, "Say hi.", extra_body={"echo": True, "add_generation_prompt": False})
        assert answer.choices[0].message.content.startswith("Say hi.")
        assert SLOT_TOKEN not in answer.choices[0].message.content


def test_counts_tokens_with_and_without_a_prefix(client, anthropic_client):
    messages, system = (
        [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
        [{"type": "text", "text": "Be brief."}],
    )
    for model in (BASE, STEERED, f"{BASE}:three"):
        count = anthropic_client.messages.count_tokens(model=model, messages=messages, system=system)
        answer = anthropic_client.messages.create(model=model, messages=messages, system=system, max_tokens=1)
        assert count.input_tokens == answer.usage.input_tokens


@pytest.mark.parametrize("field", [{"previous_response_id": "resp_1"}, {"background": True}, {"conversation": "conv_1"}])
def test_responses_without_state_only(client, field):
    with pytest.raises(openai.BadRequestError, match=f"{next(iter(field))} is not supported: this server stores no responses"):
        respond(client, BASE, extra_body=field)


def test_errors_have_anthropics_format(anthropic_client):
    with pytest.raises(anthropic.NotFoundError) as unknown:
        send_message(anthropic_client, f"{BASE}:nobody")
    with pytest.raises(anthropic.NotFoundError) as other:
        send_message(anthropic_client, "nobody")
    with pytest.raises(anthropic.BadRequestError) as invalid:
        send_message(anthropic_client, BASE, max_tokens=-1)
    with pytest.raises(anthropic.BadRequestError) as reserved:
        send_message(anthropic_client, STEERED, f"{SLOT_TOKEN}_0|>")
    for error in (unknown, other):
        assert error.value.body["error"]["type"] == "not_found_error"
    for error in (invalid, reserved):
        assert error.value.body["type"] == "error"
        assert error.value.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("model", [BASE, STEERED])
def test_long_prompts_name_their_length_and_the_limit(client, anthropic_client, model):
    text = "word " * 600
    for request in (
        lambda: chat(client, model, text),
        lambda: respond(client, model, text),
        lambda: send_message(anthropic_client, model, text),
    ):
        with pytest.raises((openai.BadRequestError, anthropic.BadRequestError)) as error:
            request()
        # vLLM stops to count one token above the limit, less the tokens of the answer.
        assert re.search(
            r"maximum context length is 512 tokens.* prompt contains at least (513|50\d) input tokens", str(error.value)
        )


@pytest.mark.parametrize("model", [BASE, STEERED])
def test_tools_are_called(client, anthropic_client, model):
    """The parser follows from the model. A small model may write spaces without end; then its answer is cut."""
    request = {"model": model, "temperature": 0}
    function = {"name": "set_lamp", "description": "Switch a lamp.", "parameters": LAMP, "strict": True}
    messages = [{"role": "user", "content": "Switch the lamp on."}]
    answer = client.chat.completions.create(
        messages=messages, tools=[{"type": "function", "function": function}], tool_choice="required", max_tokens=60, **request
    ).choices[0]
    assert answer.finish_reason == "length" or answer.message.tool_calls[0].function.name == "set_lamp"
    response = client.responses.create(
        input="Switch the lamp on.",
        tools=[{"type": "function", **function}],
        tool_choice="required",
        max_output_tokens=60,
        **request,
    )
    assert response.status == "incomplete" or response.output[-1].name == "set_lamp"
    tool = {"name": "set_lamp", "description": "Switch a lamp.", "input_schema": LAMP, "strict": True}
    message = anthropic_client.messages.create(
        model=model, messages=messages, tools=[tool], tool_choice={"type": "tool", "name": "set_lamp"}, max_tokens=60
    )
    assert message.stop_reason == "max_tokens" or message.content[-1].name == "set_lamp"


@pytest.mark.parametrize("model", [BASE, STEERED])
def test_agents_package(url, client, model):
    """Instructions, a second turn with the items of the first one, and a stream; the bias ends answers early."""
    set_tracing_disabled(disabled=True)
    endpoint = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)
    agent = Agent(
        name="baker",
        instructions="Be brief.",
        model=OpenAIResponsesModel(model=model, openai_client=endpoint),
        model_settings=ModelSettings(temperature=0, max_tokens=100, extra_body={"logit_bias": {str(END): 8}}),
    )

    async def run() -> tuple[str, str, str]:
        first = await Runner.run(agent, QUESTION)
        second = await Runner.run(agent, [*first.to_input_list(), {"role": "user", "content": QUESTIONS[1]}])
        streamed = Runner.run_streamed(agent, QUESTION)
        async for _ in streamed.stream_events():
            pass
        return first.final_output, second.final_output, streamed.final_output

    first, second, streamed = asyncio.run(run())
    expected = respond(client, model, instructions="Be brief.", max_output_tokens=100, extra_body={"logit_bias": {str(END): 8}})
    assert first == streamed == expected.output_text
    assert second


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/messages/count_tokens"])
def test_malformed_requests_get_400(url, path):
    valid = {"model": STEERED, "input": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    malformed = [
        {"messages": [1], "input": [1]},
        {"messages": [], "input": []},
        {"messages": [{"role": "user", "content": 5}], "input": [{"role": "user", "content": 5}]},
        {
            "messages": [{"role": "user", "content": [{"type": "text"}]}],
            "input": [{"role": "user", "content": [{"type": "x"}]}],
        },
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [5]}]}], "input": 5},
        {"tools": [{"name": "x"}]},
        {"trimtab": {"unknown": 1}},
    ]
    statuses = [httpx.post(f"{url}{path}", json=valid | fields, timeout=60).status_code for fields in malformed]
    assert set(statuses) <= {200, 400}, statuses
    assert statuses.count(400) >= 4

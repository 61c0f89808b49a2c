"""The engine in this process: answers batches of conversations, each with a prefix of its own or none.

engine = trimtab.Engine("smollm2-135m", detectors=[truth := trimtab.load_detector("truth")])
answer = engine.chat([{"role": "user", "content": "Hello"}], prefix=trimtab.load_prefix("my-prefix"), detector=truth)
print(answer.text, answer.risk)
"""

import io
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm
from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams, TokensPrompt

from trimtab.artifacts.prefix import Prefix, check_base
from trimtab.detection import detector as detection
from trimtab.detection.detector import Detector
from trimtab.engine.config import EngineConfig
from trimtab.engine.detectors.signal_client import decode_signals
from trimtab.engine.prefixes.slots import ResidentPrefix, SlotTable
from trimtab.engine.vllm_ext.args import GIVEN_ANSWER_START, build_engine_args
from trimtab.errors import UsageError
from trimtab.generation_types import Answer, Ask, Progress, Sampling, Signals
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.model.chat_template import Message, build_renderer


class Engine:
    """vLLM with one frozen base model and any number of prefixes."""

    def __init__(self, model: str | BaseModel, config: EngineConfig | None = None, detectors: Sequence[Detector] = ()) -> None:
        """`detectors` are those that answers will be given to: their layers are captured beside those of `config`."""
        config = config or EngineConfig()
        read = {layer for detector in detectors for layer in detector.card.layers}
        layers = tuple(sorted({*config.layers, *read}))
        self.config = replace(config, layers=layers, history=bool(read) or config.history)
        self.base = resolve_base_model(model) if isinstance(model, str) else model
        self.renderer = build_renderer(self.base, self.config.rows)
        self.table = SlotTable(self.renderer.first_row, self.config.rows)
        if self.config.tensor_parallel == 1:
            # The engine's core in this process: starts in a fifth of the time, and leaves no process behind.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        self._llm = LLM(**build_engine_args(self.base, self.config), disable_log_stats=True)
        self._llm.collective_rpc("trimtab_mask_reserved_ids", args=(self.renderer.first_row,))

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
    ) -> Answer:
        """Answer one conversation; with a `detector`, the answer has the risk that it is made up.

        Raises UsageError where the detector reads layers that this engine does not capture, and as `chat_many`.
        """
        if detector is not None:
            detection.check_base(detector.card, self.base)
            if missing := sorted(set(detector.card.layers) - set(self.config.layers)):
                raise UsageError(
                    f"detector {detector.card.name!r} reads layer {missing[0]}, which this engine does not capture: "
                    "make it with trimtab.Engine(model, detectors=[…])"
                )
        answer = self.chat_many([Ask(messages, prefix)], sampling)[0][0]
        if detector is None or answer.signals is None:
            return answer
        return replace(answer, risk=detector.score_answer(answer.signals, self.config.layers))

    def chat_many(
        self, asks: Sequence[Ask], sampling: Sampling | Sequence[Sampling] | None = None, progress: Progress | None = None
    ) -> list[list[Answer]]:
        """Answer many conversations in one batch: `sampling.n` answers for each, in the order of `asks`; `sampling` is one
        for all, or one for each.

        Raises ArtifactError for a prefix of another base model, BusyError where the batch names more prefixes than rows.
        """
        with self._lease_rows(asks) as rows:
            prompts = [self._build_prompt(ask, used) for ask, used in zip(asks, rows, strict=True)]
            given = sampling or Sampling()
            return self._generate(prompts, [given] * len(asks) if isinstance(given, Sampling) else given, progress)

    def score_many(self, asks: Sequence[Ask], texts: Sequence[str], progress: Progress | None = None) -> list[Answer]:
        """What the model shows of answers that someone else wrote, `texts` to `asks`, as if it had written them itself; each
        ends with the token that ends a turn. One that the engine's length cuts off is `finished` with `length`.

        Raises UsageError where the engine captures no layers, and as `chat_many`.
        """
        if not self.config.layers:
            raise UsageError("this engine captures no layers: give it some with EngineConfig(layers=…) to read answers")
        with self._lease_rows(asks) as rows:
            prompts = [self._build_prompt(ask, used) for ask, used in zip(asks, rows, strict=True)]
            starts = [len(prompt["prompt_token_ids"]) for prompt in prompts]
            given = [self.renderer.render_answer(t, p["prompt_token_ids"]) for t, p in zip(texts, prompts, strict=True)]
            # One more token is the least that vLLM writes.
            fitting = [ids[: self.config.max_length - 1 - start] for ids, start in zip(given, starts, strict=True)]
            for prompt, ids in zip(prompts, fitting, strict=True):
                prompt["prompt_token_ids"] = [*prompt["prompt_token_ids"], *ids]
            sampling = [
                SamplingParams(max_tokens=1, skip_reading_prefix_cache=True, extra_args={GIVEN_ANSWER_START: start})
                for start in starts
            ]
            outputs = self._llm.generate(prompts, sampling, use_tqdm=_build_progress_bar(progress) if progress else False)
            wanted = {output.request_id: len(ids) for output, ids in zip(outputs, fitting, strict=True)}
            found = self._fetch_signals(wanted)
        return [
            Answer(text, tuple(ids), "stop" if ids == whole else "length", start, (), found.get(output.request_id))
            for text, ids, whole, start, output in zip(texts, fitting, given, starts, outputs, strict=True)
        ]

    @contextmanager
    def _lease_rows(self, asks: Sequence[Ask]) -> Generator[list[tuple[int, ...]]]:
        """The rows of each conversation's prefix, held as long as this lasts."""
        with ExitStack() as held:

            def rows(prefix: Prefix) -> tuple[int, ...]:
                resident = self._acquire_rows(prefix)
                held.callback(self.table.release_slots, resident)
                return resident.rows

            yield [rows(ask.prefix) if ask.prefix else () for ask in asks]

    def _acquire_rows(self, prefix: Prefix) -> ResidentPrefix:
        check_base(prefix, self.base)
        digest = prefix.card.digest
        resident, fresh = self.table.acquire_slots(digest, len(prefix.vectors))
        if fresh:
            try:
                self._llm.collective_rpc("trimtab_write_vectors", args=(list(resident.rows), prefix.vectors.numpy().tobytes()))
            except BaseException:
                self.table.forget_prefix(digest)
                raise
        return resident

    def _build_prompt(self, ask: Ask, rows: tuple[int, ...]) -> TokensPrompt:
        if ask.prefix is None:
            ids = self.renderer.render_prompt(ask.messages)
        else:
            ids = self.renderer.render_prompt(ask.messages, ask.prefix.card.place, rows)
        if len(ids) >= self.config.max_length:
            raise UsageError(f"a prompt has {len(ids)} tokens; the engine takes fewer than {self.config.max_length}")
        self.renderer.check_rows(ids, rows)
        prompt = TokensPrompt(prompt_token_ids=ids)
        if ask.prefix is not None:
            prompt["cache_salt"] = ask.prefix.salt
        return prompt

    def _generate(
        self, prompts: list[TokensPrompt], sampling: Sequence[Sampling], progress: Progress | None
    ) -> list[list[Answer]]:
        bar = _build_progress_bar(progress) if progress else False
        outputs = self._llm.generate(prompts, [SamplingParams(**asdict(s)) for s in sampling], use_tqdm=bar)
        wanted = {_get_engine_id(output, o): len(o.token_ids) for output in outputs for o in output.outputs}
        captured = self._fetch_signals(wanted) if self.config.layers else {}
        return [
            [
                Answer(
                    o.text.strip(),
                    tuple(o.token_ids),
                    o.finish_reason or "length",
                    len(output.prompt_token_ids or ()),
                    tuple({i: entry.logprob for i, entry in step.items()} for step in (o.logprobs or ())),
                    captured.get(_get_engine_id(output, o)),
                )
                for o in output.outputs
            ]
            for output in outputs
        ]

    def _fetch_signals(self, wanted: Mapping[str, int]) -> dict[str, Signals]:
        """Signals of answers of so many tokens, by their ids in the engine."""
        asked = [(request, tokens, True) for request, tokens in wanted.items()]
        found = decode_signals(self._llm.collective_rpc("trimtab_fetch_signals", args=(asked,)), len(self.config.layers))
        return {name: signals for name, signals in zip(wanted, found, strict=True) if signals is not None}


def _get_engine_id(output: RequestOutput, answer: CompletionOutput) -> str:
    """The id that one of a request's answers has in the engine, but for what the engine adds to it."""
    return output.request_id if len(output.outputs) == 1 else f"{answer.index}_{output.request_id}"


def _build_progress_bar(progress: Progress) -> Callable[..., Any]:
    """A tqdm class for vLLM that draws nothing and tells `progress` instead."""

    class Bar(tqdm):  # pyright: ignore[reportMissingTypeArgument]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"file": io.StringIO(), "disable": False}))

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            # A bar over something counts prompts being rendered; one over nothing counts finished answers.
            if self.iterable is None:
                progress(int(self.n), int(self.total or 0))
            return shown

    return Bar

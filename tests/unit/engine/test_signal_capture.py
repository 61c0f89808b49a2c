"""Signal capture on a scripted model runner: chunks, blocks, preemption, supplied answers and request ids."""

import types

import numpy as np
import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from trimtab import heads
from trimtab.detection.detector import Detector, build_detector, encode_detector
from trimtab.detection.detector_card import DetectorCard
from trimtab.detection.signals import CHECK_INTERVAL, compute_token_statistics, compute_trace_features, concatenate_states
from trimtab.engine.checks import PROMPT_STORED, RECORDED, UNTRACKED, AnswerCheck, PromptCheck, RequestChecks, encode_checks
from trimtab.engine.vllm_ext import patches
from trimtab.engine.vllm_ext.args import SUPPLIED_ANSWER_START
from trimtab.engine.vllm_ext.capture import SignalCapture
from trimtab.engine.vllm_ext.runners.adapter import RunnerAdapter
from trimtab.engine.vllm_ext.runners.v1 import ModelRunnerV1Adapter
from trimtab.engine.vllm_ext.runners.v2 import ModelRunnerV2Adapter

LAYERS, WIDTH, VOCABULARY, BLOCK, BLOCKS, VERDICT = 2, 5, 11, 4, 40, 99


class ScriptedRunner:
    """First model runner, whose states, logits and samples are random functions of the request and the position."""

    build_adapter: type[RunnerAdapter] = ModelRunnerV1Adapter

    def __init__(self) -> None:
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        self.kv_cache_config = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
        self.device, self.max_num_reqs, self.max_model_len = torch.device("cpu"), 4, 32
        self.model_config = types.SimpleNamespace(get_hidden_size=lambda: WIDTH)
        self.blocks = np.zeros((self.max_num_reqs, 8), np.int32)
        table = types.SimpleNamespace(block_size=BLOCK, get_numpy_array=lambda: self.blocks)
        self.input_batch = types.SimpleNamespace(block_table=[table], generators={})
        self.discard_request_mask = types.SimpleNamespace(np=np.zeros(self.max_num_reqs, np.bool_))
        self.execute_model_state = None
        self.head = torch.randn(WIDTH, VOCABULARY)
        self.tokens: dict[str, list[int]] = {}
        self.states: dict[str, torch.Tensor] = {}
        self.prompts: dict[str, int] = {}

    def get_model(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(compute_logits=lambda hidden: hidden @ self.head)

    def _sample(self, logits: torch.Tensor, spec_decode_metadata: None) -> types.SimpleNamespace:
        sampled = torch.randint(VOCABULARY, (len(logits), 1))
        for index, request in enumerate(self.input_batch.req_ids):
            if not self.discard_request_mask.np[index]:
                self.tokens[request].append(int(sampled[index]))
        return types.SimpleNamespace(sampled_token_ids=sampled)

    def add_request(self, request: str, prompt: int, supplied_answer: tuple[int, ...] = ()) -> types.SimpleNamespace:
        """Add a request and return it as the scheduler describes it."""
        self.tokens[request], self.prompts[request] = [0] * prompt, prompt
        self.states[request] = torch.randn(self.max_model_len, LAYERS, WIDTH)
        if supplied_answer:
            self.tokens[request] += supplied_answer
        extra = {SUPPLIED_ANSWER_START: prompt} if supplied_answer else None
        return types.SimpleNamespace(
            req_id=request,
            prompt_token_ids=list(self.tokens[request]),
            sampling_params=types.SimpleNamespace(extra_args=extra),
        )

    def run_step(self, capture: SignalCapture, spans: dict[str, tuple[int, int, list[int]]], new=(), finished=()) -> list[int]:
        """Run one step and return the sampled tokens.

        A span is a request's first position, its number of tokens, and the blocks of its table.
        """
        counts = {request: count for request, (_, count, _) in spans.items()}
        scheduled = types.SimpleNamespace(
            scheduled_new_reqs=list(new), finished_req_ids=set(finished), num_scheduled_tokens=counts
        )
        capture.begin_step(scheduled)
        states = torch.cat([self.states[request][start : start + count] for request, (start, count, _) in spans.items()])
        padded = torch.cat([states, torch.full((3, LAYERS, WIDTH), torch.nan)])
        self.prepare_batch(spans, scheduled, padded)
        capture.accumulate_step()
        state, self.execute_model_state = self.execute_model_state, None
        return self.sample_tokens(state)

    def prepare_batch(self, spans: dict[str, tuple[int, int, list[int]]], scheduled: object, states: torch.Tensor) -> None:
        """Set the batch, its block table and the state after the forward pass."""
        batch = self.input_batch
        batch.req_ids, batch.num_reqs = list(spans), len(spans)
        batch.num_computed_tokens_cpu = np.array([start for start, _, _ in spans.values()], np.int32)
        for index, (request, (start, count, blocks)) in enumerate(spans.items()):
            self.blocks[index, : len(blocks)] = blocks
            self.discard_request_mask.np[index] = start + count < len(self.tokens[request])
        hidden = states[:, -1]
        last = np.cumsum([count for _, count, _ in spans.values()]) - 1
        self.execute_model_state = types.SimpleNamespace(
            scheduler_output=scheduled,
            aux_hidden_states=list(states.unbind(1)),
            hidden_states=hidden,
            logits=hidden[last] @ self.head,
        )

    def sample_tokens(self, state: types.SimpleNamespace) -> list[int]:
        """Sample the next token of each request in the batch."""
        return self._sample(state.logits, None).sampled_token_ids[:, 0].tolist()

    def compute_expected_signals(self, request: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute psi [L, 3d] and history [tokens, 3] of the first tokens of an answer, from whole tensors."""
        prompt, states = self.prompts[request], self.states[request]
        answer = states[prompt - 1 : prompt - 1 + tokens]
        ids = torch.tensor(self.tokens[request][prompt : prompt + tokens])
        statistics = compute_token_statistics(answer[:, -1] @ self.head, ids)
        psi = concatenate_states(answer[-1], answer.mean(0), states[:prompt].mean(0))
        return psi, torch.stack([statistics.logp, statistics.entropy, statistics.margin], 1)


class ScriptedRunnerV2(ScriptedRunner):
    """Second model runner: requests have fixed rows in the block table on the device, and a batch lists the rows."""

    build_adapter = ModelRunnerV2Adapter

    def __init__(self) -> None:
        super().__init__()
        self.pcp_manager = None
        table = types.SimpleNamespace(gpu=torch.zeros(self.max_num_reqs, 8, dtype=torch.int32))
        self.block_tables = types.SimpleNamespace(block_tables=[table], block_sizes=[BLOCK])
        self.rows: dict[str, int] = {}

    def prepare_batch(self, spans: dict[str, tuple[int, int, list[int]]], scheduled: object, states: torch.Tensor) -> None:
        for request in spans:
            self.rows.setdefault(request, self.max_num_reqs - 1 - len(self.rows) % self.max_num_reqs)
        starts, counts = (np.array([span[column] for span in spans.values()], np.int32) for column in (0, 1))
        prefill = np.array([len(self.tokens[request]) for request in spans], np.int32)
        for request, (_, _, blocks) in spans.items():
            self.block_tables.block_tables[0].gpu[self.rows[request], : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        batch = types.SimpleNamespace(
            req_ids=list(spans),
            idx_mapping_np=np.array([self.rows[request] for request in spans]),
            num_scheduled_tokens=counts,
            num_computed_tokens_np=starts,
            num_computed_prefill_tokens_np=np.minimum(starts, prefill),
            prefill_len_np=prefill,
            logits_indices=torch.as_tensor(counts).cumsum(0) - 1,
        )
        self.execute_model_state = types.SimpleNamespace(
            input_batch=batch, aux_hidden_states=list(states.unbind(1)), hidden_states=states[:, -1]
        )

    def sample_tokens(self, state: types.SimpleNamespace) -> list[int]:
        return self.sample(state.hidden_states, state.input_batch, None)[0].sampled_token_ids[:, 0].tolist()

    def sample(self, hidden_states: torch.Tensor, input_batch: types.SimpleNamespace, grammar_output: None) -> tuple:
        sampled = torch.randint(VOCABULARY, (len(input_batch.req_ids), 1))
        for request, token, start, count in zip(
            input_batch.req_ids, sampled, input_batch.num_computed_tokens_np, input_batch.num_scheduled_tokens, strict=True
        ):
            if start + count >= len(self.tokens[request]):
                self.tokens[request].append(int(token))
        return types.SimpleNamespace(sampled_token_ids=sampled), None, None


@pytest.fixture(params=[ScriptedRunner, ScriptedRunnerV2])
def scripted_runner(request, monkeypatch):
    # The symbols of the installed vLLM are checked in test_patches.py.
    monkeypatch.setattr(patches.REGISTER, "check", lambda *names: None)
    torch.manual_seed(0)
    return request.param()


@pytest.fixture
def history() -> bool:
    """Whether the capture stores the statistics of tokens."""
    return True


@pytest.fixture
def capture(scripted_runner, history):
    adapter = scripted_runner.build_adapter(scripted_runner)
    return SignalCapture(adapter, range(LAYERS), history=history, keep=8, verdict_token=VERDICT)


def check_record(runner: ScriptedRunner, request: str, record: dict, tokens: int) -> None:
    psi, history = runner.compute_expected_signals(request, tokens)
    captured = torch.frombuffer(bytearray(record["psi"]), dtype=torch.float32).view(LAYERS, 3 * WIDTH)
    torch.testing.assert_close(captured, psi, rtol=1e-5, atol=1e-5)
    if "history" in record:
        captured = torch.frombuffer(bytearray(record["history"]), dtype=torch.float32).view(-1, 3)
        torch.testing.assert_close(captured, history, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("history", [True, False])
def test_signals_in_one_batch_equal_whole_tensors(scripted_runner, capture):
    """Chunked, with a supplied answer, from the prefix cache, and preempted. Two requests have the same client id."""
    blocks = {"x-00000001": [1, 2, 3, 4], "x-00000002": [5, 6, 7], "given": [8, 9, 10, 11], "cached": [1, 12, 13]}
    first, second, given = (
        scripted_runner.add_request("x-00000001", 9),
        scripted_runner.add_request("x-00000002", 8),
        scripted_runner.add_request("given", 6, (3, 1, 4, 1, 5)),
    )
    scripted_runner.states["cached"] = None
    cached = scripted_runner.add_request("cached", 7)
    scripted_runner.states["cached"][:BLOCK] = scripted_runner.states["x-00000001"][:BLOCK]

    def span(request: str, start: int, count: int) -> dict[str, tuple[int, int, list[int]]]:
        return {request: (start, count, blocks[request])}

    scripted_runner.run_step(
        capture, span("x-00000001", 0, 5) | span("x-00000002", 0, 8) | span("given", 0, 3), [first, second, given]
    )
    scripted_runner.run_step(capture, span("x-00000001", 5, 4) | span("x-00000002", 8, 1) | span("given", 3, 5))
    # The first block of the prompt is in the cache, so that only the rest is computed.
    scripted_runner.run_step(capture, span("cached", 4, 3) | span("given", 8, 3) | span("x-00000001", 9, 1), [cached])
    check_record(scripted_runner, "x-00000001", capture.peek_signals("x-00000001", 2), 2)
    # Preempted: all tokens are computed again, in other blocks.
    blocks["x-00000002"] = [14, 15, 16]
    scripted_runner.run_step(capture, span("x-00000002", 0, 7) | span("cached", 7, 1))
    scripted_runner.run_step(capture, span("x-00000002", 7, 3) | span("cached", 8, 1) | span("x-00000001", 10, 1))
    check_record(scripted_runner, "cached", capture.peek_signals("cached", 3), 3)
    scripted_runner.run_step(capture, span("cached", 9, 1), finished=["x-00000002"])
    check_record(scripted_runner, "x-00000002", capture.pop_signals("x-00000002", 3), 3)
    check_record(scripted_runner, "x-00000001", capture.pop_signals("x-00000001", 3), 3)
    check_record(scripted_runner, "given", capture.pop_signals("given", 5), 5)
    check_record(scripted_runner, "cached", capture.pop_signals("cached", 2), 2)


@pytest.mark.parametrize("history", [True, False])
def test_history_is_stored_on_request_only(scripted_runner, capture, history, monkeypatch):
    computed: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda logits, _: computed.append(logits) or logits)
    scripted_runner.run_step(capture, {"x": (0, 3, [1])}, [scripted_runner.add_request("x", 3)])
    record = capture.pop_signals("x", 1)
    assert ("history" in record) is history
    assert bool(computed) is history


def test_stored_prompts_have_their_features(scripted_runner, capture):
    new = scripted_runner.add_request("x", 6)
    new.sampling_params.extra_args = {PROMPT_STORED: True, UNTRACKED: True}
    scripted_runner.run_step(capture, {"x": (0, 4, [1])}, [new])
    scripted_runner.run_step(capture, {"x": (4, 2, [1, 2])})
    states = scripted_runner.states["x"][:6]
    expected = torch.cat([states[-1], states.mean(0), states[-1] - states.mean(0)], -1)
    record = capture.pop_signals("x", 0)
    captured = torch.frombuffer(bytearray(record["prompt"]), dtype=torch.float32).view(LAYERS, 3 * WIDTH)
    torch.testing.assert_close(captured, expected, rtol=1e-5, atol=1e-5)
    assert (record["psi"], record["prompt_risks"]) == (b"", [])


def test_requests_are_found_by_engine_id_only(scripted_runner, capture):
    scripted_runner.run_step(capture, {"x-00000001": (0, 3, [1])}, [scripted_runner.add_request("x-00000001", 3)])
    assert capture.peek_signals("x", 1) is None
    assert capture.pop_signals("x", 1) is None
    assert capture.pop_signals("x-00000001", 1) is not None
    assert capture.pop_signals("x-00000001", 1) is None


@pytest.fixture
def guard(capture) -> Detector:
    """Linear detector of prompts at the second layer, which reads the last state and the mean."""
    head = heads.get_head("linear")(WIDTH, 1, parts=2)
    card = DetectorCard("guard", "b", "f", [1], WIDTH, "linear", {"parts": 2}, -2.0, {"balanced": 0.5}, subject="prompt")
    normalizer = torch.stack([torch.zeros(7), torch.ones(7)])
    detector = build_detector(head, normalizer, torch.tensor([1.0, 0.0]), card)
    capture.detectors.add_detector(*encode_detector(detector))
    return detector


def add_checked_request(runner: ScriptedRunner, request: str, detector: Detector, offset: float, **options):
    """Add a request whose threshold is the risk of its prompt plus an offset; return it and the risk."""
    new = runner.add_request(request, 6)
    states = runner.states[request][:6, 1]
    psi = torch.cat([states[-1], states.mean(0), states[-1] - states.mean(0)])
    risk = detector.score_prompts(psi[None, None]).item()
    check = PromptCheck(detector.card.digest, risk + offset, **options)
    new.sampling_params.extra_args = encode_checks(RequestChecks([PromptCheck("gone", 0.0, stops=True), check]))
    return new, risk


def test_flagged_prompts_end_with_the_verdict_token(scripted_runner, capture, guard):
    """Prompts in chunks; thresholds just below and just above the risk, on both sides."""
    cases = {
        "above": ({"offset": -1e-4, "stops": True}, True),
        "not above": ({"offset": 1e-4, "stops": True}, False),
        "below": ({"offset": 1e-4, "stops": True, "above": False}, True),
        "only annotated": ({"offset": -1e-4}, False),
    }
    added = {name: add_checked_request(scripted_runner, name, guard, **options) for name, (options, _) in cases.items()}
    blocks = {name: [2 * number, 2 * number + 1] for number, name in enumerate(cases)}
    scripted_runner.run_step(capture, {name: (0, 3, blocks[name]) for name in cases}, [new for new, _ in added.values()])
    sampled = scripted_runner.run_step(capture, {name: (3, 3, blocks[name]) for name in cases})
    assert [token == VERDICT for token in sampled] == [stopped for _, stopped in cases.values()]
    # Only the first token carries the verdict.
    assert VERDICT not in scripted_runner.run_step(capture, {"not above": (6, 1, blocks["not above"])}, finished=["above"])
    for name, (_, risk) in added.items():
        gone, checked = capture.pop_signals(name, 0)["prompt_risks"]
        assert np.isnan(gone)
        assert checked == pytest.approx(risk, abs=1e-5)


def test_untracked_requests_are_checked_without_signals_of_their_answers(scripted_runner, capture, guard):
    new, risk = add_checked_request(scripted_runner, "guarded", guard, 1e-4, stops=True)
    other = scripted_runner.add_request("x", 6)
    new.sampling_params.extra_args |= {UNTRACKED: True}
    spans = {"guarded": (0, 6, [1, 2]), "x": (0, 6, [3, 4])}
    scripted_runner.run_step(capture, spans, [new, other])
    scripted_runner.run_step(capture, {"guarded": (6, 1, [1, 2]), "x": (6, 1, [3, 4])})
    assert int(capture.sums.tokens[capture.running["guarded"].slot]) == 0
    assert capture.pop_signals("guarded", 0)["prompt_risks"][1] == pytest.approx(risk, abs=1e-5)
    check_record(scripted_runner, "x", capture.pop_signals("x", 2), 2)


def test_required_checks_without_a_risk_end_the_request(scripted_runner, capture, guard):
    """A detector that the worker lacks, and more requests than slots."""
    unknown = PromptCheck("gone", 0.5, stops=True, required=True)
    capture.free = capture.free[:1]
    requests = [scripted_runner.add_request(name, 3) for name in ("with a slot", "without a slot", "unchecked")]
    for new in requests[:2]:
        new.sampling_params.extra_args = encode_checks(RequestChecks([unknown]))
    spans = {new.req_id: (0, 3, [number]) for number, new in enumerate(requests)}
    assert [token == VERDICT for token in scripted_runner.run_step(capture, spans, requests)] == [True, True, False]
    assert capture.pop_signals("without a slot", 0) is None


@pytest.fixture
def truth(capture) -> Detector:
    """Detector of answers at the second layer, with the head FLaG, which reads the statistics of the tokens as well."""
    options = {"groups": 2}
    thresholds = dict.fromkeys(("0.01", "0.05", "0.1"), 0.5)
    card = DetectorCard("truth", "b", "f", [1], WIDTH, "flag", options, -2.0, thresholds)
    normalizer = torch.stack([torch.zeros(7), torch.ones(7)])
    detector = build_detector(heads.get_head("flag")(WIDTH, 1, **options), normalizer, torch.tensor([1.0, 0.0]), card)
    capture.detectors.add_detector(*encode_detector(detector))
    return detector


def run_answer(runner: ScriptedRunner, capture: SignalCapture, extra_args: dict, tokens: int) -> list[int]:
    """Run a request with a prompt of 5 tokens, and return its sampled tokens up to the verdict token."""
    new = runner.add_request("x", 5)
    new.sampling_params.extra_args = extra_args
    blocks = list(range(1, 8))
    sampled = runner.run_step(capture, {"x": (0, 5, blocks)}, [new])
    while len(sampled) < tokens and VERDICT not in sampled:
        sampled += runner.run_step(capture, {"x": (4 + len(sampled), 1, blocks)})
    return sampled


def compute_running_risks(runner: ScriptedRunner, detector: Detector, tokens: int) -> list[float]:
    """Risks of the first tokens of the answer of a request, from whole tensors."""
    risks = []
    for count in range(1, tokens + 1):
        psi, history = runner.compute_expected_signals("x", count)
        phi = compute_trace_features(*history.unbind(1), -2.0)
        risks.append(detector.compute_risk(psi[None, 1:], phi[None]).item())
    return risks


def test_answer_ends_at_the_first_check_above_the_threshold(scripted_runner, capture, truth):
    """Risks between two checks do not end it, and a stopped answer keeps the signals of its decision."""
    assert len(run_answer(scripted_runner, capture, {RECORDED: True}, 20)) == 20
    risks = compute_running_risks(scripted_runner, truth, 20)
    checked = risks[CHECK_INTERVAL - 1 :: CHECK_INTERVAL]
    recorded = torch.frombuffer(bytearray(capture.pop_signals("x", 20)["running"]), dtype=torch.float16)
    history = scripted_runner.compute_expected_signals("x", 20)[1]
    unfinished = truth.score_unfinished(recorded.view(-1, LAYERS, 3 * WIDTH)[:, 1:], history)
    assert unfinished.tolist() == pytest.approx(checked, abs=2e-3)
    lengths = []
    for threshold in (-1.0, sorted(checked)[2], 1.0):
        check = AnswerCheck(truth.card.digest, threshold)
        sampled = run_answer(scripted_runner, capture, encode_checks(RequestChecks(answer=[check])), 24)
        risks = compute_running_risks(scripted_runner, truth, len(sampled))
        expected = [number for number, risk in enumerate(risks, 1) if number % CHECK_INTERVAL == 0 and risk > threshold]
        assert ([len(sampled)] if VERDICT in sampled else []) == expected[:1]
        check_record(scripted_runner, "x", capture.pop_signals("x", len(sampled)), len(sampled))
        lengths.append(len(sampled))
    assert (lengths[0], lengths[-1]) == (CHECK_INTERVAL, 24)


@pytest.mark.parametrize(("required", "tokens"), [(True, CHECK_INTERVAL), (False, 10)])
def test_answer_that_cannot_be_checked_ends_if_required(scripted_runner, capture, required, tokens):
    extra_args = encode_checks(RequestChecks(answer=[AnswerCheck("gone", 0.5, required)]))
    assert len(run_answer(scripted_runner, capture, extra_args, 10)) == tokens


def test_windows_of_a_prompt_are_exact_cold_and_cached(scripted_runner, capture, guard, monkeypatch):
    """Windows of 8 tokens; the last one has the remaining tokens, and the first block comes from the cache."""
    monkeypatch.setattr("trimtab.detection.signals.WINDOW", 2 * BLOCK)
    first, cached = (scripted_runner.add_request(name, 27) for name in ("first", "cached"))
    for new in (first, cached):
        new.sampling_params.extra_args = {RECORDED: True}
    scripted_runner.states["cached"][:BLOCK] = scripted_runner.states["first"][:BLOCK]
    blocks = list(range(1, 8))
    scripted_runner.run_step(capture, {"first": (0, 13, blocks)}, [first])
    scripted_runner.run_step(capture, {"first": (13, 14, blocks)})
    scripted_runner.run_step(capture, {"cached": (BLOCK, 23, [1, *range(11, 17)])}, [cached], finished=["first"])
    for name in ("first", "cached"):
        windows = torch.frombuffer(bytearray(capture.pop_signals(name, 1)["windows"]), dtype=torch.float32)
        states = scripted_runner.states[name]
        expected = torch.stack([states[0:8].mean(0), states[8:16].mean(0), states[16:27].mean(0)])
        torch.testing.assert_close(windows.view(-1, LAYERS, WIDTH), expected, rtol=1e-5, atol=1e-5)

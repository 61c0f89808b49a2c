"""vLLM worker that captures hidden states of selected layers while requests run."""

from typing import Any

from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2

from trimtab.engine.vllm_ext import patches
from trimtab.engine.vllm_ext.args import is_cpu_build
from trimtab.engine.vllm_ext.capture import SignalCapture
from trimtab.engine.vllm_ext.runners.adapter import RunnerAdapter, find_full_attention_group
from trimtab.engine.vllm_ext.runners.v1 import ModelRunnerV1Adapter
from trimtab.engine.vllm_ext.runners.v2 import ModelRunnerV2Adapter
from trimtab.engine.vllm_ext.worker import EmbeddingWorkerExtension

if is_cpu_build():
    from vllm.v1.worker.cpu_worker import CPUWorker as BaseWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as BaseWorker

# Maximum number of ended requests whose signals are kept until they are fetched.
KEEP = 1024


class CaptureWorker(BaseWorker, EmbeddingWorkerExtension):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
    """vLLM worker with a `SignalCapture`, configured by `layers` and `token_statistics` in `additional_config["trimtab"]`."""

    capture: SignalCapture | None = None

    def load_model(self, **options: Any) -> None:
        """Load the model and enable auxiliary hidden states. Layer k is `hidden_states[k]` of transformers.

        Raises:
            IncompatibleLibraryError: if vLLM's model runner has changed.
            ValueError: if the model class does not expose hidden states.
        """
        runner = build_adapter(self.model_runner)
        patches.REGISTER.check(runner.sampling_patch)
        runner.check_attributes()
        super().load_model(**options)
        runner.capture_layers(self._settings["layers"])

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocate the KV cache.

        Raises:
            IncompatibleLibraryError: if vLLM's model runner has changed.
            ValueError: if no layer has full attention, so that prompt sums cannot be cached.
        """
        find_full_attention_group(kv_cache_config)
        super().initialize_from_config(kv_cache_config)
        build_adapter(self.model_runner).check_attributes(allocated=True)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run one step and accumulate its signals."""
        # All ranks capture, although rank 0 would suffice: the logits of supplied answers are computed by all ranks together.
        capture = self._get_capture()
        capture.begin_step(scheduler_output)
        output = super().execute_model(scheduler_output)
        capture.accumulate_step()
        return output

    def trimtab_add_detector(self, card: str, tensors: bytes) -> None:
        """Add a detector from the result of `encode_detector`."""
        self._get_capture().detectors.add_detector(card, tensors)

    def trimtab_remove_detector(self, digest: str) -> None:
        """Remove a detector."""
        self._get_capture().detectors.remove_detector(digest)

    def trimtab_fetch_signals(self, queries: list[tuple[str, int, bool]]) -> list[dict[str, Any] | None] | None:
        """Return the signals of requests.

        Args:
            queries: engine id, number of answer tokens, and whether the answer has ended, of each request.

        Returns:
            One record per request: `psi` [L, 3d] and `history` [m, 3] as float32 bytes, `prompt_risks`, and, if they were
            recorded, `windows` [W, L, d] and `prompt` [L, 3d] as float32 and `running` [K, L, 3d] as float16 bytes. A record is
            None for an unknown request. Ranks other than 0 return None.
        """
        if self.rank != 0 or (capture := self.capture) is None:
            return None
        return [(capture.pop_signals if ended else capture.peek_signals)(request, tokens) for request, tokens, ended in queries]

    def _get_capture(self) -> SignalCapture:
        """Return the capture, which is created after the KV cache is allocated."""
        if self.capture is None:
            settings, runner = self._settings, build_adapter(self.model_runner)
            layers, statistics, verdict_token = (settings[name] for name in ("layers", "token_statistics", "verdict_token"))
            self.capture = SignalCapture(runner, layers, statistics, KEEP, verdict_token)
        return self.capture

    @property
    def _settings(self) -> dict[str, Any]:
        return self.vllm_config.additional_config["trimtab"]


def build_adapter(runner: Any) -> RunnerAdapter:
    """Build the adapter of a model runner of vLLM, by its class."""
    return ModelRunnerV2Adapter(runner) if isinstance(runner, GPUModelRunnerV2) else ModelRunnerV1Adapter(runner)

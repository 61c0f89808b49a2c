"""vLLM's own worker with taps: chosen layers' hidden states go to a `Capture` while requests run."""

from typing import Any

from trimtab.engine.vllm_ext import patches
from trimtab.engine.vllm_ext.args import is_cpu_build
from trimtab.engine.vllm_ext.capture import SignalCapture, find_full_attention_group
from trimtab.engine.vllm_ext.worker import EmbeddingWorkerExtension

if is_cpu_build():
    from vllm.v1.worker.cpu_worker import CPUWorker as Own
else:
    from vllm.v1.worker.gpu_worker import Worker as Own

# Requests whose signals are kept after their end where nobody asks for them.
KEEP = 1024


class CaptureWorker(Own, EmbeddingWorkerExtension):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
    """`additional_config["trimtab"]` holds `layers` and `history` (see `Capture`)."""

    capture: SignalCapture | None = None

    def load_model(self, **options: Any) -> None:
        """Load the model with its taps open: tap k is what transformers calls hidden_states[k]."""
        patches.REGISTER.check("patch_sampling")
        super().load_model(**options)
        model = self.model_runner.get_model()
        if not hasattr(model, "set_aux_hidden_state_layers"):
            raise ValueError(f"{type(model).__name__} has no taps for hidden states in vLLM; detectors cannot read it")
        model.set_aux_hidden_state_layers(tuple(self._settings["layers"]))
        self.model_runner.use_aux_hidden_state_outputs = True

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Make the KV cache, unless sums of prompts cannot stand beside it."""
        find_full_attention_group(kv_cache_config)
        super().initialize_from_config(kv_cache_config)

    def execute_model(self, scheduler_output: Any) -> Any:
        """One step, its rows folded in."""
        # On every rank, though one would have all that is needed: logits of given answers are computed by all together.
        if self.capture is None:
            settings = self._settings
            self.capture = SignalCapture(self.model_runner, len(settings["layers"]), settings["history"], KEEP)
        self.capture.begin_step(scheduler_output)
        output = super().execute_model(scheduler_output)
        if self.model_runner.execute_model_state is not None:
            self.capture.accumulate_step()
        return output

    def trimtab_fetch_signals(self, wanted: list[tuple[str, int, bool]]) -> list[dict[str, Any] | None] | None:
        """Signals of requests, each by its id with the number of its answer's tokens and whether it has ended; None for those
        that are not known. Float32 bytes: `psi` [L, 3d], `history` [m, 3]."""
        if self.rank != 0 or (capture := self.capture) is None:
            return None
        return [(capture.pop_signals if ended else capture.peek_signals)(request, tokens) for request, tokens, ended in wanted]

    @property
    def _settings(self) -> dict[str, Any]:
        return self.vllm_config.additional_config["trimtab"]

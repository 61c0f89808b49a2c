"""Server of ray.serve.llm on the HAProxy path, without batches of stream chunks.

python bench/peers/ray_llm.py --model FOLDER --name NAME --options JSON --host HOST --port PORT
"""

import argparse
import json
import os

# Ray reads these when it is imported.
os.environ |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}

import ray
import torch
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

CORES = 8
START_OPTIONS = {"dtype": "float32", "enforce_eager": True, "generation_config": "vllm", "distributed_executor_backend": "mp"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--options", type=json.loads, default={}, help="options of vLLM's engine")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    engine = START_OPTIONS | options.options
    on_cpu: dict[str, object] = {}
    if not torch.cuda.is_available():
        engine["block_size"] = 32
        on_cpu = {"accelerator_config": {"kind": "cpu"}, "placement_group_config": {"bundles": [{"CPU": 1}]}}
    config = LLMConfig(
        model_loading_config={"model_id": options.name, "model_source": options.model},
        engine_kwargs=engine,
        experimental_configs={"stream_batching_interval_ms": 0},
        deployment_config={"num_replicas": 1, "max_ongoing_requests": 256},
        **on_cpu,
    )
    # Logical cores: on a machine with two, the ingress would wait forever beside the engine.
    ray.init(num_cpus=CORES)
    serve.start(http_options={"host": options.host, "port": options.port})
    serve.run(build_openai_app({"llm_configs": [config]}), blocking=True)


if __name__ == "__main__":
    main()

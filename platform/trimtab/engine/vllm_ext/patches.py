"""A mend for vLLM on CPU: a request with a seed whose prompt comes in pieces stopped the engine.

After each piece vLLM throws away the token that it sampled, and winds the request's random generator back, which generators on
a CPU cannot do. Here such generators are set aside while their tokens are thrown away, so that there is nothing to wind back.
"""

from typing import Any

import numpy as np


def mend(runner: Any) -> None:
    """Keep seeded requests working on a vLLM model runner on CPU."""
    sample, book = runner._sample, runner._bookkeeping_sync
    aside: dict[int, Any] = {}

    def sampled(*args: Any, **kwargs: Any) -> Any:
        generators = runner.input_batch.generators
        thrown_away = np.flatnonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])
        aside.update({i: generators.pop(i) for i in thrown_away.tolist() if i in generators})
        return sample(*args, **kwargs)

    def booked(*args: Any, **kwargs: Any) -> Any:
        booked = book(*args, **kwargs)
        runner.input_batch.generators.update(aside)
        aside.clear()
        return booked

    runner._sample, runner._bookkeeping_sync = sampled, booked

"""Signals of the frozen model while it reads a prompt and generates an answer.

The module implements psi in two forms, on whole tensors and token by token, and phi on whole tensors, for collection, training
and serving (METHODS 2 and 3; it follows the paper unless stated otherwise). A prompt has psi of the same width, and no phi.

An answer of m tokens, including its end-of-turn token, has m states: those that its tokens were generated from. The first one
is the prompt's last state. The state of the last token is excluded, as no engine computes it (trimtab's choice).
Log-probability, entropy and margin refer to the model's own distribution, before temperature and penalties.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Parts of psi, in order.
PARTS = ("end", "answer", "contrast")
# Number of recent tokens that an accumulator stores; it can take back one fewer.
RECENT = 4
# Features of phi, in order.
TRACE = ("mean_logp", "min_logp", "std_logp", "mean_entropy", "mean_margin", "low_share", "tokens")
# Number of answer tokens between two checks of an unfinished answer, and of prompt tokens in a window (ours).
CHECK_INTERVAL, WINDOW = 4, 64
# Number of logit rows that fit into the cache of a CPU core.
CACHED_ROWS = 16


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of the next-token distribution at N positions.

    Attributes:
        logp: log-probability of the token that follows [N], float32, in nats.
        entropy: entropy of the whole distribution [N], float32, in nats.
        margin: difference of the two largest logits [N], float32.
    """

    logp: Tensor
    entropy: Tensor
    margin: Tensor


def compute_token_statistics(logits: Tensor, tokens: Tensor) -> TokenStatistics:
    """Compute token statistics from logits.

    Args:
        logits: logits [N, V].
        tokens: ids of the tokens [N] that were generated from them.
    """
    return gather_token_statistics(logits.float().log_softmax(-1), tokens)


def gather_token_statistics(logp: Tensor, tokens: Tensor) -> TokenStatistics:
    """Compute token statistics from log-probabilities, whose differences equal those of the logits.

    Args:
        logp: log-probabilities [N, V].
        tokens: ids of the tokens [N] that were generated from them.
    """
    # On a CPU, small chunks stay in the cache, which saves a third of the time.
    rows = CACHED_ROWS if logp.device.type == "cpu" else max(1, len(logp))
    parts = [_compute_chunk_statistics(*part) for part in zip(logp.split(rows), tokens.split(rows), strict=True)]
    if len(parts) == 1:
        return parts[0]
    return TokenStatistics(*(torch.cat(values) for values in zip(*((p.logp, p.entropy, p.margin) for p in parts), strict=True)))


def _compute_chunk_statistics(logp: Tensor, tokens: Tensor) -> TokenStatistics:
    top = logp.topk(2, -1).values
    # Masked tokens have probability 0 and an infinite logarithm, hence the clamp. `torch.special.entr` would compute the
    # logarithm again and take three times as long.
    weighted = logp.exp().mul_(logp.clamp(min=torch.finfo(logp.dtype).min))
    return TokenStatistics(logp.gather(-1, tokens[..., None])[..., 0], -weighted.sum(-1), top[..., 0] - top[..., 1])


def concatenate_states(end: Tensor, answer: Tensor, prompt: Tensor) -> Tensor:
    """Compute psi = [h_end ; mean_a h ; mean_a h - mean_q h].

    Args:
        end: last state of the answer [..., d].
        answer: mean of the answer's states [..., d].
        prompt: mean of the prompt's states [..., d].

    Returns:
        psi [..., 3d].
    """
    return torch.cat([end, answer, answer - prompt], -1)


def convert_to_prompt_states(psi: Tensor) -> Tensor:
    """Compute psi = [h_end ; mean_q h ; h_end - mean_q h] of a prompt from psi of an answer of one token.

    The only state of such an answer is the prompt's last state [ours].

    Args:
        psi: psi of the answer [..., 3d].

    Returns:
        psi of the prompt [..., 3d].
    """
    end, _, contrast = psi.chunk(3, -1)
    return torch.cat([end, end - contrast, contrast], -1)


def compute_window_means(block_sums: Tensor, size: int, total: Tensor, tokens: int) -> Tensor | None:
    """Compute the mean states of the windows of a prompt: `WINDOW` tokens each, the last one with the remaining tokens [ours].

    Args:
        block_sums: sums of the states of the full blocks of the prompt [B, L, d].
        size: number of tokens in a block.
        total: sum of the states of all tokens [L, d].
        tokens: number of tokens of the prompt.

    Returns:
        Means [W, L, d]; None for prompts with one window, whose mean is that of the prompt, and if windows are no whole blocks.
    """
    count = tokens // WINDOW
    if count < 2 or WINDOW % size:
        return None
    first = block_sums[: (count - 1) * WINDOW // size].unflatten(0, (count - 1, WINDOW // size)).sum(1)
    rest = (total - first.sum(0)) / (tokens - (count - 1) * WINDOW)
    return torch.cat([first / WINDOW, rest[None]])


def build_window_states(psi: Tensor, windows: Tensor) -> Tensor:
    """Build the features of the windows of a prompt, in which the mean of a window takes the place of that of the prompt.

    Args:
        psi: features of the prompt [L, 3d].
        windows: mean states of its windows [W, L, d].

    Returns:
        Features [W, L, 3d].
    """
    end = psi[:, : windows.shape[-1]].expand_as(windows)
    return torch.cat([end, windows, end - windows], -1)


def compute_trace_features(logp: Tensor, entropy: Tensor, margin: Tensor, low: float) -> Tensor:
    """Compute phi, the trace features named in `TRACE`, of an answer of m tokens.

    Args:
        logp: log-probabilities [m].
        entropy: entropies [m].
        margin: margins [m].
        low: log-probability tau_l below which a token counts as low.

    Returns:
        phi [7], float32.
    """
    logp = logp.double()
    return torch.stack(
        [
            logp.mean(),
            logp.min(),
            logp.std(correction=0),
            entropy.double().mean(),
            margin.double().mean(),
            (logp < low).double().mean(),
            logp.new_tensor(len(logp)),
        ]
    ).float()


def compute_running_features(history: Tensor, lengths: Tensor, low: float) -> Tensor:
    """Compute phi of the first tokens of N answers, as `compute_trace_features` does for one.

    Args:
        history: log-probability, entropy and margin of each token [N, m, 3]; values after the first tokens are ignored.
        lengths: numbers of first tokens [N], at least 1 and at most m.
        low: log-probability tau_l below which a token counts as low.

    Returns:
        phi [N, 7], float32.
    """
    inside = torch.arange(history.shape[1], device=history.device) < lengths[:, None]
    values = history.double().masked_fill(~inside[..., None], 0)
    count = lengths.double()
    mean_logp, mean_entropy, mean_margin = (values.sum(1) / count[:, None]).unbind(1)
    logp = values[..., 0]
    variance = ((logp - mean_logp[:, None]).masked_fill(~inside, 0) ** 2).sum(1) / count
    lowest = logp.masked_fill(~inside, torch.inf).min(1).values
    low_share = ((logp < low) & inside).sum(1) / count
    return torch.stack([mean_logp, lowest, variance.sqrt(), mean_entropy, mean_margin, low_share, count], 1).float()


class SignalAccumulator:
    """Accumulator of psi for many concurrent requests, in memory that is independent of the answer lengths.

    States can arrive in any split and order of requests. Results stay on `device` until they are requested. The last tokens of
    an answer can be taken back (fewer than `RECENT`), because engines generate a few tokens before they detect a stop.

    Args:
        slots: number of concurrent requests.
        layers: number of captured layers.
        width: width of the base model.
        device: device of the accumulator.
    """

    def __init__(self, slots: int, layers: int, width: int, device: torch.device | str = "cpu") -> None:
        self.prompt, self.answer = torch.zeros(2, slots, layers, width, device=device)
        self.prompt_tokens, self.tokens = torch.zeros(2, slots, dtype=torch.long, device=device)
        # Ring buffer of the states of the last RECENT tokens.
        self.states = torch.zeros(slots, RECENT, layers, width, device=device)

    def clear(self, slots: Tensor) -> None:
        """Reset the given slots [n]."""
        for buffer in (self.prompt, self.answer, self.prompt_tokens, self.tokens):
            buffer[slots] = 0

    def read(self, slots: Tensor, states: Tensor) -> None:
        """Add the states of prompt tokens.

        Args:
            slots: slot of each token [N]; a slot can occur several times.
            states: states [N, L, d].
        """
        self.read_sum(slots, states.float(), torch.ones_like(slots))

    def read_sum(self, slots: Tensor, sums: Tensor, tokens: Tensor) -> None:
        """Add sums of the states of prompt tokens.

        Args:
            slots: slot of each sum [N].
            sums: sums of states [N, L, d].
            tokens: number of tokens in each sum [N].
        """
        self.prompt.index_add_(0, slots, sums)
        self.prompt_tokens.index_add_(0, slots, tokens)

    def write(self, slots: Tensor, states: Tensor) -> None:
        """Add one answer token for each of N requests.

        Args:
            slots: slot of each request [N]; a slot can occur once only.
            states: states [N, L, d] that the tokens were generated from.
        """
        states = states.float()
        self.states[slots, self.tokens[slots] % RECENT] = states
        self.answer.index_add_(0, slots, states)
        self.tokens.index_add_(0, slots, torch.ones_like(slots))

    def take_back(self, slot: int, tokens: int) -> None:
        """Remove the last tokens of an answer.

        It can be called once per answer, as the values of older tokens are not stored.

        Args:
            slot: slot of the request.
            tokens: number of tokens, fewer than `RECENT`.

        Raises:
            ValueError: if `tokens` is out of range.
        """
        if not 0 <= tokens < RECENT:
            raise ValueError(f"cannot take back {tokens} tokens: the number must be from 0 to {RECENT - 1}")
        indices = (int(self.tokens[slot]) - 1 - torch.arange(tokens, device=self.tokens.device)) % RECENT
        self.answer[slot] -= self.states[slot, indices].sum(0)
        self.tokens[slot] -= tokens

    def taken(self, slot: int) -> "SignalAccumulator":
        """Return a copy of one slot as an accumulator with a single slot on the host."""
        layers, width = self.prompt.shape[1:]
        copy = SignalAccumulator(1, layers, width)
        for name, buffer in vars(copy).items():
            buffer.copy_(getattr(self, name)[slot : slot + 1])
        return copy

    def geometry(self, slots: Tensor) -> Tensor:
        """Compute psi [n, L, 3d] of the answers so far in the given slots [n]."""
        answer = self.answer[slots] / self.tokens[slots, None, None]
        end = self.states[slots, (self.tokens[slots] - 1) % RECENT]
        return concatenate_states(end, answer, self.prompt[slots] / self.prompt_tokens[slots, None, None])

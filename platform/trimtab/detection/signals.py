"""Signals: what the frozen model shows while it reads a prompt and writes an answer. One definition in two forms, from whole
tensors and token by token, for collecting, training and serving alike (METHODS 2 and 3; the paper's where not said otherwise).

An answer of m tokens (its end-of-turn token is one of them) has m states: those that its tokens were written from. The first
is the prompt's last; the last token's own state, which no engine computes, is none of them (ours). Log-probability, entropy
and margin are those of the model's own distribution, before temperature and penalties.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Parts of psi, and of phi in their order.
PARTS = ("end", "answer", "contrast")
# Tokens that an accumulator can take back, and one.
RECENT = 4
TRACE = ("mean_logp", "min_logp", "std_logp", "mean_entropy", "mean_margin", "low_share", "tokens")
# Rows of the vocabulary's width that a core's cache holds.
CACHED_ROWS = 16


@dataclass(frozen=True)
class TokenStatistics:
    """What N positions show of their next tokens: `logp` of the token that follows, `entropy` of the whole distribution, both
    in nats, and `margin`, the largest logit less the second; float32 [N] each."""

    logp: Tensor
    entropy: Tensor
    margin: Tensor


def compute_token_statistics(logits: Tensor, tokens: Tensor) -> TokenStatistics:
    """Read logits [N, V] at the tokens [N] that were written from them."""
    return gather_token_statistics(logits.float().log_softmax(-1), tokens)


def gather_token_statistics(logp: Tensor, tokens: Tensor) -> TokenStatistics:
    """The same from log-probabilities [N, V], whose differences are those of the logits."""
    # On a CPU a few rows at a time stay in its cache, which saves a third of the time.
    rows = CACHED_ROWS if logp.device.type == "cpu" else max(1, len(logp))
    parts = [_reading_of(*part) for part in zip(logp.split(rows), tokens.split(rows), strict=True)]
    if len(parts) == 1:
        return parts[0]
    return TokenStatistics(*(torch.cat(values) for values in zip(*((p.logp, p.entropy, p.margin) for p in parts), strict=True)))


def _reading_of(logp: Tensor, tokens: Tensor) -> TokenStatistics:
    top = logp.topk(2, -1).values
    # Tokens that a mask forbids have a probability of 0 and a logarithm that is not finite. `torch.special.entr` would take the
    # logarithm once more: three times the time.
    weighted = logp.exp().mul_(logp.clamp(min=torch.finfo(logp.dtype).min))
    return TokenStatistics(logp.gather(-1, tokens[..., None])[..., 0], -weighted.sum(-1), top[..., 0] - top[..., 1])


def concatenate_states(end: Tensor, answer: Tensor, prompt: Tensor) -> Tensor:
    """psi [..., 3d] = [h_end ; mean_a h ; mean_a h - mean_q h] from the answer's last state and the means over its states and
    over the prompt's, [..., d] each."""
    return torch.cat([end, answer, answer - prompt], -1)


def compute_trace_features(logp: Tensor, entropy: Tensor, margin: Tensor, low: float) -> Tensor:
    """phi [7] (see `TRACE`) of an answer's m tokens, from [m] each; a log-probability below `low`, tau_l, counts as low."""
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


class SignalAccumulator:
    """The same for many requests at once, token by token, in memory that does not grow with their answers.

    Each of `slots` requests has sums and last values for `layers` layers of `width`, on `device`; nothing is moved off it until
    it is asked for. `lows` are the tau_l [n] of the detectors that will ask. States come in any split and order of requests.
    The last `RECENT` tokens of an answer can be taken back: engines write a few before they learn of a stop.
    """

    def __init__(
        self, slots: int, layers: int, width: int, lows: Sequence[float] = (), device: torch.device | str = "cpu"
    ) -> None:
        self.prompt, self.answer = torch.zeros(2, slots, layers, width, device=device)
        self.prompt_tokens, self.tokens = torch.zeros(2, slots, dtype=torch.long, device=device)
        # Sums of logp, its square, entropy and margin.
        self.sums = torch.zeros(slots, 4, dtype=torch.float64, device=device)
        self.lows = torch.tensor(list(lows), device=device)
        self.below = torch.zeros(slots, len(lows), dtype=torch.long, device=device)
        # Of the last tokens, by their number modulo RECENT: state, addends of `sums`, and the lowest logp up to the token.
        self.states = torch.zeros(slots, RECENT, layers, width, device=device)
        self.addends = torch.zeros(slots, RECENT, 4, dtype=torch.float64, device=device)
        self.lowest = torch.full((slots, RECENT), float("inf"), device=device)

    def clear(self, slots: Tensor) -> None:
        """Forget the requests in these slots [n]."""
        for held in (self.prompt, self.answer, self.prompt_tokens, self.tokens, self.sums, self.below):
            held[slots] = 0
        self.lowest[slots] = float("inf")

    def read(self, slots: Tensor, states: Tensor) -> None:
        """States [N, L, d] of prompt tokens of the requests in `slots` [N]; a request may come any number of times."""
        self.read_sum(slots, states.float(), torch.ones_like(slots))

    def read_sum(self, slots: Tensor, sums: Tensor, tokens: Tensor) -> None:
        """Sums [N, L, d] of the states of so many prompt `tokens` [N] each."""
        self.prompt.index_add_(0, slots, sums)
        self.prompt_tokens.index_add_(0, slots, tokens)

    def write(self, slots: Tensor, states: Tensor, reading: TokenStatistics) -> None:
        """States [N, L, d] that the next tokens of the requests in `slots` [N] were written from, and the tokens' reading; a
        request comes at most once."""
        states, logp = states.float(), reading.logp.double()
        at, before = self.tokens[slots] % RECENT, (self.tokens[slots] - 1) % RECENT
        self.states[slots, at] = states
        self.addends[slots, at] = torch.stack([logp, logp.square(), reading.entropy, reading.margin], 1).double()
        self.lowest[slots, at] = torch.minimum(self.lowest[slots, before], reading.logp)
        self.answer.index_add_(0, slots, states)
        self.sums.index_add_(0, slots, self.addends[slots, at])
        self.below.index_add_(0, slots, (reading.logp[:, None] < self.lows).long())
        self.tokens.index_add_(0, slots, torch.ones_like(slots))

    def take_back(self, slot: int, tokens: int) -> None:
        """Forget the last `tokens` of an answer, fewer than RECENT; only once, as older ones are not held."""
        if not 0 <= tokens < RECENT:
            raise ValueError(f"only fewer than {RECENT} tokens can be taken back, not {tokens}")
        at = (int(self.tokens[slot]) - 1 - torch.arange(tokens, device=self.tokens.device)) % RECENT
        self.answer[slot] -= self.states[slot, at].sum(0)
        self.sums[slot] -= self.addends[slot, at].sum(0)
        self.below[slot] -= (self.addends[slot, at, :1] < self.lows).sum(0)
        self.tokens[slot] -= tokens

    def taken(self, slot: int) -> "SignalAccumulator":
        """A copy of one slot, as the only one of an accumulator on the host."""
        layers, width = self.prompt.shape[1:]
        copy = SignalAccumulator(1, layers, width, self.lows.tolist())
        for name, held in vars(copy).items():
            if name != "lows":
                held.copy_(getattr(self, name)[slot : slot + 1])
        return copy

    def geometry(self, slots: Tensor) -> Tensor:
        """psi [n, L, 3d] of the requests in `slots` [n], as far as they are written."""
        answer = self.answer[slots] / self.tokens[slots, None, None]
        end = self.states[slots, (self.tokens[slots] - 1) % RECENT]
        return concatenate_states(end, answer, self.prompt[slots] / self.prompt_tokens[slots, None, None])

    def trace(self, slots: Tensor, low: int = 0) -> Tensor:
        """phi [n, 7] of the requests in `slots` [n] with the tau_l number `low`."""
        tokens = self.tokens[slots].double()
        mean = self.sums[slots] / tokens[:, None]
        spread = (mean[:, 1] - mean[:, 0].square()).clamp(min=0).sqrt()
        lowest = self.lowest[slots, (self.tokens[slots] - 1) % RECENT]
        share = self.below[slots, low] / tokens
        return torch.stack([mean[:, 0], lowest, spread, mean[:, 2], mean[:, 3], share, tokens], 1).float()

"""What every scalar in ``metrics.jsonl`` means, and which of them are drawn in one chart.

``<step>`` stands for the name of any step of the chain.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache

CHARTS: Mapping[str, Mapping[str, str]] = {  # title of a chart -> scalars, with their meanings
    "Labels on validation": {
        "validation/macro_f1": "macro F1 of greedy chains; selects the checkpoint",
        "validation/accuracy": "share of correct labels",
        "validation/good_f1": "F1 of good labels against the others",
    },
    "Steps on validation": {
        "validation/step/<step>": "share of correct verdicts, where the step's truth is known",
        "validation/parse_rate": "share of chains that can be read",
        "validation/outcome": "mean of a user's outcome reward; selects where chains have no label",
    },
    "Reward of the rollouts": {
        "reward": "mean outcome reward that the advantages come from, in [0, 1]",
        "outcome": "mean of the verifier's outcome rewards, where a reward model's replace them",
        "reward/<step>": "mean reward of this step, over the rollouts where it is known",
    },
    "Process reward model": {
        "prm": "mean score of the process reward model, over all steps",
        "prm/<step>": "its mean score of this step, the probability that it is correct",
        "truth/<step>": "share of truly correct steps among those it scored",
    },
    "Disagreement of process reward model and verifier": {
        "disagreement": "share of the steps that both know on which they disagree; rises with the "
        "score when the policy exploits the model",
        "disagreement/<step>": "share of disagreement of both in this step",
        "prm/unreadable": "share of written steps for which the model gave no score",
    },
    "Entropy of the policy": {
        "entropy": "entropy of the next token, mean over the trained tokens, nats",
        "entropy/<step>": "mean of -log p over the tokens sampled in this step, nats",
    },
    "Paths in a group": {
        "paths": "mean number of different paths (a chain's verdicts) in a group",
    },
    "Groups without signal": {
        "zero_variance": "share of sampled groups whose rollouts the verifier cannot tell apart",
        "dynamic_sampling/zero_variance": "zero_variance after some groups were replaced",
        "self_imitation/share": "share of groups replaced by stored correct rollouts",
    },
    "Groups sampled beyond the batch": {
        "dynamic_sampling/rounds": "further batches sampled for this update",
        "dynamic_sampling/dropped": "groups that were sampled and carry no signal",
        "dynamic_sampling/surplus": "groups with signal that were not needed",
        "self_imitation/stored": "groups stored for self-imitation before the update",
    },
    "Verified steps with credit": {
        "credit/<step>": "share of verified steps with an advantage other than 0",
    },
    "Verified steps with credit of the wrong sign": {
        "wrong_sign/<step>": "share of verified steps that are correct with an advantage below 0, "
        "or wrong with one above 0",
    },
    "Loss": {
        "loss": "what the update minimizes, mean over its tokens (over pairs in DPO)",
        "pg_loss": "the clipped policy loss alone, without the KL term",
    },
    "KL to the reference": {
        "kl": "KL to the policy that training began with, mean over tokens, nats (k3)",
    },
    "Gradient": {
        "grad_norm": "norm of the whole gradient, before it is clipped",
    },
    "Preferences": {
        "accuracy": "share of DPO pairs whose chosen chain has the higher reward; of chains, or "
        "pairs of them, that an outcome reward model gets right",
        "margin": "mean DPO reward of the chosen chains minus that of the rejected ones",
        "chosen": "mean DPO reward of the chosen chains: beta times the log-ratio to the reference",
        "rejected": "mean DPO reward of the rejected chains",
    },
    "Ratio of trainer and sampler": {
        "ratio": "mean probability ratio of policy and behavior policy; 1 where they are one",
    },
    "Gap of trainer and sampler": {
        "logp_gap": "mean of |log-probability in training - in sampling|, nats",
        "logp_gap_max": "the largest of these gaps, of any token, nats",
    },
    "Clipped tokens": {
        "clip_low": "share of tokens whose gradient is clipped because the ratio fell too far",
        "clip_high": "share of tokens whose gradient is clipped because the ratio rose too far",
    },
    "Length of the completions": {
        "length": "mean tokens of a rollout",
    },
    "Form of the completions": {
        "parse_rate": "share of rollouts that can be read as a whole chain",
        "truncated": "share of rollouts that ran out of tokens",
    },
    "Tokens of an update": {
        "tokens": "tokens with a weight in the loss",
        "sampled_tokens": "tokens sampled for the update, those that were dropped included",
    },
    "Prompts and chains that were cut": {
        "cut_prompts": "prompts that did not fit into model.prompt_length, of the batch",
        "cut_chains": "chains too long for model.completion_length, which are not trained on",
        "left_out": "questions that did not fit into the process reward model's length",
    },
    "Questions to the process reward model": {
        "prm/queries": "different questions that it was asked",
        "prm/repeated": "questions that were asked before in the batch, and not asked again",
    },
}
TIMES: Mapping[str, str] = {  # not drawn: another machine has others
    "time/step": "seconds of the update, with its sampling",
    "time/tokens_per_s": "trained tokens per second",
    "time/preparation": "seconds before the first update of a start: filter, loading, sampling",
    "time/sample": "seconds of sampling",
    "time/verify": "seconds of parsing, rewards and credit",
    "time/score_steps": "seconds of the process reward model",
}
_ALL = {name: (title, text) for title, group in CHARTS.items() for name, text in group.items()} | {
    name: ("", text) for name, text in TIMES.items()
}


def meaning(name: str) -> str:
    """What a scalar means, in one line; "" if it is unknown."""
    return _ALL[_pattern(name)][1] if _pattern(name) else ""


def charts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The scalars of each chart, in the order above; those that nobody knows are in none."""
    known = {name: _pattern(name) for name in names}
    return {
        title: scalars
        for title, group in CHARTS.items()
        if (scalars := [n for pattern in group for n, found in known.items() if found == pattern])
    }


def step_of(name: str) -> str:
    """The step that a scalar is about; "" if it is about none."""
    return name.rpartition("/")[2] if _pattern(name).endswith("<step>") else ""


@cache
def _pattern(name: str) -> str:
    """The key of the tables above that a scalar goes by; "" if there is none."""
    if name in _ALL:
        return name
    places = re.fullmatch(r"(.+/)[^/]+", name)
    pattern = f"{places[1]}<step>" if places else ""
    return pattern if pattern in _ALL else ""

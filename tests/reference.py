"""The formulas of PPO in NumPy, a token at a time, in float64; written from the papers.

Arrays are [B, R], masks are prefixes of ones. What is behind a mask is never read.
"""

import math

import numpy as np


def lengths(mask):
    return [int(np.sum(np.asarray(row) != 0)) for row in mask]


def kl(logp, ref_logp, mask, kind="k1"):
    """Schulman 2020, "Approximating KL divergence"; r = ref / policy."""
    out = np.zeros(np.shape(mask))
    for b, n in enumerate(lengths(mask)):
        for t in range(n):
            p, q = float(logp[b][t]), float(ref_logp[b][t])
            r = math.exp(q - p)
            out[b, t] = {"k1": p - q, "k2": 0.5 * (p - q) ** 2, "k3": r - 1 - (q - p)}[kind]
    return out


def score_ended(score, ended, missing_eos, value):
    """PAPER: none, penalty (subtracted), fixed (score replaced)."""
    out = []
    for s, done in zip(score, ended, strict=True):
        if not done and missing_eos == "penalty":
            s = float(s) - value
        if not done and missing_eos == "fixed":
            s = value
        out.append(float(s))
    return out


def token_rewards(score, kl, mask, beta):
    """Eq. 2 of InstructGPT, per token: -beta KL everywhere, the score on the last live token."""
    out = np.zeros(np.shape(mask))
    for b, n in enumerate(lengths(mask)):
        for t in range(n):
            out[b, t] = -beta * kl[b][t]
            if t == n - 1:
                out[b, t] += float(score[b])
    return out


def gae(rewards, values, mask, gamma, lam):
    """Eq. 16 of Schulman et al. 2016 as printed: a sum of (gamma lam)^l delta, to the end."""
    advantages, returns = np.zeros(np.shape(mask)), np.zeros(np.shape(mask))
    for b, n in enumerate(lengths(mask)):
        v = [float(x) for x in values[b][:n]] + [0.0]  # worth nothing after the last token
        delta = [float(rewards[b][t]) + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            advantages[b, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
            returns[b, t] = advantages[b, t] + v[t]
    return advantages, returns


def live(x, mask):
    """The live entries, row after row."""
    return np.array([float(x[b][t]) for b, n in enumerate(lengths(mask)) for t in range(n)])


def mean(x, mask):
    values = live(x, mask)
    return sum(values) / len(values) if len(values) else 0.0


def whiten(x, mask, shift_mean):
    out, centre = np.zeros(np.shape(mask)), mean(x, mask)
    values = live(x, mask)
    deviation = math.sqrt(np.mean((values - centre) ** 2) + 1e-8) if len(values) else 1.0
    for b, n in enumerate(lengths(mask)):
        for t in range(n):
            out[b, t] = (float(x[b][t]) - centre) / deviation + (0 if shift_mean else centre)
    return out


def adapt_beta(beta, kl, episodes, target, horizon):
    """Eq. 3 of Ziegler et al. 2019."""
    error = min(max((kl - target) / target, -0.2), 0.2)
    return beta * (1 + error * episodes / horizon)


def ppo_clip(logp, old_logp, advantages, mask, clip):
    """Minus eq. 7 of Schulman et al. 2017."""
    out = np.zeros(np.shape(mask))
    for b, n in enumerate(lengths(mask)):
        for t in range(n):
            ratio, a = math.exp(float(logp[b][t]) - float(old_logp[b][t])), float(advantages[b][t])
            out[b, t] = -min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a)
    return out


def value_clip(values, old_values, returns, mask, clip):
    out = np.zeros(np.shape(mask))
    for b, n in enumerate(lengths(mask)):
        for t in range(n):
            v, old, g = float(values[b][t]), float(old_values[b][t]), float(returns[b][t])
            near = old + min(max(v - old, -clip), clip)
            out[b, t] = 0.5 * max((v - g) ** 2, (near - g) ** 2)
    return out


def experience(
    logp, ref_logp, values, mask, score, ended, beta, *, gamma=1.0, lam=0.95, missing_eos="none",
    missing_eos_value=1.0, clip_score=None, whiten_rewards=False, whiten_advantages=True,
):  # fmt: skip
    """(advantages, returns, metrics) of a rollout."""
    score = score_ended(score, ended, missing_eos, missing_eos_value)
    if clip_score is not None:
        score = [min(max(s, -clip_score), clip_score) for s in score]
    k1, k3 = (kl(logp, ref_logp, mask, kind) for kind in ("k1", "k3"))
    rewards = token_rewards(score, k1, mask, beta)
    paid = whiten(rewards, mask, shift_mean=False) if whiten_rewards else rewards
    advantages, returns = gae(paid, values, mask, gamma, lam)
    rows = [b for b, n in enumerate(lengths(mask)) if n]  # a padding row enters no mean

    def of_rows(x):
        return sum(float(x[b]) for b in rows) / len(rows) if rows else 0.0

    def summed(x):
        return of_rows([sum(float(x[b][t]) for t in range(n)) for b, n in enumerate(lengths(mask))])

    score_mean, return_mean = of_rows(score), mean(returns, mask)
    variance = mean((returns - return_mean) ** 2, mask)
    live_returns, live_values = live(returns, mask), live(values, mask)
    error = np.mean((live_returns - live_values) ** 2) if len(live_values) else 0.0
    metrics = {
        "objective/score": score_mean,
        "objective/score_std": math.sqrt(of_rows([(s - score_mean) ** 2 for s in score])),
        "objective/kl": summed(k1),
        "objective/kl_k3": summed(k3),
        "objective/beta": beta,
        "objective/reward": score_mean - beta * summed(k1),
        "objective/entropy": -summed(logp),
        "value/explained_variance": 1 - error / max(variance, 1e-8),
        "value/mean": mean(values, mask),
        "rollout/length": of_rows(lengths(mask)),
        "rollout/eos_fraction": of_rows([float(x) for x in ended]),
    }
    if whiten_advantages:
        advantages = whiten(advantages, mask, shift_mean=True)
    return advantages, returns, metrics

"""swap_loss.py: its losses and advantages against loops and by hand, then whole runs."""

import functools
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import run_ppo
import stopped
import swap_loss
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax import data, hf, miniature, models, rollout, sampler, sharding, train
from instructjax.data import sources
from instructjax.models import ModelConfig
from instructjax.scoring import RewardConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"
TOKENIZER = miniature.tokenizer()
IDS = {"eos_ids": (TOKENIZER.eos_token_id,), "pad_id": TOKENIZER.pad_token_id}
CONFIG = ModelConfig(len(TOKENIZER), 2, 16, heads=2, mlp_width=32, max_length=96, **IDS)
MODEL = {"config": CONFIG, "shard": models.unsharded}
PARAMS = jax.jit(functools.partial(models.init, CONFIG))(jax.random.key(0))
# Compiled whole, because compiling op by op takes longer.
token_logp = jax.jit(functools.partial(rollout.token_logp, config=CONFIG))
response_logp = jax.jit(functools.partial(swap_loss.response_logp, **MODEL))
FEW = ["--mesh", "data=4,fsdp=2", "--batch_size", "8", "--max_new_tokens", "6"]
FEW += ["--data.cache", "None", "--steps", "3"]

# ------------------------------------------------------------------------------------- advantages


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), samples=st.integers(2, 9))
def test_advantages_against_loops(seed, samples):
    scores = np.random.default_rng(seed).normal(size=(5, samples)).astype(np.float32) * 3
    grpo, rloo = swap_loss.grpo_advantages(scores), swap_loss.rloo_advantages(scores)
    for group, of_grpo, of_rloo in zip(scores, grpo, rloo, strict=True):
        values = [float(x) for x in group]
        mean = sum(values) / samples
        deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / samples)
        for i, x in enumerate(values):
            others = [y for j, y in enumerate(values) if j != i]
            assert of_rloo[i] == pytest.approx(x - sum(others) / len(others), abs=1e-9)
            assert of_grpo[i] == pytest.approx((x - mean) / (deviation + 1e-4), abs=1e-9)
    np.testing.assert_allclose(grpo.sum(1), 0, atol=1e-9)
    np.testing.assert_allclose(rloo.sum(1), 0, atol=1e-9)


def test_advantages_by_hand():
    # Group 1 has mean 3, deviations -2 -1 -1 4 and variance 22 / 4. Beside 7 the mean is 5 / 3.
    scores = np.array([[1, 2, 2, 7], [0, 0, 0, 4]], np.float32)
    grpo = swap_loss.grpo_advantages(scores, eps=0.0)
    np.testing.assert_allclose(grpo[0], np.array([-2, -1, -1, 4]) / math.sqrt(5.5))
    np.testing.assert_allclose(grpo[1], np.array([-1, -1, -1, 3]) / math.sqrt(3))
    rloo = swap_loss.rloo_advantages(scores)
    np.testing.assert_allclose(rloo, [[-8 / 3, -4 / 3, -4 / 3, 16 / 3], [-4 / 3] * 3 + [4]])


def test_raft_keeps_the_best_or_any():
    rewards = np.array([[1, 5, 3], [2, 0, 2], [-4, -3, -1]], np.float32)
    best = swap_loss.raft_advantages(rewards, "best")
    np.testing.assert_array_equal(best, [[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    first = swap_loss.raft_advantages(rewards, "random")
    np.testing.assert_array_equal(first, [[1, 0, 0]] * 3)


@pytest.mark.parametrize("samples", [2, 3, 7])
def test_equal_scores_have_no_advantage(samples):
    scores = np.full((4, samples), 0.1, np.float32) * np.arange(1, 5, dtype=np.float32)[:, None]
    assert (swap_loss.grpo_advantages(scores) == 0).all()
    assert (swap_loss.rloo_advantages(scores) == 0).all()


# ----------------------------------------------------------------------------- the online losses


def bound(loss, **keywords):
    """A loss of the script as (params, rows) -> (mean, (weight, metrics))."""
    return jax.jit(lambda params, rows: loss(params, rows, None, **keywords, **MODEL))


def sampled_rows(seed: int, rows: int = 6, prompt: int = 5, response: int = 7) -> dict:
    """Rows as `online` prepares them, with a reference near the policy. The last row is empty."""
    rng = np.random.default_rng(seed)
    length = np.append(rng.integers(1, response + 1, rows - 1), 0)
    batch = rollout.left_padded(rng.integers(1, 50, (rows, prompt)).tolist(), prompt)
    batch["mask_BR"] = np.arange(response) < length[:, None]
    batch["tokens_BR"] = rng.integers(1, 50, (rows, response)).astype(np.int32)
    logp = np.asarray(token_logp(PARAMS, batch))
    noise = 0.3 * rng.normal(size=(2, *logp.shape)).astype(np.float32) * batch["mask_BR"]
    batch["logp_BR"], batch["ref_logp_BR"] = logp + noise
    batch["advantage_B"] = rng.normal(size=rows).astype(np.float32)
    return batch


@pytest.mark.parametrize("seed", range(3))
def test_online_losses_against_loops(seed):
    rows = sampled_rows(seed)
    now = np.asarray(token_logp(PARAMS, rows))
    mask, advantage = rows["mask_BR"], rows["advantage_B"]
    advantages = np.repeat(advantage[:, None], mask.shape[1], axis=1)
    clipped = reference.ppo_clip(now, rows["logp_BR"], advantages, mask, 0.2)
    kl = reference.kl(now, rows["ref_logp_BR"], mask, "k3")
    of_grpo, of_rloo, of_raft, divergence = [], [], [], []
    for b, n in enumerate(reference.lengths(mask)):
        if n:  # the empty row enters no mean
            of_grpo.append(sum(clipped[b, t] + 0.5 * kl[b, t] for t in range(n)) / n)
            of_rloo.append(-float(advantage[b]) * sum(float(now[b, t]) for t in range(n)))
            of_raft += [-float(now[b, t]) for t in range(n)]
            divergence.append(sum(kl[b, t] for t in range(n)) / n)
    loss = bound(swap_loss.grpo_loss, beta=0.5)
    mean, (weight, metrics) = loss(PARAMS, rows)
    assert weight == len(of_grpo) == 5
    np.testing.assert_allclose(mean, np.mean(of_grpo), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/kl_k3"], np.mean(divergence), rtol=1e-5)
    mean, (weight, _) = bound(swap_loss.rloo_loss)(PARAMS, rows)
    assert weight == 5
    np.testing.assert_allclose(mean, np.mean(of_rloo), rtol=1e-5)
    mean, (weight, _) = bound(swap_loss.raft_loss)(PARAMS, rows)
    assert weight == len(of_raft) > 5
    np.testing.assert_allclose(mean, np.mean(of_raft), rtol=1e-5)


def gradient(loss, rows, **keywords):
    return jax.jit(jax.grad(lambda *batch: bound(loss, **keywords)(*batch)[0]))(PARAMS, rows)


def largest(tree) -> float:
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_without_advantages_the_first_update_has_no_gradient():
    rows = sampled_rows(0)
    rows["logp_BR"] = rows["ref_logp_BR"] = np.asarray(token_logp(PARAMS, rows))
    with_advantages = [largest(gradient(swap_loss.grpo_loss, rows, beta=0.04))]
    with_advantages += [largest(gradient(swap_loss.rloo_loss, rows))]
    rows["advantage_B"] = np.zeros_like(rows["advantage_B"])
    assert largest(gradient(swap_loss.grpo_loss, rows, beta=0.04)) < 1e-6
    assert largest(gradient(swap_loss.rloo_loss, rows)) == 0
    assert min(with_advantages) > 1e-2


@pytest.mark.parametrize(
    ("loss", "keywords"), [(swap_loss.grpo_loss, {"beta": 0.04}), (swap_loss.rloo_loss, {})]
)
def test_a_step_raises_the_better_response_and_lowers_the_worse(loss, keywords):
    """A row's logp changes with the sign of its advantage, to first order, in the first update."""
    rows = {name: x[:2] for name, x in sampled_rows(1).items()}
    rows["logp_BR"] = rows["ref_logp_BR"] = np.asarray(token_logp(PARAMS, rows))
    rows["advantage_B"] = np.array([1, -1], np.float32)
    grads = gradient(loss, rows, **keywords)
    moved = jax.tree.map(lambda x, g: x - 1e-3 * g, PARAMS, grads)
    change = token_logp(moved, rows) - rows["logp_BR"]
    better, worse = np.asarray(change.sum(1))
    assert better > 1e-4
    assert worse < -1e-4


# --------------------------------------------------------------------------------------------- DPO


def comparisons(ranks: list[list[int]]) -> dict:
    """A batch of `data.ComparisonRows` with the reference's log-probabilities, as `dpo` has it."""
    words, records = ("red", "blue", "wood", "stone"), []
    for n, ranks_of_prompt in enumerate(ranks):
        texts = tuple(f" {words[k]} {words[n % 4]}" for k in range(len(ranks_of_prompt)))
        prompt = f"say {words[n % 4]}"
        records.append(data.Record(str(n), {}, prompt, texts, tuple(ranks_of_prompt)))
    dataset = data.encode(records, "comparisons", TOKENIZER)
    rows = data.ComparisonRows(dataset, multiple=1)
    batch = {name: np.stack([rows[i][name] for i in range(len(rows))]) for name in rows.filler}
    batch["ref_logp_BK"] = np.asarray(response_logp(PARAMS, batch))
    return batch


RANKS = [[1, 2], [2, 1, 3], [1, 1, 2, 4], [1, 1]]


def test_response_logp_is_the_sum_over_the_response_alone():
    batch = comparisons(RANKS)
    logits_of = jax.jit(lambda params, tokens_BT: models.logits(params, CONFIG, tokens_BT))
    for b, ranks in enumerate(RANKS):
        prompt = batch["prompt_BP"][b][batch["prompt_mask_BP"][b]].tolist()
        for k in range(len(ranks)):
            response = batch["responses_BKR"][b, k][batch["response_mask_BKR"][b, k]].tolist()
            assert response[-1] == TOKENIZER.eos_token_id
            tokens_BT = np.zeros((1, 16), np.int32)  # the tokens after the response do not matter
            tokens_BT[0, : len(prompt + response)] = prompt + response
            logits = logits_of(PARAMS, tokens_BT)[0]
            logp = np.asarray(jax.nn.log_softmax(logits, axis=-1))
            summed = sum(logp[len(prompt) - 1 + t, token] for t, token in enumerate(response))
            assert batch["ref_logp_BK"][b, k] == pytest.approx(summed, abs=1e-4)
    assert (batch["ref_logp_BK"][batch["mask_BK"] == 0] == 0).all()


def test_dpo_loss_against_a_loop_over_pairs():
    batch = comparisons(RANKS)
    moved = jax.tree.map(lambda x: 1.3 * x, PARAMS)
    now, ref = response_logp(moved, batch), batch["ref_logp_BK"]
    gains, beta = np.asarray(now, np.float64) - ref, 0.7
    of_prompts, margins, right = [], [], []
    for b, ranks in enumerate(RANKS):
        pairs = [
            beta * (gains[b, win] - gains[b, lose])
            for win, lose in itertools.permutations(range(len(ranks)), 2)
            if ranks[win] < ranks[lose]
        ]
        if pairs:  # a prompt with ties alone enters no mean
            of_prompts.append(np.mean([math.log(1 + math.exp(-margin)) for margin in pairs]))
            margins.append(np.mean(pairs))
            right.append(np.mean([margin > 0 for margin in pairs]))
    mean, (weight, metrics) = bound(swap_loss.dpo_loss, beta=beta)(moved, batch)
    assert weight == len(of_prompts) == 3
    np.testing.assert_allclose(mean, np.mean(of_prompts), rtol=1e-4)
    np.testing.assert_allclose(metrics["dpo/margin"], np.mean(margins), rtol=1e-3)
    np.testing.assert_allclose(metrics["dpo/accuracy"], np.mean(right), rtol=1e-6)
    assert len({round(x, 3) for x in of_prompts}) == 3


def test_dpo_pairs_by_hand():
    # With beta 1 the first response gained ln 3 over the reference and the second gained nothing.
    # So the sigmoid of the margin is 3/4 for the first over the second, and 1/4 for the reverse.
    loss = swap_loss.dpo_pairs(jnp.array([[math.log(3) - 2, -5.0]]), jnp.array([[-2.0, -5.0]]), 1.0)
    expected = [[[math.log(2), math.log(4 / 3)], [math.log(4), math.log(2)]]]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_dpo_at_the_start_has_loss_log_2_and_raises_chosen_and_lowers_rejected():
    batch, beta = comparisons([[1, 2], [2, 1]]), 0.1
    value, _ = bound(swap_loss.dpo_loss, beta=beta)(PARAMS, batch)
    grads = gradient(swap_loss.dpo_loss, batch, beta=beta)
    assert float(value) == pytest.approx(math.log(2), rel=1e-6)
    # By hand, the derivative of a pair's loss is -beta / 2 in the log-probability of the chosen
    # response, and +beta / 2 in that of the rejected one. The mean over two prompts halves it.
    sign = np.array([[1, -1], [-1, 1]])
    of_logp = lambda logp_BK: swap_loss.dpo_pairs(logp_BK, batch["ref_logp_BK"], beta)  # noqa: E731
    of_pairs = jax.grad(lambda x: (of_logp(x)[0, 0, 1] + of_logp(x)[1, 1, 0]) / 2)
    np.testing.assert_allclose(of_pairs(batch["ref_logp_BK"]), -beta / 4 * sign, rtol=1e-6)
    # The responses share parameters, so both may rise. A small step surely widens their margin.
    moved = jax.tree.map(lambda x, g: x - 0.01 * g, PARAMS, grads)
    change = response_logp(moved, batch) - batch["ref_logp_BK"]
    assert ((change * sign).sum(1) > 1e-3).all()


# -------------------------------------------------------------------------- from the command line


@pytest.fixture(scope="module", autouse=True)
def small_world():
    with pytest.MonkeyPatch.context() as patch:
        small = {"demonstrations": 20, "comparisons": 60, "prompts": 40, "text": 60}
        patch.setattr(sources, "MINIATURE", small)
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A policy and a reward model of random weights."""
    out = tmp_path_factory.mktemp("models")
    hf.save(out / "sft", CONFIG, PARAMS, TOKENIZER)
    params, config = PARAMS, CONFIG
    config, params = models.with_scalar_head(params, config, jax.random.key(1))
    params["score"]["kernel"] = 10 * params["score"]["kernel"]
    hf.save(out / "rm", config, params, TOKENIZER)
    return out


def flags(start: Path, algorithm: str, out: Path) -> list[str]:
    given = [algorithm, "--model", f"{start}/sft", "--out", f"{out}", *FEW]
    given += ["--learning_rate", "1e-2"]
    return given if algorithm == "dpo" else [*given, "--reward", f"{start}/rm", "--samples", "2"]


def lines(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "throughput/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


@pytest.mark.parametrize("algorithm", ["dpo", "grpo", "rloo", "raft"])
def test_each_algorithm_from_its_command_to_its_export_and_resumed(
    start, algorithm, tmp_path, capsys
):
    """A run that was stopped after step 2 ends bit for bit as one that was not stopped."""
    out, again = tmp_path / "whole", tmp_path / "again"
    swap_loss.cli(flags(start, algorithm, out))
    said = capsys.readouterr().out
    assert f"{algorithm} finished in {out}" in said
    assert f"next: python experiments/sample.py --model {out}" in said
    files = ["config.json", "checkpoints", "curves.png", "report.html", "export/tokenizer.json"]
    files += ["results.json", "samples_after.jsonl"]
    assert [name for name in files if not (out / name).exists()] == []
    assert "win_rate" in json.loads((out / "results.json").read_text())[algorithm.upper()]
    rows = lines(out)
    assert [row["step"] for row in rows] == [1, 2, 3]
    if algorithm == "dpo":
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert rows[2]["loss"] != pytest.approx(math.log(2), abs=1e-5)
        assert rows[0]["dpo/margin"] == pytest.approx(0, abs=1e-5)
    else:
        if algorithm == "raft":
            assert rows[0]["objective/kept_score"] > rows[0]["objective/score"]
        assert rows[0]["objective/kl"] == pytest.approx(0, abs=2e-5)
        assert abs(rows[2]["objective/kl"]) > 1e-4
        assert {"objective/score", "rollout/length", "optim/grad_norm"} <= set(rows[2])
    config, params = hf.load(out / "export")
    assert not config.scalar_head
    before = hf.load(start / "sft")[1]
    changed = jax.tree.map(lambda x, y: (x != y).any(), params, before)
    assert all(jax.tree.leaves(changed))

    few = [*flags(start, algorithm, again), "--save_every", "1"]
    with stopped.before_step(3):
        swap_loss.cli(few)
    swap_loss.cli([*few, "--resume"])
    assert "resumed after step 2" in capsys.readouterr().out
    assert lines(again) == rows
    jax.tree.map(np.testing.assert_array_equal, hf.load(again / "export")[1], params)


def loaded(start: Path) -> swap_loss.Start:
    """The policy on a mesh, as the script loads it."""
    mesh = sharding.make_mesh(data=4, fsdp=2)
    config, params = hf.load(start / "sft", mesh)
    return swap_loss.Start(mesh, config, params, TOKENIZER)


def test_a_prompt_that_stands_twice_in_a_batch_gets_two_groups(start):
    config = swap_loss.GRPO(
        reward=RewardConfig((f"{start}/rm",)), batch_size=8, max_new_tokens=6, samples=2
    )
    algorithm = swap_loss.grpo(config, policy := loaded(start))
    batch = next(algorithm.stream.iterate())
    for name in ("prompts", "records", "indices"):
        batch[name][3] = batch[name][0]
    rows, _, _ = algorithm.prepare(policy.params, batch, jax.random.key(5))
    prompts, tokens = np.asarray(rows["prompt_BP"]), np.asarray(rows["tokens_BR"])
    np.testing.assert_array_equal(prompts[:2], prompts[6:8])
    assert (tokens[:2] != tokens[6:8]).any()


@pytest.mark.parametrize("keep", ["best", "random"])
def test_raft_learns_one_response_of_each_group(start, keep):
    options: Any = {"reward": RewardConfig((f"{start}/rm",)), "batch_size": 8, "samples": 3}
    options["max_new_tokens"], policy, key = 6, loaded(start), jax.random.key(5)
    raft = swap_loss.raft(swap_loss.RAFT(**options, keep=keep), policy)
    grpo = swap_loss.grpo(swap_loss.GRPO(**options), policy)
    batch = next(raft.stream.iterate())
    rows, tokens, metrics = raft.prepare(policy.params, batch, key)
    every, all_tokens, _ = grpo.prepare(policy.params, batch, key)
    advantage = np.asarray(every["advantage_B"]).reshape(8, 3)
    at = advantage.argmax(1) if keep == "best" else np.zeros(8, int)
    assert (at > 0).any() == (keep == "best")
    for name in ("tokens_BR", "mask_BR", "prompt_BP"):
        kept = np.asarray(every[name])[3 * np.arange(8) + at]
        np.testing.assert_array_equal(np.asarray(rows[name]), kept)
    assert tokens == all_tokens
    assert (metrics["objective/kept_score"] > metrics["objective/score"]) or keep == "random"


def test_evaluations_sample_independently_of_the_start(start, tmp_path, monkeypatch):
    """A win rate is of independent samples. All evaluations have the same noise."""
    keys, make = [], swap_loss.make_assess

    def make_assess(*args):
        assess = make(*args)
        return lambda params, key: keys.append(key) or assess(params, key)

    monkeypatch.setattr(swap_loss, "make_assess", make_assess)
    out = tmp_path / "run"
    swap_loss.cli([*flags(start, "dpo", out), "--steps", "2", "--eval_every", "1"])
    before, *others = [jax.random.key_data(key).tolist() for key in keys]
    assert len(others) == 3
    assert all(key == others[0] != before for key in others)
    steps = [row for row in lines(out) if "validation/kl" in row]
    assert [row["step"] for row in steps] == [0, 1, 2]
    assert steps[0]["validation/kl"] == pytest.approx(0, abs=1e-5)
    results = json.loads((out / "results.json").read_text())
    columns = ("kl", "length", "utility")
    kept = [{"step": x["step"]} | {c: x[f"validation/{c}"] for c in columns} for x in steps]
    assert results["evaluations"] == kept  # DPO has no score
    after = results["DPO"]
    assert steps[2]["validation/utility"] == pytest.approx(after["utility"])
    assert steps[2]["validation/kl"] == pytest.approx(after["kl"]) != steps[1]["validation/kl"]


@pytest.mark.parametrize("algorithm", ["dpo", "rloo"])
def test_figures_of_the_comparison(start, algorithm, tmp_path):
    """The gold judge is --gold, the score that of --reward."""
    (tmp_path / "mine.py").write_text(
        "def letters(prompts, responses, records):\n"
        "    assert [record.prompt for record in records] == list(prompts)\n"
        "    return [len(text) for text in responses]\n"
    )
    out = tmp_path / "run"
    gold = ["--gold", f"{start}/rm", f"{tmp_path}/mine.py:letters"]
    swap_loss.cli([*flags(start, algorithm, out), "--eval_prompts", "4", *gold])
    results = json.loads((out / "results.json").read_text())
    texts = [json.loads(line) for line in (out / "samples_after.jsonl").read_text().splitlines()]
    assert len(texts) == 4
    for name in ("start", algorithm.upper()):
        row, letters = results[name], np.mean([len(line[name]) for line in texts])
        assert 0 < abs(row["utility"] - letters) < 30  # the reward model's part
        if algorithm == "rloo":
            assert row["utility"] == pytest.approx(row["score"] + letters, abs=1e-4)
        else:
            assert "score" not in row


def test_the_kl_of_the_comparison_against_a_loop(start, monkeypatch):
    """log pi - log pi_ref of the policy's own tokens, EOS included, summed over a response."""
    policy, config = loaded(start), swap_loss.DPO(max_new_tokens=6, eval_prompts=3)
    held_out = data.load(config.data, "prompts", TOKENIZER, split="validation")
    held_out = swap_loss.prompts_that_fit(config, policy.model, held_out)
    trained = jax.tree.map(lambda x: 1.5 * x, policy.params)
    samples, sample = [], rollout.sample
    monkeypatch.setattr(
        rollout,
        "sample",
        lambda *args, **flags: samples.append(sample(*args, **flags)[0]) or (samples[-1], 1.0),
    )
    assess = swap_loss.make_assess(config, policy, None, None, held_out)
    np.testing.assert_allclose(assess(policy.params, jax.random.key(0)).kl_B, 0, atol=1e-4)
    after = assess(trained, jax.random.key(1))
    assert len(samples) == 2
    for i in range(3):
        prompt = held_out.prompt[i].tolist()
        ids = [*prompt, *samples[1]["tokens_BR"][i][samples[1]["mask_BR"][i]].tolist()]
        total = 0.0
        for sign, params in ((1, trained), (-1, policy.params)):
            logits = models.logits(params, CONFIG, jnp.array([ids]))
            logp = np.asarray(jax.nn.log_softmax(logits[0]))
            total += sign * sum(logp[t, ids[t + 1]] for t in range(len(prompt) - 1, len(ids) - 1))
        assert after.kl_B[i] == pytest.approx(total, abs=1e-3)
    assert np.abs(after.kl_B).max() > 0.01


def test_the_flags_of_the_model_are_honoured(start, tmp_path):
    """The model has no tokenizer of its own. In bfloat16 KL is still 0 before the first update."""
    hf.save(tmp_path / "model", CONFIG, PARAMS)
    few = [*flags(start, "grpo", tmp_path / "grpo"), "--model", f"{tmp_path}/model"]
    few += ["--tokenizer", f"{start}/sft", "--model_dtype", "bfloat16", "--steps", "1"]
    seen = []

    def grpo(config, policy, whole=swap_loss.grpo):
        seen.append(policy.model)
        return whole(config, policy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swap_loss, "grpo", grpo)
        swap_loss.cli([*few, "--remat", "full", "--unroll", "2"])
    assert [(model.dtype, model.remat, model.unroll) for model in seen] == [("bfloat16", "full", 2)]
    assert lines(tmp_path / "grpo")[0]["objective/kl"] == 0


@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
def test_microbatches_change_the_memory_and_not_the_update(start, algorithm, tmp_path, monkeypatch):
    """Forward passes and gradients are of parts of the batch."""
    parts, make_step = [], train.make_train_step
    rows: list[int] = []
    token_logp = rollout.token_logp

    def make(loss_fn, tx, microbatches=1, shardings=None):
        parts.append(microbatches)
        return make_step(loss_fn, tx, microbatches, shardings)

    def spy(params, batch, **model):
        rows.append(len(batch["mask_BR"]))
        return token_logp(params, batch, **model)

    monkeypatch.setattr(train, "make_train_step", make)
    monkeypatch.setattr(rollout, "token_logp", spy)
    updates, largest = [], []
    for microbatches in (1, 2):
        out = tmp_path / f"{microbatches}"
        few = [*flags(start, algorithm, out), "--batch_size", "16", "--steps", "1"]
        rows.clear()
        swap_loss.cli([*few, "--microbatches", f"{microbatches}", "--eval_prompts", "2"])
        largest.append(max(rows))
        updates.append(lines(out)[0])
    assert parts == [1, 2]
    assert largest[0] == 2 * largest[1]
    for name in ("loss", "optim/grad_norm"):
        assert updates[0][name] == pytest.approx(updates[1][name], rel=1e-4, abs=1e-6)


def test_sample_batch_and_eval_prompts(start, tmp_path, monkeypatch):
    """Smaller parts of a batch are sampled at a time, and change no token."""
    counts, generate = [], sampler.generate

    def spy(params, config, prompts, *args, **settings):
        counts.append(len(prompts))
        return generate(params, config, prompts, *args, **settings)

    monkeypatch.setattr(sampler, "generate", spy)
    rows = []
    for extra in ([], ["--sample_batch", "2"]):
        counts.clear()
        out = tmp_path / f"{len(extra)}"
        few = [*flags(start, "grpo", out), "--steps", "1", "--eval_prompts", "3", *extra]
        swap_loss.cli(few)
        assert counts == ([2, 1, 2, 2, 2, 2, 2, 1] if extra else [3, 8, 3])
        assert len((out / "samples_after.jsonl").read_text().splitlines()) == 3
        rows.append(lines(out)[0])
    assert rows[0]["rollout/length"] == rows[1]["rollout/length"]
    assert rows[0]["objective/score"] == pytest.approx(rows[1]["objective/score"], abs=1e-5)


def test_dpo_on_pairs_of_a_file(start, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    pair = {"chosen": "the fenfox.", "rejected": "no."}
    rows = [json.dumps(pair | {"prompt": "list two animals" + n * " please"}) for n in range(60)]
    file.write_text("\n".join(rows))
    swap_loss.cli([*flags(start, "dpo", tmp_path / "dpo"), "--data", f"jsonl:{file}"])
    assert "by gold" not in capsys.readouterr().out
    assert lines(tmp_path / "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    exported = json.loads((tmp_path / "dpo/export/tokenizer_config.json").read_text())
    assert exported["instructjax_template"] == "plain"


def test_a_group_is_the_responses_to_one_prompt(start, tmp_path):
    """A reward of the prompt alone, without KL, is equal within a group, so nothing is learned."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def length(prompts, responses, records):\n"
        "    assert list(prompts) == [record.prompt for record in records]\n"
        "    return [len(prompt) / 8 for prompt in prompts]\n"
    )
    out = tmp_path / "rloo"
    few = [*flags(start, "rloo", out), "--samples", "4", "--beta", "0", "--steps", "1"]
    swap_loss.cli([*few, "--reward", f"{file}:length"])
    assert lines(out)[0]["objective/score"] > 1
    assert lines(out)[0]["optim/grad_norm"] == 0
    before, after = (hf.load(path)[1] for path in (start / "sft", out / "export"))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_the_kl_is_in_the_reward_of_rloo_and_in_the_loss_of_grpo(monkeypatch):
    """RLOO compares 4 - 0.5 * 2 = 3 with 1 - 0.5 * 0 = 1. GRPO's advantage has no KL."""
    monkeypatch.setattr(swap_loss, "online", lambda config, start, *plugged, **flags: plugged)
    score, kl = np.array([[4.0, 1.0]]), np.array([[2.0, 0.0]])
    nothing: Any = None
    advantage, _ = swap_loss.rloo(swap_loss.RLOO(beta=0.5), nothing)
    np.testing.assert_allclose(advantage(score, kl), [[2, -2]])
    advantage, loss = swap_loss.grpo(swap_loss.GRPO(beta=0.5), nothing)
    np.testing.assert_allclose(advantage(score, kl), [[1, -1]], rtol=1e-3)
    assert loss.keywords == {"beta": 0.5}
    for beta, kept in ((0.0, [[1, 0]]), (2.0, [[0, 1]])):  # 4 - 2 * 2 = 0 is less than 1
        advantage, _ = swap_loss.raft(swap_loss.RAFT(beta=beta), nothing)
        np.testing.assert_allclose(advantage(score, kl), kept)


def test_wrong_usage(start, tmp_path, capsys):
    few = flags(start, "grpo", tmp_path / "x")
    for words, named in (
        ([], "one of {dpo, grpo, rloo, raft}"),
        (["grpo", "--samples", "1"], "--samples 1"),
        (["grpo", "--sample_batch", "5"], "--batch_size 32: not a multiple of --sample_batch 5"),
        (["dpo", "--microbatches", "0"], "--microbatches 0: must be at least 1"),
        (["dpo", "--eval_prompts", "0"], "--eval_prompts 0: must be at least 1"),
        ([*few, "--batch_size", "12"], "--batch_size 12: does not divide over 8 shards"),
        ([*few, "--model", f"{start}/rm"], "rm: a reward model, not a language model"),
    ):
        with pytest.raises(SystemExit) as stop:
            swap_loss.cli(words)
        assert stop.value.code == 2
        assert named in " ".join(capsys.readouterr().err.replace("│", " ").split())


# -------------------------------------------------------------------------- run_ppo.py --loss FILE


def ppo_flags(start: Path, out: Path, loss: str) -> list[str]:
    given = ["--model", f"{start}/sft", "--reward", f"{start}/rm", "--out", f"{out}", *FEW]
    given += ["--steps", "1", "--ppo.minibatch", "8", "--ppo.buckets", "1", "--ptx.coef", "0"]
    given += ["--eval_prompts", "8", "--final_prompts", "8", "--pretrain.cache", "None"]
    return [*given, "--loss", loss]


def test_run_ppo_minimises_the_loss_of_a_file(start, tmp_path):
    """A loss without a gradient leaves the policy unchanged. The value net still learns."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def flat(logp_BR, old_logp_BR, advantages_BR, clip):\n"
        "    assert logp_BR.shape == old_logp_BR.shape == advantages_BR.shape\n"
        "    return 0 * logp_BR + clip\n"
    )
    out = tmp_path / "ppo"
    run_ppo.cli(ppo_flags(start, out, f"{file}:flat"))
    row = next(row for row in lines(out) if row["step"] == 1)
    assert row["policy/loss"] == pytest.approx(0.2)
    assert row["optim/grad_norm"] == 0
    assert row["optim/value_grad_norm"] > 0
    before, after = (hf.load(path)[1] for path in (start / "sft", out / "export"))
    # The export is a moving average, which rounds.
    close = functools.partial(np.testing.assert_allclose, atol=1e-7)
    jax.tree.map(close, after, before)


def test_run_ppo_refuses_a_loss_of_another_shape_and_names_the_file(start, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def reduced(logp_BR, old_logp_BR, advantages_BR, clip):\n"
        "    return -(logp_BR * advantages_BR).mean()\n"
    )
    with pytest.raises(ValueError, match=rf"--loss {file}:reduced: returned shape \[\] .*\[8, 6\]"):
        run_ppo.cli(ppo_flags(start, tmp_path / "ppo", f"{file}:reduced"))


def test_the_loss_of_the_docs(tmp_path):
    """The file that docs/swap-a-loss.md shows, at ratios within the bounds and beyond both."""
    text = (DOCS / "swap-a-loss.md").read_text()
    file = tmp_path / "my_losses.py"
    file.write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    loss = run_ppo.load_loss(f"{file}:clip_higher")
    ratios = jnp.array([[1.0, 1.25, 1.5, 0.5], [1.0, 0.9, 1.5, 0.5]])
    advantages = jnp.array([[2.0] * 4, [-2.0] * 4])
    got = loss(jnp.log(ratios), jnp.zeros((2, 4)), advantages, 0.2)
    expected = [[-2, -2.5, -2.56, -1], [2, 1.8, 3, 1.6]]
    np.testing.assert_allclose(got, expected, rtol=1e-6)

"""A pretrained chat model: sampling, export, losses and scores as transformers on torch has them.

INSTRUCTJAX_REAL_MODEL=DIR pytest -n0 tests/test_real_model.py
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import data, hf, models, ppo, rollout, sampler, sft

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

QUESTIONS = [
    "What is the capital of France?", "Name three colours.", "How many legs has a spider?",
    "Write a haiku about rain.", "What is 7 times 8?", "Who wrote Hamlet?",
    "Explain photosynthesis to a child.", "Translate 'good morning' into Spanish.",
    "What is the opposite of cold?", "Give me a recipe for pancakes.",
    "Why is the sky blue?", "Name a large mammal.", "What is the boiling point of water?",
    "Tell me a joke.", "List the days of the week.", "What is a prime number?",
    "How do I boil an egg?", "Describe a cat in one sentence.", "What is the largest planet?",
    "Write a title for a story about a dragon.",
]  # fmt: skip


@pytest.fixture(scope="module")
def loaded(real_model):
    """(config, params, tokenizer)"""
    config, params = hf.load(real_model)
    return config, params, hf.load_tokenizer(real_model)


@pytest.fixture(scope="module")
def torch_lm(real_model):
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(real_model, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def prompts(loaded):
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    encode = functools.partial(loaded[2].apply_chat_template, add_generation_prompt=True)
    return [encode(chat, return_dict=False) for chat in chats]


@pytest.fixture(scope="module")
def answers(torch_lm, prompts):
    """Padded prompts and 40 greedy tokens of transformers: (tokens, mask, responses)."""
    rows = rollout.left_padded(prompts, max(map(len, prompts)))
    tokens, mask = rows["prompt_BP"], rows["prompt_mask_BP"].astype(np.int64)
    with torch.no_grad():
        whole = torch_lm.generate(
            torch.tensor(tokens).long(), attention_mask=torch.tensor(mask),
            do_sample=False, max_new_tokens=40,
        ).numpy()  # fmt: skip
    P = tokens.shape[1]
    return whole, np.pad(mask, ((0, 0), (0, whole.shape[1] - P)), constant_values=1), whole[:, P:]


def test_greedy_tokens(loaded, prompts, answers):
    config, params, _ = loaded
    sample = sampler.generate(
        params, config, prompts, jax.random.key(0), max_new_tokens=40, top_k=1
    )
    tokens, mask = np.asarray(sample.tokens_BR), np.asarray(sample.mask_BR)
    assert mask.sum() > 400
    for row, (response, live) in enumerate(zip(tokens, mask, strict=True)):
        n = live.sum()
        np.testing.assert_array_equal(response[:n], answers[2][row, :n], err_msg=QUESTIONS[row])
        assert n == 40 or response[n - 1] in config.eos_ids


def test_logits_and_export(loaded, torch_lm, answers, tmp_path):
    config, params, tokenizer = loaded
    tokens, mask, _ = (x[:8] for x in answers)
    live = mask.astype(bool)
    got = np.asarray(jax.jit(models.logits, static_argnums=1)(params, config, tokens, live))
    inputs = {
        "input_ids": torch.tensor(tokens),
        "attention_mask": torch.tensor(mask),
        "position_ids": torch.tensor(np.maximum(np.cumsum(mask, -1) - 1, 0)),
    }
    with torch.no_grad():
        want = torch_lm(**inputs).logits.numpy()
    assert np.abs(got - want)[live].max() < 2e-3
    assert want[live].std() > 1

    hf.save(tmp_path, config, params, tokenizer)
    exported = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        assert np.array_equal(exported(**inputs).logits.numpy(), want)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "Hello  there,\n<|im_end|> ünïcode"}]
    ids = (t.apply_chat_template(chat, return_dict=False) for t in (tokenizer, again))
    assert len(set(map(tuple, ids))) == 1


def test_loss_of_demonstrations(loaded, torch_lm, tmp_path):
    """One packed row: the mean over all responses of torch's cross-entropy of each alone."""
    config, params, tokenizer = loaded
    file = tmp_path / "demonstrations.jsonl"
    demonstrations = [
        {"prompt": [{"role": "user", "content": question}], "completion": completion}
        for question, completion in [
            (QUESTIONS[0], "Paris."),
            (QUESTIONS[1], "Red, blue\nand green."),
            (QUESTIONS[2], "Eight"),
        ]
    ]
    file.write_text("\n".join(map(json.dumps, demonstrations)))
    source = data.DataConfig(spec=f"jsonl:{file}", cache=None)
    rows = data.PackedRows(data.load(source, "demonstrations", tokenizer), 160)
    batch = {name: array[None] for name, array in rows[0].items()}
    loss = functools.partial(sft.loss_fn, config=config)
    mean, (count, _) = jax.jit(loss)(params, batch, None)

    total, targets = 0.0, 0
    for segment in range(1, 4):
        here = batch["segments_BT"][0] == segment
        tokens = torch.tensor(batch["tokens_BT"][0][here])[None].long()
        counted = torch.tensor(batch["mask_BT"][0][here])
        with torch.no_grad():
            logits = torch_lm(tokens).logits[0]
        total += torch.nn.functional.cross_entropy(
            logits[:-1][counted[1:]], tokens[0, 1:][counted[1:]], reduction="sum"
        ).item()
        targets += int(counted.sum())
    assert count == targets > 8
    assert abs(mean - total / targets) < 1e-4
    assert mean > 0.1


def test_scores_of_a_reward_model(loaded, answers, tmp_path):
    config, params, tokenizer = loaded
    config, params = models.with_scalar_head(params, config, jax.random.key(1))
    params["score"]["bias"] = jnp.float32(1.75)
    hf.save(tmp_path, config, params, tokenizer)
    lengths = np.array([30, 45, 50, 38])
    tokens = answers[0][:4, -50:].astype(np.int32)
    live = np.arange(50) < lengths[:, None]
    tokens[np.arange(4), lengths - 1] = config.eos_ids[0]
    hidden = jax.jit(models.apply, static_argnums=1)(params, config, tokens, mask_BT=live)
    ours = np.asarray(models.scalars(params, config, hidden))[np.arange(4), lengths - 1]

    exported = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    padded = np.where(live, tokens, exported.config.pad_token_id)
    with torch.no_grad():
        scores = (
            exported(torch.tensor(padded).long(), attention_mask=torch.tensor(live).long())
            .logits[:, 0]
            .numpy()
        )
    assert ours.std() > 0.01
    np.testing.assert_allclose(scores + exported.config.reward_bias, ours, atol=1e-3)


def test_first_update_of_ppo(loaded, prompts):
    """KL 0 and ratio 1 with the sampler's log-probabilities, and a gradient."""
    config, params, _ = loaded
    few = prompts[:4]
    sample = sampler.generate(params, config, few, jax.random.key(0), max_new_tokens=8)
    rows = rollout.left_padded(few, max(map(len, few)))
    for name in ("tokens_BR", "mask_BR", "logp_BR"):
        rows[name] = np.asarray(getattr(sample, name))
    reference = jax.jit(functools.partial(rollout.token_logp, config=config))(params, rows)
    zeros, score = np.zeros(rows["mask_BR"].shape, np.float32), np.arange(4, dtype=np.float32)
    outputs, metrics = ppo.make_experience(
        logp_BR=rows["logp_BR"], ref_logp_BR=reference, value_BR=zeros, mask_BR=rows["mask_BR"],
        score_B=score, ended_B=rollout.ended(rows, config.eos_ids), beta=0.02,
    )  # fmt: skip
    assert abs(metrics["objective/kl"]) < 1e-3
    assert abs(metrics["objective/score"] - 1.5) < 1e-6
    rows["advantage_BR"] = np.asarray(outputs["advantage_BR"])
    loss = functools.partial(ppo.policy_loss, config=config)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (mean, (tokens, loss_metrics)), grads = run(params, rows, None)
    assert tokens == rows["mask_BR"].sum()
    assert abs(loss_metrics["policy/ratio"] - 1) < 1e-3
    assert loss_metrics["policy/clip_fraction"] == 0
    assert abs(mean + rows["advantage_BR"][rows["mask_BR"]].mean()) < 1e-3
    norm = float(jnp.linalg.norm(grads["final_norm"]["scale"]))
    assert np.isfinite(norm)
    assert norm > 0

"""Responses that are sampled in parts are those of one call."""

import jax
import numpy as np
import pytest

from instructjax import models, sampler, sharding
from instructjax.evaluation.responses import sample_in_parts
from instructjax.models import ModelConfig

CONFIG = ModelConfig(
    vocab_size=64, layers=1, width=16, heads=2, mlp_width=32, max_length=32, eos_ids=(3,)
)


@pytest.mark.parametrize("samples", [1, 2])
def test_parts_give_the_tokens_of_one_call(samples):
    params, key = models.init(CONFIG, jax.random.key(0)), jax.random.key(1)
    prompts = [[5 + i] * (1 + i) for i in range(5)]
    mesh = sharding.make_mesh(data=2, fsdp=4)
    settings = {"max_new_tokens": 6, "samples_per_prompt": samples, "mesh": mesh}
    for indices in (None, [7, 0, 7, 3, 9]):
        whole = sampler.generate(params, CONFIG, prompts, key, indices=indices, **settings)
        rows, live = sample_in_parts(
            params, CONFIG, prompts, key, size=2, indices=indices, **settings
        )
        np.testing.assert_array_equal(rows["tokens_BR"], whole.tokens_BR)
        np.testing.assert_array_equal(rows["mask_BR"], whole.mask_BR)
        np.testing.assert_allclose(rows["logp_BR"], whole.logp_BR, atol=1e-4)
        assert rows["tokens_BR"].shape == (5 * samples, 6)
        assert 0 < live <= 1

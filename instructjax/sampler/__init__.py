"""The sampler: prompts in, a Rollout out.

sample.py   generate: a batch of prompts
session.py  stream: one prompt, token by token; Session: one prompt after another
decode.py   the compiled loop: prefill, one token per step in each slot, refill of idle slots
draw.py     one token from its logits: restrict, add noise, take the largest
"""

from instructjax.sampler.decode import Rollout, Settings
from instructjax.sampler.sample import (
    buckets,
    generate,
    generate_on_device,
    pad_prompts,
    plan,
)
from instructjax.sampler.session import Session, stream

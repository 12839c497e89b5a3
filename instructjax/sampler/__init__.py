"""The sampler: prompts in, a Rollout out.

sample.py   generate (a batch of prompts) and stream (one prompt, token by token)
decode.py   the compiled loop: prefill, one token in each slot, refill of slots that are done
draw.py     one token from its logits: restrict, add noise, take the largest
"""

from instructjax.sampler.decode import Rollout
from instructjax.sampler.sample import buckets, generate, generate_on_device, plan, stream

__all__ = ["Rollout", "buckets", "generate", "generate_on_device", "plan", "stream"]

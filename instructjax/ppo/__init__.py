"""PPO-ptx (InstructGPT, section 3.5 and App. C.4): from a scored rollout to an update.

experience.py   make_experience: rewards, advantages and returns of a whole rollout
objectives.py   policy_loss, value_loss, ptx_loss: what an update minimises
update.py       PPOState; Gradient, summed over batches; make_step: an optimizer step and EMA
"""

from instructjax.ppo.experience import make_experience
from instructjax.ppo.objectives import (
    PolicyLoss,
    head_values,
    joint_loss,
    policy_loss,
    ptx_loss,
    value_loss,
    with_value_head,
    without_value_head,
)
from instructjax.ppo.update import Gradient, PPOState, make_step

__all__ = [
    "Gradient",
    "PPOState",
    "PolicyLoss",
    "head_values",
    "joint_loss",
    "make_experience",
    "make_step",
    "policy_loss",
    "ptx_loss",
    "value_loss",
    "with_value_head",
    "without_value_head",
]

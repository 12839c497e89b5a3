"""PPO-ptx (InstructGPT, section 3.5 and App. C.4): from a scored rollout to an update.

experience.py   make_experience: rewards, advantages and returns of a whole rollout
objectives.py   policy_loss, value_loss, ptx_loss: what is minimised, over rows as in responses.py
update.py       make_update: gradients of a minibatch and of pretraining text, one update, EMA
"""

from instructjax.ppo.experience import make_experience
from instructjax.ppo.objectives import (
    PolicyLoss,
    ValueLoss,
    head_values,
    joint_loss,
    policy_loss,
    ptx_loss,
    value_loss,
    with_value_head,
    without_value_head,
)
from instructjax.ppo.update import PPOState, Term, Update, gradient, make_adder, make_update

__all__ = [
    "PPOState",
    "PolicyLoss",
    "Term",
    "Update",
    "ValueLoss",
    "gradient",
    "head_values",
    "joint_loss",
    "make_adder",
    "make_experience",
    "make_update",
    "policy_loss",
    "ptx_loss",
    "value_loss",
    "with_value_head",
    "without_value_head",
]

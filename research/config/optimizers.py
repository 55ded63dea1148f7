"""Temper's own optimizers and schedules, with their options."""

from research.config.schema import number
from research.core.optim import Rule, Schedule, adamw, cosine, linear, sgd

_DECAY = number(0.1, "Decoupled weight decay, on matrices.", 0, None, "a negative decay grows")
_BELOW_ONE = "at 1 the mean never moves"
_END = {"end_fraction": number(0.1, "Of the peak rate, reached after the last update.", 0, 1)}

ADAMW = Rule(
    {
        "b1": number(0.9, "Decay of the mean.", 0, 0.9999999, _BELOW_ONE),
        "b2": number(0.95, "Decay of the second moment.", 0, 0.9999999, _BELOW_ONE),
        "eps": number(1e-8, "Added outside the root.", 1e-20, None, "Adam divides by it"),
        "weight_decay": _DECAY,
    },
    adamw,
)
SGD = Rule({"momentum": number(0.0, "Decay of the velocity.", 0, 0.9999999), "weight_decay": _DECAY}, sgd)
COSINE = Schedule(_END, cosine)

PROVIDES = {
    "optimizer": {"adamw": ADAMW, "sgd": SGD},
    "schedule": {
        "cosine": COSINE,
        "linear": Schedule(_END, linear),
        "constant": Schedule({}, lambda _options, done: 1.0 + 0.0 * done),
    },
}

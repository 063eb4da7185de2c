"""Check the range of every number among the training arguments, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwenvl.utils.errors import UserError

LARGEST_COUNT = 2**31 - 1
LARGEST_SEED = 2**32 - 1  # NumPy's
LONGEST_TIME = 10**9  # seconds; timers accept no more than about 9 billion


@dataclass(frozen=True, slots=True)
class Limits:
    """Range of a number; None is always allowed.

    Args:
        low: Smallest value.
        high: Largest value, or None for any.
        above: Whether ``low`` itself is too small.
        below: Whether ``high`` itself is too large.
    """

    low: float
    high: float | None = None
    above: bool = False
    below: bool = False

    def allow(self, value: float | None) -> bool:
        """Return whether a value is within the limits."""
        if value is None:
            return True
        high_enough = value > self.low if self.above else value >= self.low
        return high_enough and (self.high is None or (value < self.high if self.below else value <= self.high))

    def __str__(self) -> str:
        """Return the range in words, to follow "must be"."""
        lower = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        upper = "" if self.high is None else f" and {'below' if self.below else 'at most'} {self.high:.10g}"
        return lower + upper


_COUNT, _COUNT_OR_NONE = Limits(1, LARGEST_COUNT), Limits(0, LARGEST_COUNT)
_ABOVE_ZERO, _ZERO_OR_MORE = Limits(0, above=True), Limits(0)
_SHARE_BELOW_ONE, _TIME = Limits(0, 1, below=True), Limits(0, LONGEST_TIME)

LIMITS: dict[str, Limits] = {
    # of this trainer
    "model_max_length": Limits(2, LARGEST_COUNT),  # two tokens, or there is nothing to predict
    "mm_projector_lr": _ABOVE_ZERO,
    "vision_tower_lr": _ABOVE_ZERO,
    "warmup_ratio": _SHARE_BELOW_ONE,
    "dry_run_devices": _COUNT_OR_NONE,
    "dry_run_mfu": Limits(0, 1, above=True),
    "max_bad_steps": _COUNT,
    "router_aux_loss_coef": _ZERO_OR_MORE,
    "step_timeout": _TIME,
    "device_peak_tflops": _ABOVE_ZERO,
    "profile_steps": _COUNT_OR_NONE,
    "eval_generate": _COUNT_OR_NONE,
    "eval_generate_tokens": _COUNT,
    # of transformers
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "num_train_epochs": Limits(0, LARGEST_COUNT, above=True),
    "max_steps": Limits(-1, LARGEST_COUNT),  # 0 is refused with advice, elsewhere
    "learning_rate": _ZERO_OR_MORE,
    "warmup_steps": Limits(0, LARGEST_COUNT),
    "weight_decay": _ZERO_OR_MORE,
    "adam_beta1": _SHARE_BELOW_ONE,
    "adam_beta2": _SHARE_BELOW_ONE,
    "adam_epsilon": _ZERO_OR_MORE,
    "max_grad_norm": _ZERO_OR_MORE,
    "label_smoothing_factor": _SHARE_BELOW_ONE,
    "neftune_noise_alpha": _ZERO_OR_MORE,
    "torch_empty_cache_steps": _COUNT,
    "logging_steps": Limits(0, LARGEST_COUNT, above=True),
    "eval_steps": Limits(0, LARGEST_COUNT, above=True),
    "eval_delay": _ZERO_OR_MORE,
    "eval_accumulation_steps": _COUNT,
    "save_steps": Limits(0, LARGEST_COUNT, above=True),
    "save_total_limit": _COUNT,
    "seed": Limits(0, LARGEST_SEED),
    "data_seed": Limits(0, LARGEST_SEED),
    "dataloader_num_workers": Limits(0, 4096),
    "dataloader_prefetch_factor": _COUNT,
    "ddp_bucket_cap_mb": Limits(1, 2**20),
    "ddp_timeout": Limits(1, LONGEST_TIME),
    "local_rank": Limits(-1, LARGEST_COUNT),
}


def check_limits(arguments: Any) -> None:
    """Check the numbers of training arguments.

    Raises:
        UserError: One is out of its range.
    """
    for name, limits in LIMITS.items():
        value = getattr(arguments, name)
        if name == "num_train_epochs" and arguments.max_steps > 0:  # which has priority
            continue
        if not limits.allow(value):
            raise UserError(f"--{name} {value:g} must be {limits}.{_ADVICE.get(name, '')}")


_ADVICE = {
    "num_train_epochs": " For a number of steps instead: --max_steps. To see what training would do: --dry_run.",
    "max_grad_norm": " 0 clips nothing.",
    "save_total_limit": " Leave it out to keep all checkpoints, or add --save_strategy no for none.",
    "save_steps": " --save_strategy no saves none.",
    "eval_steps": " --eval_strategy no evaluates never.",
    "logging_steps": " --logging_strategy no logs nothing.",
    "model_max_length": " A sample needs two tokens, or there is nothing to predict.",
}

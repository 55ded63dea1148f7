"""Objectives as pure array functions, each imported from its module; README.md has the table.

What holds for every function, so that its docstring says only what is special:
  Log-probs are in nats, of any float dtype. The policy's carry the gradient; none passes through those under the frozen
    reference (`ref_`), under the policy that sampled (`old_`) or through rewards, advantages, returns, labels, weights.
  Pairs: chosen and rejected log-probs `[B]` are *summed* over the completion; a length `[B]` is its tokens.
  Masks are bool, True on what counts; `completion_mask` is True on the completion, its EOS included. A masked slot may
    hold anything, NaN too: losses and results are 0 there, without gradient.
  `weights`: `[B]`, non-negative, None means 1; rows of weight 0 only fill the batch, and may hold NaN.
  Results are float32. A Scalar may be traced, so that a sweep over it compiles once; then its range is not checked.
"""

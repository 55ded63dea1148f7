"""Where each detail that matters is tested: an index, and the tests that keep it true.

Numbers 1 to 22 are the details of the objectives, T the tests that every part must have, B the bad input.
"""

import ast
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from objectives.grpo import grpo_loss
from research.algorithms.base import rollout_batch
from tests.research.algorithms.toy import rollouts

ROOT = Path(__file__).resolve().parents[1]

# (number, detail, "path below tests/::test", ...)
DETAILS: list[tuple[str, ...]] = [
    (
        "1",
        "divide by the global token count; k micro-batches are one batch",
        "research/train/test_step.py::test_micro_batches_take_the_step_of_the_whole_batch",
        "objectives/test_reduce.py::test_weighted_sums_add_and_divide_once",
    ),
    (
        "2",
        "numerator and denominator share one mask",
        "research/algorithms/test_grpo.py::test_a_truncated_completion_is_masked_out_but_stays_in_the_baseline",
        "objectives/test_reduce.py::test_weights_count_in_the_denominator_and_carry_no_gradient",
    ),
    (
        "3",
        "mask after the first EOS, keep the EOS; masks from lengths",
        "research/sampling/test_stops.py::test_ends_with_the_first_stop_token",
        "research/rollouts/test_rewards.py::test_a_reward_model_pays_and_the_yardstick_stays_as_gold",
    ),
    (
        "4",
        "pad may equal EOS",
        "research/sampling/test_stops.py::test_the_seeds_cover_every_ending",
        "test_details.py::test_padding_with_the_eos_changes_no_mask",
    ),
    (
        "5",
        "left-padded prompts, right-padded completions, positions from the mask",
        "research/data/test_pipelines.py::test_prompts_are_left_padded_and_name_their_record",
        "research/algorithms/test_grpo.py::test_rows_are_laid_out_prompt_then_completion",
        "models/test_transformer.py::test_left_padding_changes_nothing",
    ),
    (
        "6",
        "the temperature of training is that of sampling",
        "research/algorithms/test_grpo.py::test_the_wrong_temperature_shows_as_a_gap",
        "research/sampling/test_distribution.py::test_sampler_logps_are_token_logps_at_the_temperature",
        "research/train/test_session.py::test_reference_budget_and_errors_of_a_run",
    ),
    (
        "7",
        "truncated samplers renormalise, and a ratio refuses them",
        "research/sampling/test_distribution.py::test_sampler_logps_are_those_of_the_renormalised_distribution",
        "research/config/test_config.py::test_truncated_sampling_is_fine_where_there_is_no_ratio",
        "research/config/test_config.py::test_bad_values",
    ),
    (
        "8",
        "groups are laid out [p1, p1, ..., p2, p2]",
        "research/sampling/test_invariance.py::test_groups_are_adjacent_and_share_one_prefill",
        "research/rollouts/test_dynamic.py::test_all_arrays_of_a_row_move_with_its_group",
    ),
    (
        "9",
        "advantages and returns are masked after EOS",
        "objectives/test_gae.py::test_what_follows_the_eos_never_matters_and_neither_does_the_start_slot",
        "objectives/test_advantages.py::test_reinforce_pp_golden",
    ),
    ("10", "no dropout in any log-prob", "test_details.py::test_no_model_has_dropout"),
    (
        "11",
        "reward head small at first; rewards of mean 0 on reference completions",
        "models/test_heads.py::test_heads_start_at_their_scale",
        "research/rewards/test_shaping.py::test_reference_statistics_stay_and_give_the_reference_mean_0_and_std_1",
        "research/rollouts/test_rewards.py::test_reference_statistics_are_those_of_the_first_samples_and_stay",
    ),
    (
        "12",
        "Adam's epsilon, and where it sits",
        "research/core/test_optim.py::test_adam_by_hand_with_epsilon_outside_the_root",
    ),
    ("13", "BOS exactly once", "research/data/test_chat.py::test_bos_once_and_prompt_is_a_prefix"),
    (
        "14",
        "prompt tokens are a prefix, or the sample is refused",
        "research/data/test_chat.py::test_a_prompt_that_is_no_prefix_is_refused",
    ),
    (
        "15",
        "metrics average over micro-batches as the loss does",
        "research/train/test_step.py::test_metrics_are_averaged_with_the_weights_of_the_loss",
    ),
    (
        "16",
        "a mean instead of a sum changes DPO's beta",
        "objectives/test_dpo_variants.py::test_a_mean_instead_of_a_sum_divides_beta_by_the_length",
    ),
    (
        "17",
        "log ratios before clipping",
        "objectives/test_grpo.py::test_golden",
        "objectives/test_grpo_variants.py::test_golden_value_and_gradient",
        "test_details.py::test_the_logged_log_ratio_is_not_clipped",
    ),
    (
        "18",
        "alarm on the truncated fraction",
        "research/train/test_monitors.py::test_bounds",
        "research/train/test_online.py::test_rollout_metrics",
    ),
    (
        "19",
        "train and eval items disjoint by content",
        "research/tasks/arithmetic/test_problems.py::test_splits_are_disjoint_by_content_whatever_the_seed_and_count",
        "research/tasks/arithmetic/test_task.py::test_generated_splits_share_no_prompt_whatever_the_seed",
        "research/tasks/test_sources.py::test_problems_held_out_are_not_trained_on",
    ),
    (
        "20",
        "pass@k by the unbiased estimator",
        "research/evals/test_passk.py::test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample",
    ),
    (
        "21",
        "a format reward is gated unless it says otherwise",
        "research/rewards/test_shaping.py::test_gated_format_pays_only_right_answers_and_additive_all",
        "research/config/test_config.py::test_bad_values",
    ),
    (
        "22",
        "loss 0 at the first on-policy step, beside it the gradient norm",
        "research/algorithms/test_grpo.py::test_first_on_policy_step_has_no_loss_but_a_gradient",
        "objectives/test_grpo.py::test_on_policy_gradient_is_reinforce",
    ),
    (
        "T1",
        "golden values by NumPy and by TRL",
        "objectives/test_trl_golden.py::test_ours_is_trls",
        "objectives/test_ppo.py::test_policy_golden",
        "objectives/test_prm.py::test_golden",
    ),
    ("T2", "check_grads", "objectives/test_properties.py::test_gradients_pass_check_grads"),
    (
        "T3",
        "padding changes neither value nor gradient",
        "objectives/test_properties.py::test_padding_changes_nothing",
        "objectives/test_properties.py::test_garbage_in_masked_slots_reaches_neither_value_nor_gradient",
    ),
    (
        "T4",
        "DPO and Bradley-Terry at equality are log 2",
        "objectives/test_dpo.py::test_at_the_reference_the_loss_is_log_2_and_the_gradient_contrastive",
        "objectives/test_bradley_terry.py::test_equal_scores_cost_log_2_and_pull_apart_evenly",
    ),
    (
        "T5",
        "ratio 1 is REINFORCE",
        "objectives/test_grpo.py::test_on_policy_gradient_is_reinforce",
        "objectives/test_ppo.py::test_on_policy_gradient_is_reinforce",
        "objectives/test_grpo_variants.py::test_on_policy_gradient_is_reinforce",
    ),
    (
        "T6",
        "equal rewards teach exactly nothing",
        "objectives/test_advantages.py::test_equal_rewards_give_exactly_zero",
        "research/algorithms/test_grpo.py::test_equal_rewards_teach_nothing",
    ),
    (
        "T7",
        "GAE at lambda 0 and 1",
        "objectives/test_gae.py::test_lambda_zero_is_the_one_step_error_and_lambda_one_the_return",
    ),
    ("T8", "jit and no jit", "objectives/test_properties.py::test_jit_changes_nothing"),
    (
        "T9",
        "bfloat16 inputs",
        "objectives/test_properties.py::test_bfloat16_inputs_give_float32_outputs_near_the_exact_ones",
    ),
    (
        "T10",
        "one device is eight",
        "objectives/test_properties.py::test_eight_devices_equal_one",
        "research/train/test_step.py::test_eight_devices_take_the_step_of_one",
    ),
    (
        "T11",
        "micro-batches are the full batch",
        "objectives/test_properties.py::test_micro_batches_add_up_to_the_full_batch",
        "research/train/test_step.py::test_micro_batches_take_the_step_of_the_whole_batch",
    ),
    (
        "T12",
        "the sign table of the clip",
        "objectives/test_grpo.py::test_sign_table_of_the_clip",
        "objectives/test_grpo_variants.py::test_sign_table",
        "objectives/test_ppo.py::test_sign_table_of_the_dual_clip",
        "objectives/test_ppo.py::test_sign_table_of_the_value_clip",
    ),
    (
        "T13",
        "cached greedy is uncached",
        "research/sampling/test_stops.py::test_greedy_equals_greedy_without_a_cache",
        "models/decode/test_cache.py::test_cached_equals_uncached",
    ),
    (
        "T14",
        "sampled frequencies are the distribution's",
        "research/sampling/test_distribution.py::test_first_two_tokens_follow_the_exact_distribution",
    ),
    (
        "T15",
        "sampler log-probs are teacher-forced",
        "research/sampling/test_distribution.py::test_sampler_logps_of_every_row_are_exact",
        "research/sampling/test_distribution.py::test_policy_logps_are_the_plain_models",
    ),
    (
        "T16",
        "every config builds, is its golden text and survives",
        "experiments/test_experiments.py::test_it_resolves_with_all_its_arms",
        "experiments/test_experiments.py::test_it_is_what_its_golden_text_says",
        "experiments/test_experiments.py::test_it_survives_two_steps_at_toy_size",
        "experiments/test_objectives.py::test_an_arm_runs_at_toy_size",
    ),
    (
        "T17",
        "E_pi[k] is the KL on a categorical",
        "objectives/test_kl.py::test_value_is_unbiased",
        "objectives/test_kl.py::test_k2_as_a_loss_descends_the_reverse_kl",
    ),
    (
        "T18",
        "a resumed run is the uninterrupted one",
        "research/train/test_resume.py::test_a_kill",
        "research/train/test_resume_state.py::test_ppo_with_all_its_controllers_resumes_bit_for_bit",
    ),
    (
        "B1",
        "a reward that is NaN or infinite",
        "research/rollouts/test_rewards.py::test_a_reward_that_is_no_number_names_prompt_and_function",
        "research/rewards/test_base.py::test_a_reward_that_is_not_finite_names_prompt_and_function",
    ),
    (
        "B2",
        "a verifier that raises",
        "research/rollouts/test_rewards.py::test_a_function_that_raises_costs_one_sample_not_the_run",
        "research/train/test_session.py::test_reference_budget_and_errors_of_a_run",
        "research/evals/test_accuracy.py::test_a_yardstick_that_raises_cannot_tell_and_says_so",
    ),
    (
        "B3",
        "a pair of equal sides; a pair of two prompts",
        "research/data/test_preferences.py::test_bad_pairs_are_named",
    ),
    (
        "B4",
        "step labels that do not match the steps",
        "research/data/test_steps.py::test_labels_that_do_not_match_are_named",
    ),
    (
        "B5",
        "a flag without effect",
        "research/config/test_config.py::test_overrides_without_effect_are_refused",
        "research/config/test_bad_input.py::test_a_reward_that_the_objective_does_not_read_is_refused",
    ),
    (
        "B6",
        "k1 as a loss",
        "objectives/test_kl.py::test_k1_as_a_loss_has_no_expected_gradient",
        "objectives/test_grpo.py::test_refusals",
        "objectives/test_ppo.py::test_policy_refusals",
        "research/config/test_bad_input.py::test_k1_as_a_loss_is_refused_with_the_reason",
    ),
    (
        "B7",
        "beta 0 with a reference",
        "research/config/test_bad_input.py::test_without_a_kl_term_no_reference_is_loaded_and_naming_one_is_refused",
        "objectives/test_grpo.py::test_reference_without_beta_only_measures",
    ),
    (
        "B8",
        "a reference or teacher of another vocabulary",
        "research/algorithms/test_distill.py::test_another_vocabulary_is_refused_by_both_sizes",
        "research/config/test_bad_input.py::test_a_role_that_does_not_fit_is_refused",
        "research/config/test_bad_input.py::test_student_and_teacher_of_one_run_have_one_vocabulary",
    ),
]


@cache
def functions(path: str) -> frozenset[str]:
    """Names of the tests of a file."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("row", DETAILS, ids=[row[0] for row in DETAILS])
def test_every_detail_has_tests_that_exist(row: tuple[str, ...]) -> None:
    _, detail, *tests = row
    assert detail and tests
    for test in tests:
        path, name = test.split("::")
        path = f"tests/{path}"
        assert (ROOT / path).exists(), f"{path}: is gone"
        assert name.startswith("test_") and name in functions(path), f"{test}: is gone"


def test_all_22_details_are_here_once() -> None:
    numbers = [row[0] for row in DETAILS]
    assert [number for number in numbers if number.isdigit()] == [str(n) for n in range(1, 23)]
    assert len(set(numbers)) == len(numbers)


def test_no_model_has_dropout() -> None:
    found = [
        str(path.relative_to(ROOT))
        for room in ("models", "research", "objectives")
        for path in (ROOT / room).rglob("*.py")
        if "dropout(" in path.read_text("utf-8").lower()
    ]
    assert not found


def test_padding_with_the_eos_changes_no_mask() -> None:
    made = rollouts(np.arange(4.0), np.array([8, 1, 3, 5]), group_size=2)
    eos = int(made.tokens[1, 0])  # the last token of the second completion
    filled = made._replace(
        tokens=np.where(made.mask, made.tokens, eos), prompt_tokens=np.where(made.prompt_mask, made.prompt_tokens, eos)
    )
    plain, padded = (rollout_batch(r, mask_truncated=False).sequences for r in (made, filled))
    assert (plain.tokens != padded.tokens).any() and padded.loss_mask.sum() == 8 + 1 + 3 + 5
    for name in ("loss_mask", "segment_ids", "positions", "weights"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(padded, name), err_msg=name)
    assert padded.loss_mask[1, 3] and padded.tokens[1, 3] == eos, "the EOS itself counts"


def test_the_logged_log_ratio_is_not_clipped() -> None:
    policy = jnp.array([[-1.0, -3.0, -0.5]])
    out = grpo_loss(
        policy_logps=policy,
        old_logps=jnp.array([[-3.0, -1.0, -0.5]]),
        advantages=jnp.array([1.0]),
        completion_mask=jnp.ones((1, 3), bool),
        clip_eps_low=0.2,
        clip_eps_high=0.2,
    )
    assert out.metrics["log_ratio"].tolist() == [[2.0, -2.0, 0.0]]

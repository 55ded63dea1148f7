"""Every key there is, with its unit and its default. An experiment starts from here and changes what it asks.

Imports nothing but ml_collections, so that a config loads in milliseconds and without an accelerator.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The default experiment: pretrain, fine-tune, reinforce. `arg` is not used here."""
    del arg
    config = ConfigDict()
    config.name = "base"  # heads the report
    config.question = ""  # what the experiment asks, one sentence
    config.stages = ("pretrain", "sft", "rl")  # the chain; each stage starts from the one before

    config.model = model()
    config.teacher_model = model()  # of stages whose `model` is "teacher_model"
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # devices along each axis; one may be -1
    config.data = data()
    config.pretrain = stage("next_token")
    config.sft = stage("sft")
    config.rl = stage("grpo")
    config.evaluation = ConfigDict(
        {
            "problems": 256,  # held-out problems of the final evaluation
            "samples": 4,  # completions a problem; pass@1 is their mean (Chen et al. 2021)
            "k": (1, 4),  # the k of pass@k and maj@k, each at most `samples`
            "temperature": 1.0,  # 0 is greedy
            "seed": 1234,  # of the evaluation's own randomness: the same draws for every arm
            "batch_problems": 64,  # problems sampled at a time
            "max_prompt_length": 64,  # tokens, markup included
            "max_new_tokens": 64,
        }
    )
    config.sampler = ConfigDict(  # how rollouts and evaluations are computed; only 8 bits and `weights` change them
        {
            "slots": 0,  # completions decoded together, refilled as they end; 0 decodes all of a batch at once
            "chunk": 32,  # with slots: decode steps between two refills, at most
            "admit": 8,  # with slots: prompts taken in at a time, once so many slots are free
            "cache_bucket": 128,  # tokens by which the KV cache grows
            "int8_cache": False,  # keys and values in 8 bits: half the memory of bfloat16, and not exact
            # What the layers' matrices are kept in: compute (the model's compute_dtype), bfloat16, int8 (one scale an
            # output; needs the extra `int8`). Embedding and read-out are never in int8. Completions and their
            # log-probs are then those of the rounded model: the trainer's differ, which the monitor of the gap shows
            # and an objective's `importance` corrects.
            "weights": "compute",
        }
    )
    config.tools = (
        ConfigDict(  # may be called while a policy is sampled; prompts list them in the system turn
            {
                "names": (),  # of calculator, python, search; () is none. Needs sampler.slots
                "corpus": "",  # the file that search reads: .jsonl records with text, or text
                "max_turns": 4,  # turns with calls that are answered; a completion that calls again ends
                "max_result_tokens": 128,  # of one result; results count as part of max_new_tokens
                "search_results": 3,  # documents of one answer of search
                "isolation": "required",  # of python's programs: required, best_effort
            }
        )
    )
    config.ablation = ConfigDict(
        {
            "stage": "rl",  # the stage whose runs are compared
            "control": "",  # the arm that all others are compared to; "" is the first
            "seeds": (0, 1, 2),  # written to `seed_keys` for each run of an arm
            "seed_keys": ("rl.seed",),
            "metric": "eval/pass@1",  # of the final evaluation
            "higher_is_better": True,
            # name -> overrides of the config, each "dotted.key=value"
            "arms": ConfigDict(),
        }
    )
    return config.lock()


def model() -> ConfigDict:
    """A 0.9M-parameter decoder; the vocabulary is the tokenizer's."""
    return ConfigDict(
        {
            "num_layers": 4,
            "d_model": 128,  # width of the residual stream
            "num_heads": 4,
            "num_kv_heads": 4,  # divides num_heads
            "head_dim": 32,  # even
            "d_ff": 384,  # hidden width of the SwiGLU block
            "rope_theta": 10_000.0,
            "norm_eps": 1e-5,
            "tie_embeddings": True,
            "max_length": 2048,  # longest context, tokens: no row and no prompt + completion may exceed it
            "scan_layers": False,  # scan for pods (compile time), unrolled for speed on CPU
            "remat": "none",  # none, dots, full: what the backward pass recomputes
            "param_dtype": "float32",
            "compute_dtype": "float32",
            "logprob_chunk": 128,  # time positions whose logits exist at once
        }
    )


def data() -> ConfigDict:
    """Where text, problems and preferences come from, and the tokenizer trained on them."""
    return ConfigDict(
        {
            "text": {
                "path": "",  # a .txt or .jsonl file or a folder of them; "" is the standard library's docs
                "max_bytes": 0,  # of the standard library's docs; 0 is all
                "validation_one_in": 20,  # documents held out, by a hash of their content
            },
            "problems": {
                "kind": "arithmetic",  # arithmetic (generated) or jsonl (prompt/completion, messages, GSM8K)
                "path": "",  # of the JSONL file
                "validation_one_in": 20,  # records of a JSONL file held out, by a hash of their prompt
                "train": 20_000,  # generated problems to train on
                "test": 512,  # generated problems held out, by content
                "seed": 0,  # of the generator
                "operations": "+-*",
                "min_steps": 2,  # operations in an expression
                "max_steps": 4,
                "max_operand": 9,
                "max_value": 99,  # bound of every intermediate value
                "verifier": "exact_answer",  # scores a completion against the answer
            },
            "preferences": {
                **judged(),
                "kind": "jsonl",
            },  # prompt, chosen, rejected; margin, label_probability
            "rankings": {**judged(), "candidates": 4},  # prompt, completions, ranks; at most so many a prompt
            "steps": judged(),  # prompt, steps, labels; or input, steps, mistake_index
            "tokenizer": {
                "path": "",  # an existing SentencePiece model; "" trains one on this run's corpus
                "vocab_size": 512,  # pieces, markup and 256 byte pieces included; 0 with char: all characters
                "model_type": "bpe",  # bpe, unigram, char
            },
        }
    )


def judged() -> dict[str, object]:
    """A source of judged solutions: pairs, rankings or labelled steps."""
    return {
        "kind": "arithmetic",  # arithmetic (generated problems, right and corrupted answers) or jsonl
        "path": "",  # of the JSONL file
        "validation_one_in": 10,  # records of a file held out, by a hash of their prompt
        "train": 4_000,  # generated problems to train on
        "validation": 256,  # generated problems held out, by content
    }


def stage(objective: str) -> ConfigDict:
    """One stage; keys without effect under its objective do not enter hashes and are refused as overrides."""
    return ConfigDict(
        {
            "model": "model",  # or teacher_model: the section that describes its model
            "start_from": "",  # a stage's name, or scratch; "" is the newest policy of the same model
            "final_answer": "sample",  # how eval/accuracy answers: sample, majority, reward or prm (best of n)
            "prm_score": "min",  # with prm: a solution's score from its steps': min, prod, last, mean
            "seed": 0,
            "steps": 100,  # optimizer steps, or rollout iterations where the policy samples its own data
            "batch_size": 32,  # rows an optimizer step, where the data are given
            "length": 128,  # tokens a row, where the data are given
            "micro_batches": 1,  # gradients are accumulated over this many parts of a batch
            "log_every": 10,  # steps
            "eval_every": 0,  # steps between evaluations on held-out data; 0 is only at the end
            "eval_batches": 8,  # batches of validation data an evaluation, where the data are given
            "eval_problems": 128,  # held-out problems an evaluation before the end, one sample each
            "checkpoint_every": 0,  # steps; 0 is only at the end
            "keep_checkpoints": 2,
            "data": {
                "source": "own",  # the policy's "own" samples, or "given" data, where an objective takes both
                "text_weight": 1.0,  # next_token: share of rows from the text corpus ...
                "problems_weight": 0.0,  # ... and from worked problems, written as plain text
                "limit": 0,  # only the first so many training problems; 0 is all
                "packing": True,  # sft: several examples a row
                "terse_fraction": 0.0,  # of generated answers, pairs' sides or solutions, the share without steps
                "context": "",  # distill: a system turn that only the teacher sees
            },
            "objective": {"name": objective, **objectives()},
            "roles": {  # names of earlier stages
                "reference": "",  # "" is the stage that this one starts from
                "teacher": "",  # distill: any size, same tokenizer
                "reward": (),  # reward models; several are an ensemble
                "value": "",  # ppo: a reward model to start the value model from; "" is the policy
                "prm": "",  # process reward model
            },
            "reward": {  # of a sample, where the policy samples its own data; in this order
                "source": "verifier",  # verifier, or model (roles.reward)
                "error_reward": 0.0,  # of a sample on which the verifier raises
                "ensemble": "mean",  # mean, min, mean_minus_variance
                "variance_coef": 0.0,  # of mean_minus_variance
                "normalize": "none",  # none, running, reference: to mean 0 and std 1
                "score_clip": 0.0,  # bound of the normalised score; 0 is off
                "format_mode": "off",  # off, gated (paid on right answers only), additive (can be hacked)
                "format_coef": 0.0,
                "format_pattern": "one_final_line",  # one_final_line, final_line
                "length_coef": 0.0,  # of the group-relative length reward; 0 is off
                "overlong_buffer": 0,  # tokens before max_new_tokens over which the penalty grows; 0 is off
                "overlong_coef": 1.0,  # its full size
                "missing_eos_penalty": 0.0,  # subtracted where a completion never stops
                "difficulty_weighting": "none",  # none, fail_rate, inverse_pass_rate: scale of the advantages
                "step_coef": 0.0,  # of a process reward model's probabilities, paid at each step's end; 0 is off
            },
            "optimizer": {
                "learning_rate": 1e-3,  # peak
                "warmup_steps": 10,  # optimizer steps
                "end_fraction": 0.1,  # of the peak, after cosine decay over the stage; 1 is constant
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,  # outside the root
                "weight_decay": 0.1,  # on matrices
                "clip_norm": 1.0,  # global gradient norm
            },
            "rollout": {
                "prompts_per_step": 32,
                "group_size": 8,  # completions a prompt
                "max_prompt_length": 64,  # tokens, markup included
                "max_new_tokens": 64,
                "temperature": 1.0,
                "top_k": 0,  # 0 keeps all
                "top_p": 1.0,  # 1 keeps all
                "epochs": 1,  # passes over each iteration's samples
                "minibatches": 1,  # optimizer steps a pass; groups stay whole
                "resample_rounds": 0,  # batches of prompts more, to replace groups with equal rewards
                "curriculum_low": 0.0,  # prompts whose pass rate lies in this band are sampled; 0 and 1 take all
                "curriculum_high": 1.0,
                "curriculum_decay": 0.5,  # share of an attempt's weight that is left at the next visit
                "curriculum_retry": 0.1,  # chance to try a prompt outside the band all the same
                "monitor_kl": True,  # measure the KL to the start of the stage when metrics are written
            },
        }
    )


def objectives() -> dict[str, dict[str, object]]:
    """Every objective's options; `objective.name` chooses one."""
    next_token = {"label_smoothing": 0.0, "z_loss_coef": 0.0}
    pairs = {"pairs_per_prompt": 4}  # with own samples: disjoint pairs of a group, at most
    return {
        "next_token": dict(next_token),
        "sft": dict(next_token),
        "rejection_sampling": {
            **next_token,
            "keep_per_prompt": 4,  # correct samples kept of each prompt, at most
            "selector": "leanest",  # leanest, random
        },
        "reward_model": {"center_coef": 0.0},  # of the squared sum of a pair's scores
        "reward_model_ranking": {"center_coef": 0.0},
        "prm": {},
        "orm": {},
        "dpo": {
            "loss_type": "sigmoid",  # see objectives/dpo.py
            "f_divergence": "reverse_kl",  # reverse_kl, forward_kl, js, alpha
            "weighting": "none",  # none, wpo
            "beta": 0.1,
            "label_smoothing": 0.0,  # probability that a label is flipped
            "alpha_divergence_coef": 0.5,
            "discopop_tau": 0.05,
            "rpo_alpha": 0.0,  # weight of the chosen's negative log-likelihood a token
            "ld_alpha": 1.0,  # share that counts of the tokens beyond the shorter side's length
            **pairs,
        },
        "step_dpo": {"beta": 0.1, "label_smoothing": 0.0},
        "orpo": {"lambda_coef": 0.1, **pairs},
        "simpo": {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0, **pairs},
        "cpo": {"loss_type": "sigmoid", "beta": 0.1, "nll_coef": 1.0, "label_smoothing": 0.0, **pairs},
        "kto": {"loss_type": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        "distill": {
            "divergence": "reverse_kl",  # forward_kl (teacher || student), reverse_kl, jsd
            "jsd_beta": 0.5,  # the teacher's weight in the mixture
            "temperature": 1.0,  # divides both models' logits
            "top_k": 0,  # the teacher's likeliest tokens; 0 is the whole vocabulary
            "tail": "bucket",  # bucket, renormalize: the other tokens, with top_k
        },
        "ppo": {
            "aggregation": "token_mean",  # token_mean, sequence_mean, constant
            "clip_eps_low": 0.2,
            "clip_eps_high": 0.2,
            "dual_clip": 0.0,  # bound of the ratio at negative advantages; 0 is off
            "clip_eps_value": 0.2,  # reward units; 0 is off
            "value_coef": 0.1,
            "entropy_coef": 0.0,
            "gamma": 1.0,  # per token
            "gae_lambda": 0.95,
            "kl_coef": 0.05,  # 0 needs no reference
            "kl_in": "reward",  # reward (k1 a token), loss
            "kl_estimator": "k3",  # of a KL in the loss: k2, k3
            "kl_controller": "fixed",  # fixed, adaptive
            "target_kl": 6.0,  # nats a completion
            "horizon": 10_000.0,  # completions
            "whiten_advantages": True,
            "mask_truncated": False,  # leave completions cut at their limit out of the loss
        },
        "grpo": policy_gradient(),
        "dr_grpo": policy_gradient(aggregation="constant", normalization="none"),
        "dapo": policy_gradient(aggregation="token_mean", clip_eps_high=0.28),
        "rloo": policy_gradient(
            aggregation="constant", baseline="leave_one_out", normalization="none", kl_in="reward"
        ),
        "reinforce_pp": policy_gradient(advantage="reinforce_pp", aggregation="token_mean", kl_in="reward"),
        "gspo": policy_gradient(ratio_level="sequence", clip_eps_low=3e-4, clip_eps_high=4e-4),
        "cispo": policy_gradient(surrogate="cispo", aggregation="token_mean"),
        "sapo": policy_gradient(surrogate="sapo"),
    }


def policy_gradient(**changes: object) -> dict[str, object]:
    """The options of GRPO's family; each member has its paper's own defaults, save that the KL is off (`beta`).

    DAPO's other parts belong to the stage: `rollout.resample_rounds`, `reward.overlong_buffer`.
    """
    options: dict[str, object] = {
        "aggregation": "sequence_mean",  # sequence_mean, token_mean, constant
        "advantage": "group",  # group, reinforce_pp, reinforce_pp_baseline
        "normalization": "group",  # of group advantages: group, batch, none
        "baseline": "mean",  # of group advantages: mean, leave_one_out
        "ddof": 1,  # of the standard deviation
        "ratio_level": "token",  # token, sequence, sequence_token
        "surrogate": "clip",  # clip, cispo, sapo
        "clip_eps_low": 0.2,
        "clip_eps_high": 0.2,
        "delta": 0.0,  # bound of the ratio at negative advantages; 0 is off
        "cispo_clip": 5.0,  # largest ratio that weighs a token
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "beta": 0.0,  # KL coefficient; 0 needs no reference
        "kl_in": "loss",  # loss, reward
        "kl_estimator": "k3",  # of a KL in the loss: k2, k3
        "kl_correction": "none",  # none, ratio
        "importance": "none",  # correction for a sampler that differs from the trainer: none, token, sequence
        "importance_mode": "truncate",  # truncate, mask
        "importance_cap": 2.0,
        "mask_truncated": False,  # leave completions cut at their limit out of the loss
    }
    assert changes.keys() <= options.keys()
    return {**options, **changes}

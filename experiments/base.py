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
                "path": "",  # JSONL of prompt, chosen, rejected
                "validation_one_in": 10,  # pairs held out, by a hash of their prompt
            },
            "tokenizer": {
                "path": "",  # an existing SentencePiece model; "" trains one on this run's corpus
                "vocab_size": 512,  # pieces, markup and 256 byte pieces included; 0 with char: all characters
                "model_type": "bpe",  # bpe, unigram, char
            },
        }
    )


def stage(objective: str) -> ConfigDict:
    """One stage; keys without effect under its objective do not enter hashes and are refused as overrides."""
    return ConfigDict(
        {
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
                "source": "own",  # dpo: "own" samples labelled by the verifier, or the "preferences" file
                "text_weight": 1.0,  # next_token: share of rows from the text corpus ...
                "problems_weight": 0.0,  # ... and from worked problems, written as plain text
                "limit": 0,  # only the first so many training problems; 0 is all
                "packing": True,  # sft: several examples a row
                "terse_fraction": 0.0,  # sft on generated problems: share of answers without their steps
            },
            "objective": {
                "name": objective,  # next_token, sft, rejection_sampling, dpo, grpo
                "next_token": {"label_smoothing": 0.0, "z_loss_coef": 0.0},
                "sft": {"label_smoothing": 0.0, "z_loss_coef": 0.0},
                "rejection_sampling": {
                    "label_smoothing": 0.0,
                    "z_loss_coef": 0.0,
                    "keep_per_prompt": 4,  # correct samples kept of each prompt, at most
                    "selector": "leanest",  # leanest, random
                },
                "dpo": {
                    "beta": 0.1,
                    "label_smoothing": 0.0,
                    "pairs_per_prompt": 4,  # with own samples: disjoint pairs of a group, at most
                },
                "grpo": {
                    "clip_eps_low": 0.2,
                    "clip_eps_high": 0.2,
                    "beta": 0.0,  # KL coefficient; 0 needs no reference
                    "kl_estimator": "k3",  # k2, k3
                    "aggregation": "sequence_mean",  # sequence_mean, token_mean, constant
                    "normalization": "group",  # group, batch, none
                    "baseline": "mean",  # mean, leave_one_out
                    "ddof": 1,  # of the standard deviation
                },
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
                "updates": 1,  # optimizer steps on each iteration's samples
            },
        }
    )

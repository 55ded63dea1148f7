"""Keys that do not fit each other: refused before anything runs."""

from collections.abc import Mapping

from research.config.experiment import Experiment, Stage, make_model
from research.config.sections import Evaluation, Reward, Rollout
from research.core.errors import ConfigError


def check_experiment(experiment: Experiment) -> None:
    """Raises ConfigError where keys exclude each other or a role is played by nobody."""
    if not experiment.name.isprintable() or not experiment.name:
        raise ConfigError(f"name: got {experiment.name!r}, expected a printable name")
    for name, model in experiment.models.items():
        make_model(model, 512, name)
        _check_context("evaluation", experiment.evaluation, name, model.max_length)
    _check_evaluation(experiment.evaluation)
    _check_mesh(experiment)
    if experiment.tools.any and not experiment.sampler.slots:
        raise ConfigError(
            "sampler.slots: got 0, expected > 0 with tools because only refilled slots stop a row for its result while "
            "the others go on"
        )
    if len(set(experiment.tools.names)) < len(experiment.tools.names):
        raise ConfigError(f"tools.names: got {list(experiment.tools.names)}, expected each once")
    known: dict[str, Stage] = {}
    for stage in experiment.stages:
        _check_stage(stage, experiment)
        _check_roles(stage, known)
        known[stage.name] = stage


def _check_evaluation(how: Evaluation) -> None:
    if not how.k or max(how.k) > how.samples:
        raise ConfigError(
            f"evaluation.k: got {list(how.k)}, expected values from 1 to evaluation.samples={how.samples} because "
            "pass@k needs k samples"
        )
    if how.temperature == 0 and how.samples > 1:
        raise ConfigError(
            f"evaluation.samples: got {how.samples}, expected 1 at evaluation.temperature=0 because greedy samples are "
            "equal"
        )


def _check_mesh(experiment: Experiment) -> None:
    axes = vars(experiment.mesh)
    if list(axes.values()).count(-1) > 1 or 0 in axes.values():
        raise ConfigError(f"mesh: got {axes}, expected sizes of at least 1, at most one of them -1 (what is left)")


def _check_stage(stage: Stage, experiment: Experiment) -> None:
    name, rollout, limit = stage.name, stage.rollout, experiment.models[stage.model].max_length
    _check_unread(stage)
    if stage.online:
        _check_context(f"{name}.rollout", rollout, stage.model, limit)
        _check_online(stage)
    elif stage.length > limit:
        raise ConfigError(f"{name}.length: got {stage.length}, expected at most {stage.model}.max_length={limit}")
    if stage.facts.given == "text" and stage.data.text_weight + stage.data.problems_weight <= 0:
        raise ConfigError(f"{name}.data: got text_weight and problems_weight 0, expected one to be positive")
    algorithm = stage.objective.static(stage.options, stage.online, rollout.group_size, rollout.max_new_tokens)
    if stage.micro_batches > 1 and algorithm.batch_coupled:
        raise ConfigError(
            f"{name}.micro_batches: got {stage.micro_batches}, expected 1 under these options of "
            f"{stage.objective.name} because a row's loss depends on the whole batch"
        )
    rows = stage.rows // (rollout.minibatches if stage.online else 1)
    if rows % stage.micro_batches:
        raise ConfigError(
            f"{name}.micro_batches: got {stage.micro_batches}, expected a divisor of the {rows} rows of an update"
        )


def _check_online(stage: Stage) -> None:
    name, rollout, objective = stage.name, stage.rollout, stage.objective
    if objective.untruncated and rollout.truncates:
        raise ConfigError(
            f"{name}.rollout: got top_k {rollout.top_k} and top_p {rollout.top_p}, expected 0 and 1 under "
            f"{objective.name} because its ratio compares log-probs of the untruncated distribution"
        )
    if rollout.prompts_per_step < objective.least_prompts:
        raise ConfigError(
            f"{name}.rollout.prompts_per_step: got {rollout.prompts_per_step}, expected at least "
            f"{objective.least_prompts} under {objective.name}"
        )
    if rollout.curriculum_low >= rollout.curriculum_high:
        raise ConfigError(
            f"{name}.rollout.curriculum_low: got {rollout.curriculum_low}, expected less than curriculum_high="
            f"{rollout.curriculum_high}"
        )
    if rollout.prompts_per_step % rollout.minibatches:
        raise ConfigError(
            f"{name}.rollout.minibatches: got {rollout.minibatches}, expected a divisor of the "
            f"{rollout.prompts_per_step} prompts of an iteration because groups stay whole"
        )
    for key in ("keep_per_prompt", "pairs_per_prompt"):
        most = rollout.group_size if key == "keep_per_prompt" else rollout.group_size // 2
        if key in stage.options and not 1 <= stage.options[key] <= most:
            raise ConfigError(
                f"{name}.objective.{objective.name}.{key}: got {stage.options[key]}, expected 1 to {most} because a "
                f"group has {rollout.group_size} completions"
            )
    _check_reward(f"{name}.reward", stage)


def _check_reward(path: str, stage: Stage) -> None:
    reward, rollout = stage.reward, stage.rollout
    if reward.source == "functions":
        names = [chosen.component.name for chosen in stage.chosen("reward", "functions")]
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"{path}.functions: got {list(reward.functions)}, expected at least one, and different names because "
                "each is logged apart"
            )
        if reward.weights and len(reward.weights) != len(reward.functions):
            raise ConfigError(
                f"{path}.weights: got {list(reward.weights)}, expected one for each of {list(reward.functions)}, or ()"
            )
        if reward.weights and not any(reward.weights):
            raise ConfigError(f"{path}.weights: got only 0, expected a function to learn from")
    if (reward.format_mode == "off") != (reward.format_coef == 0):
        raise ConfigError(
            f"{path}.format_coef: got {reward.format_coef} under format_mode={reward.format_mode!r}, expected > 0 with "
            "a format reward and 0 without one because either alone has no effect"
        )
    if reward.overlong_buffer and not reward.overlong_coef:
        raise ConfigError(f"{path}.overlong_coef: got 0, expected > 0 because overlong_buffer is set")
    if reward.overlong_buffer > rollout.max_new_tokens:
        raise ConfigError(
            f"{path}.overlong_buffer: got {reward.overlong_buffer}, expected at most rollout.max_new_tokens="
            f"{rollout.max_new_tokens}"
        )


def _check_unread(stage: Stage) -> None:
    """A reward that the objective would not learn from is a mistake, wherever it is set."""
    if not stage.online:
        return
    used = stage.parsed.sections["reward"].used_keys(stage.facts)
    plain = vars(Reward())
    switches = {"source", "normalize", "score_clip", "format_mode", "format_coef", "length_coef", "overlong_buffer"}
    switches |= {"missing_eos_penalty", "difficulty_weighting", "step_coef", "functions", "weights"}
    for key in sorted(switches):
        value = getattr(stage.reward, key)
        if f"{stage.name}.reward.{key}" not in used and value != plain[key]:
            because = f"{stage.name}.objective.name={stage.objective.name}"
            if stage.reward.source == "model" and key in ("functions", "weights"):
                because = f"{stage.name}.reward.source=model"
            raise ConfigError(
                f"{stage.name}.reward.{key}: got {value!r}, expected {plain[key]!r} because it has no effect under "
                f"{because}"
            )


PLAYERS: Mapping[str, tuple[str, ...]] = {
    "reference": ("policy", "actor_critic"),
    "teacher": ("policy", "actor_critic"),
    "reward": ("scorer",),
    "value": ("scorer",),
    "prm": ("step_scorer",),
}
"""What a stage must train to play a role."""


def _check_roles(stage: Stage, known: Mapping[str, Stage]) -> None:
    """Every role that the stage needs is played by an earlier stage of the right kind."""
    for role, name in stage.played:
        key = f"{stage.name}.roles.{role}"
        if role == "value" and not name:  # it starts from the policy
            continue
        if role == "reference" and not name:
            if not stage.start:
                raise ConfigError(f"{key}: got '', expected a stage because this one starts from scratch")
            continue
        if role == "reward" and not name:
            raise ConfigError(f"{key}: got none, expected at least one stage that trains a reward model")
        if "/" in name:  # a folder, which is read when data and models are prepared
            continue
        if name not in known:
            raise ConfigError(
                f"{key}: got {name!r}, expected an earlier stage: {', '.join(known) or 'none'}; or the folder of a "
                "finished one"
            )
        layouts = PLAYERS[role]
        if known[name].facts.trains not in layouts:
            raise ConfigError(
                f"{key}: got {name!r}, which trains a {known[name].facts.trains}, expected a stage that trains a "
                f"{layouts[0]}"
            )
        if role in ("value", "reference") and known[name].model != stage.model:
            raise ConfigError(f"{key}: got {name!r} of {known[name].model}, expected one of {stage.model}")


def _check_context(key: str, lengths: Rollout | Evaluation, model: str, limit: int) -> None:
    longest = lengths.max_prompt_length + lengths.max_new_tokens
    if longest > limit:
        raise ConfigError(
            f"{key}: got max_prompt_length {lengths.max_prompt_length} + max_new_tokens {lengths.max_new_tokens} = "
            f"{longest}, expected at most {model}.max_length={limit}"
        )

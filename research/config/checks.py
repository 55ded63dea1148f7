"""Keys that do not fit each other: refused before anything runs."""

from collections.abc import Mapping

from research.config.experiment import Experiment, Stage, make_model
from research.config.schema import expect, keys_of
from research.config.sections import Evaluation, Reward, Rollout
from research.core.errors import ConfigError


def check_experiment(experiment: Experiment) -> None:
    """Raises ConfigError where keys exclude each other or a role is played by nobody."""
    how, mesh, tools = experiment.evaluation, vars(experiment.mesh), experiment.tools
    expect(experiment.name.isprintable() and experiment.name, "name", experiment.name, "a printable name")
    for name, model in experiment.models.items():
        make_model(model, 512, name)
        _check_context("evaluation", how, name, model.max_length)
    fitting = f"values from 1 to evaluation.samples={how.samples} because pass@k needs k samples"
    expect(how.k and max(how.k) <= how.samples, "evaluation.k", list(how.k), fitting)
    alone = "1 at evaluation.temperature=0 because greedy samples are equal"
    expect(how.temperature or how.samples == 1, "evaluation.samples", how.samples, alone)
    if list(mesh.values()).count(-1) > 1 or 0 in mesh.values():
        raise ConfigError(f"mesh: got {mesh}, expected sizes of at least 1, at most one of them -1 (what is left)")
    slots = "> 0 with tools because only refilled slots stop a row for its result while the others go on"
    expect(experiment.sampler.slots or not tools.any, "sampler.slots", 0, slots)
    expect(len(set(tools.names)) == len(tools.names), "tools.names", list(tools.names), "each once")
    known: dict[str, Stage] = {}
    for stage in experiment.stages:
        _check_stage(stage, experiment)
        _check_roles(stage, known)
        known[stage.name] = stage


def _check_stage(stage: Stage, experiment: Experiment) -> None:
    name, rollout, limit = stage.name, stage.rollout, experiment.models[stage.model].max_length
    if stage.online:
        _check_unread(stage)
        _check_context(f"{name}.rollout", rollout, stage.model, limit)
        _check_rollout(stage)
        _check_reward(f"{name}.reward", stage)
    else:
        expect(stage.length <= limit, f"{name}.length", stage.length, f"at most {stage.model}.max_length={limit}")
    if stage.facts.given == "text" and stage.data.text_weight + stage.data.problems_weight <= 0:
        raise ConfigError(f"{name}.data: got text_weight and problems_weight 0, expected one to be positive")
    algorithm = stage.objective.static(stage.options, stage.online, rollout.group_size, rollout.max_new_tokens)
    key, parts = f"{name}.micro_batches", stage.micro_batches
    whole = f"1 under these options of {stage.objective.name} because a row's loss depends on the whole batch"
    expect(parts == 1 or not algorithm.batch_coupled, key, parts, whole)
    rows = stage.rows // (rollout.minibatches if stage.online else 1)
    expect(rows % parts == 0, key, parts, f"a divisor of the {rows} rows of an update")


def _check_rollout(stage: Stage) -> None:
    where, rollout, objective = f"{stage.name}.rollout", stage.rollout, stage.objective
    if objective.untruncated and rollout.truncates:
        raise ConfigError(
            f"{where}: got top_k {rollout.top_k} and top_p {rollout.top_p}, expected 0 and 1 under {objective.name} "
            "because its ratio compares log-probs of the untruncated distribution"
        )
    prompts, least = rollout.prompts_per_step, objective.least_prompts
    low, high = rollout.curriculum_low, rollout.curriculum_high
    expect(prompts >= least, f"{where}.prompts_per_step", prompts, f"at least {least} under {objective.name}")
    expect(low < high, f"{where}.curriculum_low", low, f"less than curriculum_high={high}")
    divisor = f"a divisor of the {prompts} prompts of an iteration because groups stay whole"
    expect(prompts % rollout.minibatches == 0, f"{where}.minibatches", rollout.minibatches, divisor)
    size = rollout.group_size
    for key, most in (("keep_per_prompt", size), ("pairs_per_prompt", size // 2)):
        got = stage.options.get(key, 1)
        fitting = f"1 to {most} because a group has {size} completions"
        expect(1 <= got <= most, f"{stage.name}.objective.{objective.name}.{key}", got, fitting)


def _check_reward(path: str, stage: Stage) -> None:
    reward, most = stage.reward, stage.rollout.max_new_tokens
    functions, weights = list(reward.functions), list(reward.weights)
    if reward.source == "functions":
        names = {chosen.component.name for chosen in stage.chosen("reward", "functions")}
        apart = "at least one, and different names because each is logged apart"
        expect(0 < len(names) == len(functions), f"{path}.functions", functions, apart)
        matched = not weights or len(weights) == len(functions)
        expect(matched, f"{path}.weights", weights, f"one for each of {functions}, or ()")
        if weights and not any(weights):
            raise ConfigError(f"{path}.weights: got only 0, expected a function to learn from")
    if (reward.format_mode == "off") != (reward.format_coef == 0):
        raise ConfigError(
            f"{path}.format_coef: got {reward.format_coef} under format_mode={reward.format_mode!r}, expected > 0 with "
            "a format reward and 0 without one because either alone has no effect"
        )
    paid, buffer = reward.overlong_coef or not reward.overlong_buffer, f"{path}.overlong_buffer"
    expect(paid, f"{path}.overlong_coef", 0, "> 0 because overlong_buffer is set")
    expect(reward.overlong_buffer <= most, buffer, reward.overlong_buffer, f"at most rollout.max_new_tokens={most}")


_REFINEMENTS = ("success_threshold", "unknown", "ensemble", "variance_coef", "format_pattern", "overlong_coef")
"""Keys of the reward that only say more about another one, which is checked."""


def _check_unread(stage: Stage) -> None:
    """A reward that the objective would not learn from is a mistake, wherever it is set."""
    used = stage.parsed.sections["reward"].used_keys(stage.facts)
    for name, declared in sorted(keys_of(Reward).items()):
        key, value = f"{stage.name}.reward.{name}", getattr(stage.reward, name)
        if key not in used and name not in _REFINEMENTS:
            of_functions = stage.reward.source == "model" and name in ("functions", "weights")
            because = "reward.source=model" if of_functions else f"objective.name={stage.objective.name}"
            nothing = f"{declared.default!r} because it has no effect under {stage.name}.{because}"
            expect(value == declared.default, key, value, nothing)


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
        if not name and role in ("value", "reference"):  # the stage that this one starts from
            expect(stage.start or role == "value", key, "", "a stage because this one starts from scratch")
            continue
        if not name and role == "reward":
            raise ConfigError(f"{key}: got none, expected at least one stage that trains a reward model")
        if "/" in name:  # a folder, which is read when data and models are prepared
            continue
        earlier = f"an earlier stage: {', '.join(known) or 'none'}; or the folder of a finished one"
        expect(name in known, key, name, earlier)
        player, layouts = known[name], PLAYERS[role]
        if player.facts.trains not in layouts:
            raise ConfigError(
                f"{key}: got {name!r}, which trains a {player.facts.trains}, expected a stage that trains a "
                f"{layouts[0]}"
            )
        if role in ("value", "reference") and player.model != stage.model:
            raise ConfigError(f"{key}: got {name!r} of {player.model}, expected one of {stage.model}")


def _check_context(key: str, lengths: Rollout | Evaluation, model: str, limit: int) -> None:
    prompt, completion = lengths.max_prompt_length, lengths.max_new_tokens
    if prompt + completion > limit:
        raise ConfigError(
            f"{key}: got max_prompt_length {prompt} + max_new_tokens {completion} = {prompt + completion}, expected at "
            f"most {model}.max_length={limit}"
        )

"""verl's reward manager of a scorer's decisions: scores the answer that they led to and weighs it with what it took."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from verl import DataProto
from verl.experimental.reward_loop.reward_manager import register
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.utils.import_utils import load_extern_object

from verl_speculator.errors import DataError
from verl_speculator.scorer.reward import Outcome, compute_spd_reward
from verl_speculator.scorer.settings import RewardSettings, RolloutSettings


@register("spd")
class SPDRewardManager(RewardManagerBase):
    """`reward.custom_reward_function` scores an answer, `reward.reward_kwargs` has the coefficients."""

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Callable[..., Any],
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        super().__init__(config, tokenizer, compute_score)
        self._settings = RewardSettings.of(config)
        self._answer_pattern = RolloutSettings.of(config.actor_rollout_ref).answer_pattern
        function = config.reward.custom_reward_function
        self._score_name = f"{function.path}:{function.name}"
        path, name = self._settings.step_reward_path, self._settings.step_reward_name
        self._step_name = f"{path}:{name}"
        self._step_reward = load_extern_object(path, name) if path and self._settings.step_weight else None

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """The reward of one row of `SPDRollout`'s, its parts, and the outcome.

        Raises:
            DataError: A function of the user's raised, or gave no number.
        """
        row = data[0].non_tensor_batch
        episode, extra = dict(row["episode"]), dict(row["extra_info"])
        answer, cost_price, context = (episode.pop(key) for key in ("answer", "cost_price", "context"))
        where = f"row {extra['index']} of {extra['file']}"
        if answer is None:
            episode["extracted"] = True  # `correct` says what is known
        else:
            given = await self._call(
                self.compute_score,
                self._score_name,
                where,
                data_source=row["data_source"],
                solution_str=self.tokenizer.decode(answer, skip_special_tokens=True),
                ground_truth=row["reward_model"]["ground_truth"],
                extra_info={**extra, "answer_pattern": self._answer_pattern},
            )
            values = given if isinstance(given, dict) else {"score": given}
            score = self._number(values.get("score"), self._score_name, where)
            episode |= {"correct": score > 0.5, "extracted": bool(values.get("extracted", True))}
        outcome = Outcome(**episode)
        step = 0.0
        if self._step_reward is not None:
            given = await self._call(
                self._step_reward,
                self._step_name,
                where,
                context=self.tokenizer.decode(context, skip_special_tokens=True),
                outcome=outcome.to_dict(),
                extra_info=extra,
            )
            step = self._number(given, self._step_name, where)
        reward, parts = compute_spd_reward(outcome, self._settings, cost_price, step)
        info = {f"reward_{name}": value for name, value in parts.items()}
        info |= {name: float(value) for name, value in outcome.to_dict().items()}
        return {"reward_score": reward, "reward_extra_info": {"acc": float(outcome.correct), **info}}

    async def _call(self, function: Callable[..., Any], name: str, where: str, **arguments: Any) -> Any:
        try:
            given = function(**arguments)
            return await given if inspect.isawaitable(given) else given
        except Exception as error:
            raise DataError(
                f"the reward function {name} failed on {where} ({type(error).__name__}: {error})"
            ) from error

    def _number(self, value: Any, name: str, where: str) -> float:
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise DataError(f"the reward function {name} gave {value!r} for {where}, which is no number") from error

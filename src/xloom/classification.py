"""`XLoraForSequenceClassification`: the X-LoRA model that labels texts, with a score head trained beside the mixture's.

The base computes logits and loss as transformers does; what labels mean is kept in its config, and noted in ours.
Running is in `xloom.passes`; making, loading and saving in `xloom.loading`.
Letters: B batch  T tokens  D hidden size  L labels  S sites  N experts
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, Cache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from xloom import architecture, checkpoints
from xloom.config import XLoraConfig, check_expert_names
from xloom.errors import ConfigError, UnsupportedLoraError, names
from xloom.experts import Expert
from xloom.loading import XLoraModel
from xloom.routers import Routed, check_known

# Options of from_experts that say what the score head answers; transformers keeps them in the base's config.
LABEL_OPTIONS = frozenset({"num_labels", "id2label", "problem_type", "pad_token_id"})
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass
class XLoraClassifierOutput(SequenceClassifierOutputWithPast):
    """A classifier's output (`logits` [B, L]), and `scalings` [B, T, S, N]: the experts' weights, after top-k."""

    scalings: Tensor | None = None


class XLoraForSequenceClassification(XLoraModel):
    """A base with a score head on its last token, whose LoRA experts are weighed per token and per site.

    Make one with `from_experts` or `from_pretrained`. Two parts are trained: `head`, which weighs the experts, and
    `score`, which reads the mixture's last hidden state; `unload()` gives the base back with the trained `score`.

    Attributes:
        base: the model for classification, with a `Site` in place of every adapted module.
        head: the `ScalingHead`.
        mixture: the sites.
    """

    saved_as = checkpoints.CLASSIFICATION
    base_options = architecture.BASE_OPTIONS | LABEL_OPTIONS
    makes_cache = False  # texts come whole
    accepts_loss_kwargs = False  # the base's loss is the mean over rows, whatever Trainer accumulates

    def __init__(self, config: XLoraConfig, base: PreTrainedModel | None = None, experts: Any = None) -> None:
        super().__init__(config, base, experts)
        self.score.requires_grad_(True)
        self._note_labels()

    @classmethod
    def from_experts(
        cls,
        base: str | Path | PreTrainedModel,
        experts: Mapping[str, str | Path | Expert],
        *,
        drop_sites_below_gate: bool = False,
        score_from: str | None = None,
        **options: Any,
    ) -> Self:
        """A model with a fresh head on a base and LoRA adapters that exist.

        Args:
            base: a model for classification, or the path or hub id of one or of the causal model. The score head is the
                base's own, or fresh where there is none for `num_labels` labels.
            experts: as in `XLoraForCausalLM.from_experts`, trained on the causal model or (PEFT: SEQ_CLS) on this one.
            score_from: name of the expert whose own score head is taken for a start.
            options: as in `XLoraForCausalLM.from_experts`; and
                `num_labels`, or `id2label` (their names by number);
                `problem_type`: "regression", "single_label_classification" or "multi_label_classification" (by default
                found out from the first labels, as transformers does);
                `pad_token_id`: the tokenizer's, for batches of several rows, where the base's config has none.

        Raises:
            XLoomError: one of its children names what does not fit.
        """
        check_expert_names(list(experts))
        read = {n: e if isinstance(e, Expert) else Expert.from_pretrained(e) for n, e in experts.items()}
        start = {} if score_from is None else _score_of(score_from, read)
        if start and not {"num_labels", "id2label"} & set(options):
            options["num_labels"] = start["weight"].shape[0]
        made = super().from_experts(base, read, drop_sites_below_gate=drop_sites_below_gate, **options)
        with made._unloaded_on_failure():
            if start:
                made._start_score_at(start, f"expert {score_from!r}")
        return made

    @property
    def score(self) -> nn.Linear:
        """The base's layer from the last token's hidden state [D] to logits [L]."""
        score: nn.Linear = self.base.score
        return score

    # --- forward ---

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        head_states: Tensor | None = None,
        routing: Routed | None = None,
        **kwargs: Any,
    ) -> XLoraClassifierOutput | tuple[Tensor, ...]:
        """As the base's forward; the output has `scalings` [B, T, S, N] beside.

        The logits are those of the last token that is not padding, on either side; a base with learned positions
        (GPT-2) wants `**model.positions(attention_mask)` for rows padded on the left, as it does without experts.

        Args:
            attention_mask: [B, T], 1 for real tokens; whatever id fills the other places, it counts as padding.
            labels: [B], or [B, L] for several labels per row or several numbers to predict.
            head_states: [B, T, D] from `compute_head_states` on the same tokens, which need not be computed again.
            routing: as in `XLoraForCausalLM.forward`.

        Raises:
            ConfigError: several rows, and no `pad_token_id` by which the base finds the last token.
        """
        out, decision = self.run_passes(
            input_ids=self._padded(input_ids, inputs_embeds, attention_mask),
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            head_states=head_states,
            labels=labels,
            routing=routing,
            **kwargs,
        )
        self.log(decision.scalings_BTSN)
        if self.config.problem_type != self.base.config.problem_type:  # found out from these labels
            self._note_labels()
        output = XLoraClassifierOutput(
            loss=out.loss,
            logits=out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            scalings=decision.scalings_BTSN,
        )
        return output if return_dict is not False else output.to_tuple()

    def _padded(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor | None:
        """The ids [B, T], with the id by which the base knows padding wherever the mask leaves tokens out."""
        first = input_ids if input_ids is not None else inputs_embeds
        pad = self.base.config.pad_token_id
        if pad is None and first is not None and first.shape[0] > 1:
            raise ConfigError(
                f"{first.shape[0]} rows, but the base has no pad_token_id to find the last token of each by: pass "
                "pad_token_id=tokenizer.pad_token_id to from_experts, or set model.base.config.pad_token_id"
            )
        if input_ids is None or pad is None or attention_mask is None or attention_mask.ndim != 2:
            return input_ids
        return input_ids.masked_fill(attention_mask[:, -input_ids.shape[1] :].to(input_ids.device) == 0, pad)

    # --- loading and saving ---

    @classmethod
    def _load_base(
        cls, base: str | Path | PreTrainedModel, options: dict[str, Any]
    ) -> tuple[PreTrainedModel, str | None]:
        labels = _checked_labels({key: options[key] for key in LABEL_OPTIONS & set(options)})
        options = {key: value for key, value in options.items() if key not in LABEL_OPTIONS}
        count = labels.get("num_labels")
        if count is not None and not isinstance(base, PreTrainedModel):
            options["num_labels"] = count
        model, where = architecture.load_base(base, options, "classification")
        if count not in (None, model.score.out_features):
            raise ConfigError(
                f"num_labels={count}, but the score head of the loaded base has {model.score.out_features}"
            )
        _set_labels(model.config, labels)
        return model, where

    @classmethod
    def _saved_options(cls, saved: checkpoints.Saved) -> dict[str, Any]:
        found = saved.config.base_config
        return {"id2label": saved.config.id2label, "problem_type": saved.config.problem_type} | {
            "pad_token_id": getattr(found, "pad_token_id", None)
        }

    @classmethod
    def _check_experts(cls, experts: Mapping[str, Expert]) -> None:
        for label, expert in experts.items():
            if any(module == "score" or module.startswith("score.") for module in expert.modules):
                raise UnsupportedLoraError(
                    f"expert {label!r} ({expert.source}) adapts the score head, which is trained as a whole; leave "
                    "`score` out of its target_modules"
                )

    def _restore(self, saved: checkpoints.Saved) -> None:
        super()._restore(saved)
        self.score.load_state_dict(checkpoints.checked_score(saved, self.score.state_dict()))

    def _as_saved(self) -> checkpoints.Saved:
        self._note_labels()
        saved = super()._as_saved()
        saved.score = dict(self.score.state_dict())
        return saved

    def _start_score_at(self, weights: Mapping[str, Tensor], who: str) -> None:
        mine = self.score.state_dict()
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in mine.items()}
        if found != wanted:
            raise ConfigError(f"score_from: {who} has a score head of shapes {found}, the base one of {wanted}")
        self.score.load_state_dict(weights)

    def _note_labels(self) -> None:
        """Copies what the base's config says of labels to ours, where pipelines and checkpoints look."""
        theirs = self.base.config
        labels = {"id2label": dict(theirs.id2label), "problem_type": theirs.problem_type}
        assert isinstance(self.config.base_config, PreTrainedConfig)
        _set_labels(self.config.base_config, labels | {"pad_token_id": theirs.pad_token_id})
        _set_labels(self.config, labels)


def _score_of(name: str, experts: Mapping[str, Expert]) -> Mapping[str, Tensor]:
    check_known([name], list(experts))
    if "weight" not in experts[name].score:
        brings = [label for label, expert in experts.items() if expert.score]
        raise ConfigError(f"score_from={name!r}: this expert brings no score head; {names(brings) or 'none'} does")
    return experts[name].score


def _checked_labels(given: dict[str, Any]) -> dict[str, Any]:
    """The label options that are not None, `num_labels` among them wherever `id2label` is.

    Raises:
        ConfigError: out of range, or contradicting each other.
    """
    labels = {key: value for key, value in given.items() if value is not None}
    count, problem = labels.get("num_labels"), labels.get("problem_type")
    if "id2label" in labels:
        id2label = labels["id2label"]
        if not isinstance(id2label, Mapping) or sorted(map(str, id2label)) != sorted(map(str, range(len(id2label)))):
            raise ConfigError(f"id2label must give a name to each number from 0 on, found {id2label!r}")
        labels["id2label"] = {int(number): id2label[number] for number in sorted(id2label, key=int)}
        if count not in (None, len(id2label)):
            raise ConfigError(f"num_labels={count}, but id2label names {len(id2label)} labels")
        labels["num_labels"] = count = len(id2label)
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ConfigError(f"num_labels must be a whole number of at least 1, found {count!r}")
    if problem is not None and problem not in PROBLEM_TYPES:
        raise ConfigError(f"problem_type must be one of {names(PROBLEM_TYPES)}, found {problem!r}")
    if problem == "single_label_classification" and count == 1:
        raise ConfigError("problem_type='single_label_classification' needs two labels or more, found num_labels=1")
    return labels


def _set_labels(config: PreTrainedConfig, labels: Mapping[str, Any]) -> None:
    if "id2label" in labels:
        config.id2label = dict(labels["id2label"])
        config.label2id = {label: number for number, label in config.id2label.items()}
    for key in ("problem_type", "pad_token_id"):
        if key in labels:
            setattr(config, key, labels[key])


AutoModelForSequenceClassification.register(XLoraConfig, XLoraForSequenceClassification, exist_ok=True)

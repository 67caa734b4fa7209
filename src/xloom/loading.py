"""`XLoraModel`: how X-LoRA models are made of a base and experts, loaded and saved.

Formats live in `xloom.checkpoints`, the running in `xloom.passes`. Knows nothing of what the base puts on top of its
decoder: the final classes say how their base is loaded (`_load_base`) and what they keep beside the head.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import AutoConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

from xloom import architecture, checkpoints
from xloom.config import XLoraConfig, check_expert_names, check_field_names
from xloom.errors import ConfigError, names
from xloom.experts import CONFIG_FILE, Expert
from xloom.passes import TwoPassModel


class XLoraModel(TwoPassModel):
    """Making, loading and saving, as all X-LoRA models do it; see `XLoraForCausalLM`."""

    # what config.json calls the class
    saved_as: ClassVar[str]
    # options of from_experts that belong to the base, not to XLoraConfig
    base_options: ClassVar[frozenset[str]] = architecture.BASE_OPTIONS

    @classmethod
    def from_experts(
        cls,
        base: str | Path | PreTrainedModel,
        experts: Mapping[str, str | Path | Expert],
        *,
        drop_sites_below_gate: bool = False,
        **options: Any,
    ) -> Self:
        """A model with a fresh head on a base and LoRA adapters that exist.

        Args:
            base: a model of transformers for the same task, or the path or hub id of one.
            experts: by name, in the order of the scalings' last axis: a PEFT LoRA folder, a hub id (`org/name` or
                `org/name/sub/folder`), or an `Expert`.
            drop_sites_below_gate: with `gate_at_layer=m`, cut what experts adapt below layer m instead of refusing.
            options: fields of `XLoraConfig`; and for a base given by name, `dtype`, `device_map`, `revision`,
                `attn_implementation`, `quantization_config`, `trust_remote_code`, `token`, `cache_dir`.

        Raises:
            XLoomError: one of its children names what does not fit.
        """
        check_expert_names(list(experts))
        fields = {key: value for key, value in options.items() if key not in cls.base_options}
        hidden_size = fields.pop("hidden_size", None)
        check_field_names(list(fields))
        XLoraConfig(**fields, experts=list(experts))  # contradictions show before anything heavy starts
        read = {n: e if isinstance(e, Expert) else Expert.from_pretrained(e) for n, e in experts.items()}
        cls._check_experts(read)
        base_options = {key: value for key, value in options.items() if key in cls.base_options}
        model, where = cls._load_base(base, base_options)
        config = XLoraConfig(
            base_config=model.config,
            base_model_name_or_path=where,
            base_revision=base_options.get("revision"),
            experts=list(experts),
            dtype=model.dtype,
            **fields,
        )
        found = architecture.hidden_size(model, gated=config.gate_at_layer is not None)
        if hidden_size not in (None, found):
            raise ConfigError(f"hidden_size={hidden_size}, but the base's hidden size is {found}")
        fitted = architecture.fit_experts(model, read, config.gate_at_layer, drop_sites_below_gate)
        made = cls(config, model, fitted)
        with made._unloaded_on_failure():
            architecture.check(made)
        return made

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        base: str | Path | PreTrainedModel | None = None,
        experts: Mapping[str, str | Path] | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        **options: Any,
    ) -> Self:
        """Loads a checkpoint of ours, of PEFT's X-LoRA or of the original xlora; their files tell them apart.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            base: instead of the base that the checkpoint names (or carries).
            experts: where experts are that a PEFT checkpoint names by a path that is gone, by their names there.
            options: for loading the base, as in `from_experts`.

        Raises:
            XLoomError: one of its children says which file, tensor or field is wrong.
        """
        if (dtype := options.pop("torch_dtype", None)) is not None:  # the older name
            options.setdefault("dtype", dtype)
        for key in ("config", "adapter_kwargs", "_from_auto", "use_safetensors", "weights_only"):
            options.pop(key, None)  # what the Auto classes pass beside; the config is in the same folder
        unknown = set(options) - architecture.BASE_OPTIONS
        if unknown:
            raise ConfigError(f"unknown option {names(sorted(unknown))}; XLoraConfig fields belong to from_experts")
        saved = checkpoints.read(pretrained_model_name_or_path, revision=revision, subfolder=subfolder, experts=experts)
        checkpoints.check_class(saved, cls.saved_as)
        cls._check_experts(saved.experts)
        source = base if base is not None else checkpoints.locate_base(saved)
        if saved.config.base_revision and base is None:
            options.setdefault("revision", saved.config.base_revision)
        if saved.config.dtype is not None and not isinstance(source, PreTrainedModel):
            options.setdefault("dtype", saved.config.dtype)  # the head was trained on the base in this dtype
        if base is None and (how := getattr(saved.config.base_config, "quantization_config", None)):
            options.setdefault("quantization_config", AutoQuantizationConfig.from_dict(dict(how)))
        model, where = cls._load_base(source, options | cls._saved_options(saved))
        architecture.check_same_base(saved.config, model)
        config = XLoraConfig(**{**saved.config.to_dict(), "base_config": model.config, "dtype": model.dtype})
        config.base_model_name_or_path = where or saved.config.base_model_name_or_path
        fitted = architecture.fit_experts(model, saved.experts, config.gate_at_layer, drop=False)
        made = cls(config, model, fitted)
        with made._unloaded_on_failure():
            checkpoints.check_sites(saved, made.sites)
            made._restore(saved)
            made.name_or_path = str(pretrained_model_name_or_path)
            architecture.check(made)
        return made

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        format: checkpoints.Format = "xloom",
        include_base: bool = False,
        include_experts: bool = True,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes a folder, self-contained but for the base; the folder appears whole or not at all.

        Args:
            format: "xloom", "peft" (X-LoRA of PEFT), "xlora" (the original) or "mistralrs" (mistral.rs 0.6.0).
            include_base: (xloom) put the base model into the folder too.
            include_experts: (xloom) False names the folders that the experts were read from instead of copying them,
                by their ways from the checkpoint: many heads can then share them.
            kwargs: what transformers' callers pass beside (`state_dict`, `safe_serialization`, ...) is not needed here;
                with `push_to_hub=True`, `repo_id`, `token` and the like.

        Raises:
            NotExportableError: the format has no words for something that this model uses.
            CheckpointError: the folder cannot be written.
        """
        if not is_main_process:
            return
        if include_base and format != "xloom":
            raise ConfigError(f"include_base belongs to format='xloom', found {format!r}")
        saved = self._as_saved()
        if not include_experts:
            saved.expert_folders = self._folders_of_experts(format)
        checkpoints.write(saved, Path(save_directory), format, base=self.plain_base() if include_base else None)
        if push_to_hub:
            from huggingface_hub import HfApi

            repo = kwargs.get("repo_id") or Path(save_directory).name
            api = HfApi(token=kwargs.get("token"))
            repo = api.create_repo(repo, private=kwargs.get("private"), exist_ok=True).repo_id
            api.upload_folder(repo_id=repo, folder_path=save_directory)

    # --- what the final classes do in their own way ---

    @classmethod
    def _load_base(
        cls, base: str | Path | PreTrainedModel, options: dict[str, Any]
    ) -> tuple[PreTrainedModel, str | None]:
        return architecture.load_base(base, options)

    @classmethod
    def _saved_options(cls, saved: checkpoints.Saved) -> dict[str, Any]:
        """Options for `_load_base` that a checkpoint brings."""
        return {}

    @classmethod
    def _check_experts(cls, experts: Mapping[str, Expert]) -> None:
        """Raises ExpertError for what the model has no place for."""

    def _restore(self, saved: checkpoints.Saved) -> None:
        self.head.load_state_dict(checkpoints.checked_head(saved, self.head.state_dict()))

    def _as_saved(self) -> checkpoints.Saved:
        by_site = self.mixture.experts_of_sites()
        experts = {
            name: self._rounded.get(name) or Expert(name, self.expert_configs[name], modules, self._expert_scores[name])
            for name, modules in zip(self.experts, by_site, strict=True)
        }
        return checkpoints.Saved(self.config, dict(self.head.state_dict()), experts, model_class=self.saved_as)

    def _folders_of_experts(self, format: str) -> dict[str, Path]:
        if format != "xloom":
            raise ConfigError(f"include_experts=False belongs to format='xloom', found {format!r}")
        if self.config.use_trainable_adapters:
            raise ConfigError("include_experts=False: trained experts are no longer those of their folders")
        folders = {name: Path(source).parent for name, source in self._expert_sources.items()}
        for name, folder in folders.items():
            if not (folder / CONFIG_FILE).is_file():
                raise ConfigError(
                    f"include_experts=False: expected expert {name!r} to come from a LoRA folder, found "
                    f"{self._expert_sources[name]!r}"
                )
        return folders

    @contextmanager
    def _unloaded_on_failure(self) -> Iterator[None]:
        """The caller's base does not keep the sites of a model that was never handed over."""
        try:
            yield
        except BaseException:
            self.unload()
            raise


AutoConfig.register("xlora", XLoraConfig, exist_ok=True)

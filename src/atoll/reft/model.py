"""PyReFT's ReftModel: a transformers model and the interventions that edit its hidden states, as one ordinary module.

The base stays as it is (frozen, whatever its architecture, dtype, quantisation or PEFT wrapper); hooks placed once do nothing but in calls of this
object. Interventions are registered submodules, so state_dict, parameters, train, eval and to reach them.

Used by callers of atoll.reft, by trainer.py and convert.py.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from atoll.errors import ConfigError, RequestRefused, UnsupportedAdapter
from atoll.reft import folder as files
from atoll.reft.calls import Call, EditHook, StepHook, cached, check_places, parse_places, parse_subspaces, recomputing
from atoll.reft.components import find_site, unwrapped
from atoll.reft.config import CONFIG_FILE, ReftConfig, check_base, with_instances
from atoll.reft.importer import is_pyreft_folder
from atoll.reft.interventions import Intervention, LowRankRotateLayer, retract_layers, settle_layers

_log = logging.getLogger(__name__)


@dataclass
class ReftModelOutput(ModelOutput):  # type: ignore[misc]  # transformers has no annotations here
    """What `forward(return_dict=True)` returns; collected_activations is PyReFT's and always None."""

    original_outputs: Any = None
    intervened_outputs: Any = None
    collected_activations: Any = None


def get_reft_model(model: nn.Module, reft_config: ReftConfig, set_device: bool = True, disable_model_grads: bool = True) -> ReftModel:
    """A ReftModel of `model`. set_device puts each intervention where the part of the base is that it edits; disable_model_grads freezes the base.

    With PEFT, wrap first and call `reft_model.model.enable_adapter_layers()` afterwards, which makes the LoRA factors trainable again.
    Raises ConfigError, UnsupportedAdapter (see components.find_site).
    """
    reft_model = ReftModel(reft_config, model, freeze=disable_model_grads)
    if set_device:
        reft_model._place()
    return reft_model


class ReftModel(nn.Module):
    """`model` with `interventions`, a ModuleDict under PyReFT's keys in the order of `representations`, in which unit_locations count them.

    config: a ReftConfig, or what its `representations` may be. Entries with a class get an instance whose embed_dim is the site's width. The same
    intervention_link_key means the same intervention. The base is put into eval mode and, unless freeze is False, frozen.
    """

    def __init__(self, config: ReftConfig | Any, model: nn.Module, *, freeze: bool = True, **_: Any) -> None:
        super().__init__()
        given = config if isinstance(config, ReftConfig) else ReftConfig(representations=config)
        sites = [find_site(model, entry.component, entry.layer) for entry in given.representations]
        self.config = with_instances(given, sites, model)
        self.model = model
        self.interventions = nn.ModuleDict({key: entry.intervention for key, entry in zip(given.keys, self.config.representations, strict=True)})
        self._owner = object()
        self._hook_keys = [object() for _ in sites]
        handles: list[Any] = []
        for key, site in zip(self._hook_keys, sites, strict=True):
            hook = EditHook(key, site.is_input)
            handles.append(
                site.module.register_forward_pre_hook(hook, with_kwargs=True) if site.is_input else site.module.register_forward_hook(hook)
            )
        inner: Any = unwrapped(model)
        for module in {id(module): module for module in (model, inner, getattr(inner, "base_model", inner))}.values():
            handles.append(module.register_forward_pre_hook(StepHook(self._owner), with_kwargs=True))
        weakref.finalize(self, _remove, handles)
        self.model.eval()
        if freeze:
            self.disable_model_gradients()

    @property
    def representations(self) -> list[Any]:
        """The configuration's entries, in order, each with its intervention."""
        return self.config.representations

    @property
    def sorted_keys(self) -> list[str]:
        """The interventions' keys, in order."""
        return list(self.interventions)

    @property
    def device(self) -> torch.device:
        """The base's device."""
        found: torch.device = unwrapped(self.model).device
        return found

    @property
    def generation_config(self) -> Any:
        """The base's."""
        return unwrapped(self.model).generation_config

    def forward(
        self,
        base: Mapping[str, Any],
        sources: Any = None,
        unit_locations: Any = None,
        source_representations: Any = None,
        subspaces: Any = None,
        labels: Tensor | None = None,
        output_original_output: bool = False,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        intervention_additional_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the base on `base` (input_ids [B, T] and what else it takes) with edits: (its own output or None, the edited output).

        unit_locations: {"sources->base": (None, L)}, L[intervention][row] a list of places in the row, counted from 0 with padding; a negative place
        edits nothing. Also one number or a flat list for all. None: every place. Two interventions at one place act in the configuration's order,
        the second on what the first wrote. subspaces: [intervention][row] lists. labels go to the base, whose loss the output then has.

        output_original_output: run the base without edits too. return_dict: a ReftModelOutput instead of the pair. Raises RequestRefused for places
        that do not fit the batch or the model, and for sources, which ReFT does not have.
        """
        call = self._call(base, sources, source_representations, unit_locations, subspaces, intervention_additional_kwargs)
        before = cached(base, _shape(base)[1])
        check_places(call.places, before + _shape(base)[1])
        kwargs: dict[str, Any] = {} if labels is None else {"labels": labels}
        training = self.training and torch.is_grad_enabled()
        if use_cache is None and training and "past_key_values" not in base:
            use_cache = False  # nothing would read it
        if use_cache is not None and "use_cache" not in base and "use_cache" in inspect.signature(unwrapped(self.model).forward).parameters:
            kwargs["use_cache"] = use_cache
        original = self.model(**base) if output_original_output else None
        with call.active():
            if training:
                with recomputing(self.model, call):
                    outputs = self.model(**base, **kwargs)
            else:
                outputs = self.model(**base, **kwargs)
        if return_dict:
            return ReftModelOutput(original_outputs=original, intervened_outputs=outputs)
        return original, outputs

    def generate(
        self,
        base: Mapping[str, Any],
        sources: Any = None,
        unit_locations: Any = None,
        source_representations: Any = None,
        intervene_on_prompt: bool = False,
        subspaces: Any = None,
        output_original_output: bool = False,
        intervention_additional_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """`model.generate(**base, **kwargs)` with edits: (ids without edits or None, edited ids [B * answers, T], prompts included).

        intervene_on_prompt=True edits the places of the prompts that unit_locations names; unit_locations=None: every place, generated ones too.
        intervene_on_prompt=False edits every generated token after the first, and place 0 is the only one there is (a negative one leaves a row or an
        intervention out). Give places for the rows of `base`: beams and num_return_sequences repeat them.
        """
        if getattr(unwrapped(self.model).config, "is_encoder_decoder", False):
            raise UnsupportedAdapter("generate edits prompts of decoders, but the base has an encoder and a decoder", hint="call the model itself")
        if unit_locations is None and not intervene_on_prompt:
            unit_locations = {"base": 0}
        call = self._call(base, sources, source_representations, unit_locations, subspaces, intervention_additional_kwargs)
        length = _shape(base)[1]
        if intervene_on_prompt:
            check_places(call.places, length)
        else:
            if any(places is not None and places.numel() and int(places.max()) > 0 for places in call.places):
                raise RequestRefused(
                    "with intervene_on_prompt=False the only place is 0, the token just generated",
                    hint="say intervene_on_prompt=True to edit the prompt",
                )
            call.generated = length
        model: Any = self.model
        original = model.generate(**base, **kwargs) if output_original_output else None
        with call.active():
            return original, model.generate(**base, **kwargs)

    def _call(
        self,
        base: Mapping[str, Any],
        sources: Any,
        source_representations: Any,
        unit_locations: Any,
        subspaces: Any,
        arguments: Mapping[str, Any] | None,
    ) -> Call:
        if sources is not None or source_representations is not None:
            raise RequestRefused("sources and source_representations are not None, but ReFT's interventions take no activations of other inputs")
        self._settle()
        number, (batch, _) = len(self._hook_keys), _shape(base)
        places, chosen = parse_places(unit_locations, number, batch), parse_subspaces(subspaces, number, batch)
        edits = {
            key: (intervention, index, chosen[index])
            for index, (key, intervention) in enumerate(zip(self._hook_keys, self.interventions.values(), strict=True))
        }
        return Call(self._owner, edits, places, arguments=arguments or {})

    def _rotations(self) -> list[LowRankRotateLayer]:
        return [module for module in self.interventions.modules() if isinstance(module, LowRankRotateLayer)]

    def _settle(self) -> None:
        """Do for classes with a forward of their own what ours do in theirs."""
        own = [intervention for intervention in self.interventions.values() if type(intervention).forward is not Intervention.forward]
        settle_layers(module for intervention in own for module in intervention.modules() if isinstance(module, LowRankRotateLayer))

    def retract(self) -> None:
        """Replace every R by the nearest matrix with orthonormal columns: for after an optimizer's step. Where it is forgotten, a forward does so."""
        retract_layers(self._rotations())

    def follow(self, optimizer: torch.optim.Optimizer) -> Any:
        """Retract after every step of `optimizer`; the handle's `remove()` ends that."""
        reference = weakref.ref(self)

        def after_step(*_: Any) -> None:
            if (model := reference()) is not None:
                model.retract()

        return optimizer.register_step_post_hook(after_step)

    def set_device(self, device: torch.device | str, set_model: bool = True) -> None:
        """Move the interventions, and the base unless it is quantised or spread over devices, which transformers does not let move."""
        self.interventions.to(device)
        base = unwrapped(self.model)
        if set_model and not getattr(base, "is_quantized", False) and getattr(base, "hf_device_map", None) is None:
            self.model.to(device)

    def get_device(self) -> torch.device:
        """The base's device."""
        return self.device

    def _place(self) -> None:
        for entry in self.representations:
            module = find_site(self.model, entry.component, entry.layer).module
            entry.intervention.to(next((tensor.device for tensor in module.parameters()), self.device))

    def disable_model_gradients(self) -> None:
        """Freeze the base and put it into eval mode."""
        self.model.eval()
        self.model.requires_grad_(False)

    def enable_model_gradients(self) -> None:
        """Make all of the base trainable and put it into train mode."""
        self.model.train()
        self.model.requires_grad_(True)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """The base's; edits are part of what is computed again."""
        base: Any = unwrapped(self.model)
        if hasattr(base, "activation_checkpointing_enable"):
            base.activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)
        else:  # transformers before that name
            base.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """The base's."""
        base: Any = unwrapped(self.model)
        getattr(base, "activation_checkpointing_disable", base.gradient_checkpointing_disable)()

    gradient_checkpointing_enable = activation_checkpointing_enable
    gradient_checkpointing_disable = activation_checkpointing_disable

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """Those of the interventions, then those of the base, each once."""
        return [tensor for module in (self.interventions, self.model) for tensor in module.parameters() if tensor.requires_grad]

    def count_parameters(self, include_model: bool = False) -> int:
        """How many numbers of the interventions, and of the base if asked, are trained."""
        modules = (self.interventions, self.model) if include_model else (self.interventions,)
        return sum(tensor.numel() for module in modules for tensor in module.parameters() if tensor.requires_grad)

    def print_trainable_parameters(self) -> None:
        """Print the counts in PyReFT's two lines."""
        ours, total = self.count_parameters(), sum(tensor.numel() for tensor in self.model.parameters())
        base = self.count_parameters(include_model=True) - ours
        sys.stdout.write(
            f"trainable intervention params: {ours:,d} || trainable model params: {base:,d}\n"
            f"model params: {total:,d} || trainable%: {100 * (ours + base) / total}\n"
        )

    def save(
        self, save_directory: str | Path, save_to_hf_hub: bool = False, hf_repo_name: str = "my-awesome-model", include_model: bool = False
    ) -> None:
        """Write configuration and weights (see folder.py), then push the folder to the Hugging Face hub if asked.

        include_model: the base's trainable tensors too, as LoRA factors. Raises ConfigError, StorageError.
        """
        self._write(Path(save_directory), self.config, include_model)
        if save_to_hf_hub:
            from huggingface_hub import HfApi

            api = HfApi()
            api.create_repo(hf_repo_name, exist_ok=True)
            api.upload_folder(repo_id=hf_repo_name, folder_path=str(save_directory), allow_patterns=[CONFIG_FILE, files.WEIGHTS_FILE])

    def save_intervention(self, save_directory: str | Path, include_model: bool = True) -> None:
        """Write the weights alone; `load_intervention` reads them onto a model built in the same way."""
        self._write(Path(save_directory), None, include_model)

    def _write(self, target: Path, config: ReftConfig | None, include_model: bool) -> None:
        settle_layers(self._rotations())
        trained = {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}
        if trained and not include_model:
            _log.warning("%s gets no tensor of the base, of which %d are trainable; include_model=True writes them", target, len(trained))
        files.write_folder(target, config, self.interventions, trained if include_model else {})  # type: ignore[arg-type]

    def load_intervention(self, load_directory: str | Path, include_model: bool = True) -> None:
        """Read a folder's weights into these interventions, and the base's trained tensors where the folder has them. Raises AdapterFormatError."""
        source = Path(load_directory)
        base = files.read_weights(source, self.interventions, include_model=include_model)  # type: ignore[arg-type]
        files.load_into_base(self.model, base, source)

    @staticmethod
    def load(
        load_directory: str | Path,
        model: nn.Module,
        local_directory: str | Path | None = None,
        from_huggingface_hub: bool = False,
        include_model: bool = False,
        act_fn: str | None = None,
    ) -> ReftModel:
        """The ReftModel that `save` wrote, or that PyReFT wrote (its files lack act_fn: say it), on `model`, in eval mode.

        from_huggingface_hub: load_directory is a repository's name, fetched into local_directory or the cache. Raises AdapterFormatError,
        UnsupportedAdapter, and BaseMismatch if the base has another width or number of layers than the one that was saved with.
        """
        source = Path(load_directory)
        if from_huggingface_hub:
            from huggingface_hub import snapshot_download

            patterns = [CONFIG_FILE, files.WEIGHTS_FILE, "intkey_*.bin", "pytorch_model.bin"]
            source = Path(snapshot_download(str(load_directory), local_dir=local_directory, allow_patterns=patterns))
        if is_pyreft_folder(source):
            config, base = files.read_pyreft_folder(source, include_model=include_model, act_fn=act_fn)
            reft_model = get_reft_model(model, config)
            files.load_into_base(model, base, source)
            return reft_model.eval()
        if act_fn is not None:
            raise ConfigError(f"act_fn is {act_fn!r}, but {source} says the activation itself", hint="leave act_fn out")
        config = ReftConfig.from_pretrained(source)
        check_base(config.base, model)
        reft_model = get_reft_model(model, config)
        reft_model.load_intervention(source, include_model=include_model)
        return reft_model.eval()

    def __str__(self) -> str:
        kinds = {key: type(intervention).__name__ for key, intervention in self.interventions.items()}
        return json.dumps({"model_type": type(unwrapped(self.model)).__name__, "interventions": kinds, "mode": self.config.mode}, indent=4)


def _shape(base: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and tokens of a batch."""
    for name in ("input_ids", "inputs_embeds"):
        tensor = base.get(name)
        if isinstance(tensor, Tensor) and tensor.dim() >= 2:
            return tensor.shape[0], tensor.shape[1]
    raise RequestRefused(f"the base example has {sorted(base)}, but needs input_ids or inputs_embeds of shape [rows, tokens]")


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()

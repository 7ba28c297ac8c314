"""The models of configuration: defaults, limits, and one sentence for what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from atoll import config as settings
from atoll import config_adapter as adapters
from atoll.config import (
    DataConfig,
    LandConfig,
    TrainConfig,
    TrainerConfig,
    atoll_home,
    is_valid_name,
    template_columns,
)
from atoll.config_adapter import LoraAdapterConfig, ReftAdapterConfig
from atoll.errors import ConfigError


def problem(**values: Any) -> ConfigError:
    """The error of a training config with these sections."""
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{"base": "tiny", **values})
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"adapter": {"r": 0}}, "adapter.r is 0: must be at least 1"),
        ({"adapter": {"r": 4096}}, "adapter.r is 4096: must be at most 1024"),
        ({"adapter": {"r": True}}, "adapter.r is True: must be a number, not true or false"),
        ({"adapter": {"r": 2.5}}, "adapter.r is 2.5: must be a whole number"),
        ({"adapter": {"r": "many"}}, "adapter.r is 'many': must be a whole number"),
        ({"adapter": {"alpha": 0}}, "adapter.alpha is 0: must be above 0"),
        ({"adapter": {"dropout": 1}}, "adapter.dropout is 1: must be below 1"),
        ({"adapter": {"type": "lorra"}}, "must be one of lora, loreft, noreft, direft, orthogonal_direft, consreft, lobireft; did you mean lora?"),
        ({"adapter": {"target_modules": []}}, "must not be empty; name linear layers of the base's blocks, or all-linear for all of them"),
        ({"adapter": {"target_modules": [3]}}, "must hold names of linear layers"),
        ({"adapter": {"target_modules": ["q_prj"]}}, "'q_prj' is not a linear layer of a block; did you mean q_proj?"),
        ({"adapter": {"target_modules": "all_linear"}}, "write all-linear"),
        ({"adapter": {"target_modules": "q_proj"}}, "must be all-linear or a list such as [q_proj, v_proj], but this is text"),
        ({"adapter": {"target_modules": ["q_proj", "q_proj"]}}, "names a layer twice"),
        ({"adapter": {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 4}}}, "rank_pattern names 'v_proj', which is none of the target"),
        ({"adapter": {"rank_pattern": {"3": 8}}}, "a layer number is ReFT's: give its type too"),
        ({"adapter": {"rank_pattern": {"v_proj": 0}}}, "must be from 1 to 1024"),
        ({"adapter": {"alpha_pattern": {"v_proj": -1.0}}}, "must be above 0"),
        ({"adapter": {"rank_pattern": {"v_proj": True}}}, "must be a number, not true or false"),
        ({"adapter": {"layers_to_transform": [0, -1]}}, "must be block numbers from 0, each once"),
        ({"adapter": {"layers_to_transform": []}}, "must not be empty"),
        ({"adapter": {"type": "loreft", "r": 8}}, "adapter: r is a key of LoRA, but the type is loreft; ReFT's rank is called rank"),
        ({"adapter": {"type": "lora", "positions": "l1"}}, "adapter: positions is a key of ReFT, but the type is lora; set type to one of loreft,"),
        ({"adapter": {"rank": 8}}, "adapter: rank is a key of ReFT, but the type is lora; set type to one of loreft, noreft,"),
        ({"adapter": {"rank": 8, "r": 8}}, "adapter: rank is a key of ReFT, but the type is lora"),
        ({"adapter": {"reft": {"r": 8}}}, "adapter.reft: r is a key of LoRA, but the type is loreft"),
        ({"adapter": {"reft": {"type": "lora"}}}, "adapter.reft.type is 'lora': must be 'loreft', 'noreft'"),
        ({"adapter": {"reft": {"rank": 0}}}, "adapter.reft.rank is 0: must be at least 1"),
        ({"adapter": {"type": "loreft", "rank": 2000}}, "adapter.rank is 2000: must be at most 1024"),
        ({"adapter": {"type": "LoReFT"}}, "did you mean loreft?"),
        ({"adapter": {"type": "loreft", "layers": "some"}}, 'must be all, last, a list of block numbers such as [0, 5, -1], or "2;10;18"'),
        ({"adapter": {"type": "loreft", "layers": []}}, "adapter.layers is []: must be all, last,"),
        ({"adapter": {"type": "loreft", "layers": 5}}, "adapter.layers is 5: must be all, last,"),
        ({"adapter": {"type": "loreft", "layers": [True]}}, "adapter.layers is [True]: must be"),
        ({"adapter": {"type": "loreft", "layers": "2;2"}}, "names a block twice"),
        ({"adapter": {"type": "loreft", "positions": "f7+f7"}}, "positions 'f7+f7' cannot be read; write f<n> for the first n prompt tokens"),
        ({"adapter": {"type": "loreft", "positions": []}}, "is not a list of whole numbers"),
        ({"adapter": {"type": "loreft", "positions": [1, 1]}}, "names a place twice"),
        ({"adapter": {"type": "loreft", "positions": 7}}, "must be text such as f7+l7, or a list of places"),
        ({"adapter": {"type": "loreft", "component": "block"}}, "adapter.component is 'block': must be 'block_input', 'attention_input',"),
        ({"adapter": {"type": "consreft", "activation": "relu"}}, "activation is relu, but consreft has no projection of the state"),
        ({"adapter": {"type": "loreft", "bias": True}}, "bias is true, but loreft has no second bias; only noreft has"),
        ({"adapter": {"type": "loreft", "rank_pattern": {3: 0}}}, "rank_pattern gives block 3 the rank 0; must be from 1 to 1024"),
        ({"adapter": {"type": "loreft", "rank_pattern": {"q_proj": 2}}}, "'q_proj': must be a whole number"),
        ({"trainer": {"learning_rate": -0.1}}, "trainer.learning_rate is -0.1: must be above 0"),
        ({"trainer": {"learning_rate": float("nan")}}, "trainer.learning_rate is nan: must be"),
        ({"trainer": {"warmup_fraction": 1.5}}, "trainer.warmup_fraction is 1.5: must be below 1"),
        ({"trainer": {"epochs": 0}}, "trainer.epochs is 0: must be above 0"),
        ({"trainer": {"epochs": None}}, "trainer.epochs is None: must be a number, but this is nothing"),
        ({"trainer": {"batch_size": 0}}, "trainer.batch_size is 0: must be at least 1"),
        ({"trainer": {"betas": [0.9, 1.0]}}, "must be two numbers from 0 to below 1"),
        (
            {"trainer": {"schedule": "cosin"}},
            "trainer.schedule is 'cosin': must be 'cosine', 'linear', 'constant', 'cosine_with_restarts', 'inverse_sqrt' or 'warmup_stable_decay'",
        ),
        ({"trainer": {"max_length": "p96"}}, "must be a number of tokens from 2, p95, or null"),
        ({"trainer": {"train_on_prompt": "perhaps"}}, "must be true or false"),
        ({"data": {"ratios": [0.5, 0.1, 0.1]}}, "must be three shares from 0 to 1 that sum to 1, but these sum to 0.7"),
        ({"data": {"ratios": [0, 0.5, 0.5]}}, "the first share is for training"),
        ({"data": {"metric": "acuracy"}}, "did you mean accuracy?"),
        ({"data": {"match": "digits"}}, "must be one of plain, number, number_after_####, sql, json"),
        ({"data": {"label_set": ["yes", False]}}, "data.label_set[1] is False: must be text, but this is true or false; put it in quotes"),
        ({"data": {"label_set": [1, "b"]}}, "data.label_set[0] is 1: must be text, but this is a number; put it in quotes"),
        ({"data": {"label_set": []}}, "must not be empty"),
        ({"data": {"label_set": ["a", "b", "a"]}}, "has 'a' more than once"),
        ({"data": {"template": "{text"}}, "braces do not match"),
        ({"data": {"template": "{}"}}, "does not name a column"),
        ({"data": {"template": "{text.__class__}"}}, "does not name a column"),
        ({"data": {"template": "{text:{width}}"}}, "has a format behind the column's name"),
        ({"data": {"template": "{text} {label}", "target": "label"}}, "the answer would stand in the prompt"),
        ({"data": {"path": "a.csv", "train": "b.csv"}}, "give either path or train"),
        ({"data": {"validation": "b.csv"}}, "need a train file"),
        ({"data": {"path": 5}}, "data.path is 5: must be text"),
        ({"data": ["a.csv"]}, "data is ['a.csv']: must be keys with values, but this is a list"),
        ({"generation": {"max_new_tokens": 0}}, "must be at least 1"),
        ({"generation": {"stop": ["", "x"]}}, "has an empty text"),
        ({"generation": {"stop": "x"}}, "must be a list, but this is text"),
        ({"quantization": {"bits": 3}}, "quantization.bits is 3: must be 4 or 8"),
        ({"quantization": {"bits": 8, "quant_type": "nf4"}}, "quant_type is about 4-bit weights, but bits is 8"),
        ({"quantization": {"resident": "int8"}}, "weights rounded to nf4 can lie in memory as bf16 or nf4"),
        ({"quantization": {"quant_type": "fp4", "resident": "nf4"}}, "weights rounded to fp4 can lie in memory as bf16 or fp4"),
        ({"trainer": {"neftune_noise_alpha": 0}}, "must be above 0"),
        ({"trainer": {"optimizer": "adamw8"}}, "trainer.optimizer is 'adamw8': must be 'adamw', 'sgd', 'adafactor' or 'lion'"),
        ({"trainer": {"fsdp_config": {"x": 1}}}, "fsdp_config is another trainer's; fsdp: true shares the base out over the processes"),
        ({"trainer": {"fsdp": True}, "adapter": {"type": "lora", "use_dora": True}}, "which trainer.fsdp keeps in parts"),
        ({"trainer": {"fsdp": True}, "quantization": {"bits": 4, "resident": "nf4"}}, "but quantization.resident is nf4"),
        ({"name": "../evil"}, "name is '../evil': must start with a letter or digit"),
        ({"base": ""}, "base is '': must be text that is not empty"),
    ],
)
def test_a_wrong_value_is_one_sentence_with_its_key(values: dict[str, Any], said: str) -> None:
    """pydantic's own report has several lines and a web address; a user needs the key, the value and the rule."""
    assert said in problem(**values).message


def test_an_unknown_key_gets_the_nearest_valid_one() -> None:
    """A misspelt key that is silently dropped trains with the default instead."""
    assert problem(adaptor={"r": 4}).hint == "did you mean adapter?"
    assert problem(adapter={"type": "loreft", "layer": 4}).hint == "did you mean adapter.layers?"
    assert problem(adapter={"reft": {"position": "l1"}}).hint == "did you mean adapter.reft.positions?"
    assert problem(adapter={"zebra": 4}).hint.startswith("keys of adapter: type, r, alpha")
    assert problem(positions="l1").hint == "did you mean adapter.reft.positions?"
    assert problem(trainer={"epoch": 1}).hint == "did you mean trainer.epochs?"
    assert problem(learning_rate=1e-3).hint == "did you mean trainer.learning_rate?"
    assert problem(trainer={"rank": 4}).message.endswith("trainer.rank is not a key that Atoll knows")
    assert problem(trainer={"zebra": 4}).hint.startswith("keys of trainer: epochs, max_steps")


def test_the_first_problem_is_told_in_full_and_the_others_are_counted() -> None:
    """A wall of text hides the problem; one at a time without a count feels endless."""
    assert problem(data={"label_set": [1, "b"]}).message.endswith("put it in quotes")  # one wrong entry is one problem
    assert problem(adapter={"type": "loreft", "rank": 0, "dropout": 1}).message.endswith("(and 1 more problem: adapter.dropout)")
    message = problem(adapter={"r": 0}, trainer={"epochs": 0, "seed": -1}).message
    assert "adapter.r is 0" in message
    assert message.endswith("(and 2 more problems: trainer.epochs, trainer.seed)")


def test_the_hint_is_the_fields_own_description() -> None:
    """The text in the schema, in --help and in errors is the same one."""
    assert problem(adapter={"r": 0}).hint == f"adapter.r: {LoraAdapterConfig.model_fields['r'].description}"


def test_every_field_of_every_section_has_a_description() -> None:
    """Descriptions are the only documentation of the file; a field without one is a setting that nobody can learn of."""
    sections = [value for value in vars(settings).values() if isinstance(value, type) and issubclass(value, settings.Section)]
    assert len(sections) >= 10
    missing = [f"{section.__name__}.{name}" for section in sections for name, field in section.model_fields.items() if not field.description]
    assert missing == []


def test_a_config_cannot_be_changed_and_survives_a_round_trip() -> None:
    """Nobody writes into a config after it is made: the record beside the adapter must be what was used."""
    config = TrainConfig(base="tiny", data="rows.jsonl", adapter={"target_modules": ["v_proj", "q_proj"], "rank_pattern": {"q_proj": 4}})  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        config.base = "other"  # type: ignore[misc]
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config
    assert config.data.path == "rows.jsonl"


def test_derived_values_follow_from_the_fields() -> None:
    """alpha is 2r unless given, all-linear means the seven linears, and targets come in one order whatever the file's."""
    assert LoraAdapterConfig(r=8).scaling_alpha == 16 and LoraAdapterConfig(r=8, alpha=4).scaling_alpha == 4
    assert LoraAdapterConfig().targets == adapters.TARGET_MODULES
    assert LoraAdapterConfig(target_modules=("v_proj", "q_proj")).targets == ("q_proj", "v_proj")
    assert DataConfig(template="{a} {{x}} {b c} {a}").columns == ("a", "b c")
    assert template_columns("no columns") == ()
    assert TrainerConfig(max_length="512").max_length == 512  # type: ignore[arg-type]


def test_reft_settings_have_one_form_however_they_are_written() -> None:
    """PyReFT's "2;10;18", lists and names; a round trip through the run's record gives an equal config."""
    short = TrainConfig(base="tiny", adapter={"type": "direft"})  # type: ignore[arg-type]
    assert short.adapter == ReftAdapterConfig(type="direft", rank=4, layers="all", positions="f7+l7", component="block_output", tied=True)
    for written, layers in (("2;10;-1", (2, 10, -1)), ([5], (5,)), ("7", (7,)), ("last", "last")):
        assert ReftAdapterConfig(layers=written).layers == layers
    long = TrainConfig(base="tiny", adapter={"type": "noreft", "positions": [0, -1], "bias": True, "rank_pattern": {"-1": 8}})  # type: ignore[arg-type]
    assert isinstance(long.adapter, ReftAdapterConfig)
    assert (long.adapter.positions, long.adapter.rank_pattern) == ((0, -1), {-1: 8})
    both = TrainConfig(base="tiny", adapter={"r": 8, "reft": {"rank": 2}})  # type: ignore[arg-type]
    assert isinstance(both.adapter, LoraAdapterConfig)
    assert both.adapter.reft == ReftAdapterConfig(type="loreft", rank=2)
    for config in (short, long, both):
        assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


def test_the_learning_rate_follows_the_kind_of_adapter_unless_it_is_given() -> None:
    """LoRA's rate hardly moves an edit of a few thousand numbers, and the user need not know."""

    def rate(**values: Any) -> float:
        return TrainConfig(**{"base": "tiny", **values}).trainer.learning_rate

    assert rate() == rate(adapter={"reft": {"rank": 2}}) == rate(adapter=LoraAdapterConfig()) == 5e-4
    assert rate(adapter={"type": "loreft"}) == rate(adapter=ReftAdapterConfig(), trainer={"epochs": 1}) == settings.REFT_LEARNING_RATE
    assert rate(adapter={"type": "loreft"}, trainer={"learning_rate": 5e-4}) == 5e-4
    assert TrainerConfig().reft_learning_rate == settings.REFT_RATE_BESIDE_LORA < settings.REFT_LEARNING_RATE


def test_names_are_file_names_that_stay_in_their_folder() -> None:
    """A name becomes a path in the hub."""
    good = ["a", "Ticket-router_2.1", "0", "x" * 96]
    bad = ["", ".", "..", "../x", "a/b", "a\\b", "a..b", "-a", ".a", "a b", "a\n", "é", "x" * 97]
    assert all(is_valid_name(name) for name in good)
    assert not any(is_valid_name(name) for name in bad)


def test_lists_that_stand_twice_agree() -> None:
    """config may not import the later layers, so names that they define are listed here too."""
    from atoll.eval.metrics import metrics
    from atoll.eval.row_metrics import MATCHES
    from atoll.model import reft
    from atoll.model.sites import TARGETS

    assert adapters.REFT_TYPES == reft.METHODS
    assert get_args(adapters.Component) == reft.COMPONENTS
    assert get_args(adapters.Activation) == ("none", *reft.ACTIVATIONS)
    assert set(adapters.WITHOUT_ACTIVATION) == set(reft.METHODS) - set(reft.LEARNED)
    assert set(settings.METRICS) == set(metrics())
    assert set(settings.MATCHES) == set(MATCHES)
    assert adapters.TARGET_MODULES == TARGETS


def test_data_that_nobody_named_is_asked_for() -> None:
    """A Ludwig file has no data path; training must say how to give one."""
    with pytest.raises(ConfigError) as caught:
        TrainConfig(base="tiny").require_data()
    assert "--data" in caught.value.hint
    assert TrainConfig(base="tiny", data=DataConfig(path="a.csv")).require_data().path == "a.csv"


# ---- lands ------------------------------------------------------------------------------------------------


def land(**values: Any) -> LandConfig:
    return LandConfig(**{"base": "tiny", **values})


def test_a_job_takes_the_defaults_and_over_them_its_own_keys() -> None:
    """A task that sets one key of a section must keep the section's other defaults, and a default must not beat the task."""
    config = land(
        defaults={"adapter": {"r": 8, "dropout": 0.1}, "trainer": {"epochs": 1}, "data": {"max_train_rows": 50}},
        tasks=["builtin:dates", {"data": "folder/sst2/", "adapter": {"r": 16}, "trainer": None}],
    )
    dates, sst2 = config.jobs()
    assert (dates.name, dates.data.path, dates.adapter.r, dates.adapter.dropout) == ("dates", "builtin:dates", 8, 0.1)
    assert (sst2.name, sst2.data.path, sst2.adapter.r, sst2.adapter.dropout) == ("sst2", "folder/sst2/", 16, 0.1)
    assert [job.trainer.epochs for job in (dates, sst2)] == [1, 1]
    assert [job.data.max_train_rows for job in (dates, sst2)] == [50, 50]
    assert dates.base == "tiny"


def test_a_key_that_a_task_sets_to_the_general_default_still_beats_the_lands_default() -> None:
    """Merging by value instead of by what was written would lose `r: 16` here."""
    (job,) = land(defaults={"adapter": {"r": 4}}, tasks=[{"data": "builtin:dates", "adapter": {"r": 16}}]).jobs()
    assert job.adapter.r == 16


def test_a_task_with_another_kind_of_adapter_takes_no_adapter_defaults() -> None:
    """A land of LoRAs may have one ReFT task, whose file says nothing about `r`; keys without a type belong to the land's kind."""
    config = land(defaults={"adapter": {"r": 8}}, tasks=[{"data": "builtin:a", "adapter": {"type": "loreft", "rank": 2}}, "builtin:b"])
    reft, lora = config.jobs()
    assert (reft.adapter, reft.trainer.learning_rate) == (ReftAdapterConfig(type="loreft", rank=2), settings.REFT_LEARNING_RATE)
    assert (lora.adapter, lora.trainer.learning_rate) == (LoraAdapterConfig(r=8), 5e-4)
    tasks = [{"dropout": 0.1}, {"positions": "l1"}, {"type": "lora"}, {"type": "direft"}]
    config = land(
        defaults={"adapter": {"type": "loreft", "rank": 8}}, tasks=[{"data": f"builtin:{n}", "adapter": adapter} for n, adapter in enumerate(tasks)]
    )
    found = [job.adapter for job in config.jobs()]
    assert found[:2] == [ReftAdapterConfig(type="loreft", rank=8, dropout=0.1), ReftAdapterConfig(type="loreft", rank=8, positions="l1")]
    assert found[2:] == [LoraAdapterConfig(), ReftAdapterConfig(type="direft", rank=8)]
    with pytest.raises(ConfigError, match=r"tasks\[0\] \(a\), with the defaults: adapter: rank is a key of ReFT, but the type is lora"):
        land(defaults={"adapter": {"r": 8}}, tasks=[{"data": "builtin:a", "adapter": {"rank": 2}}]).jobs()


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("builtin:dates", "dates"),
        ("data/sst2", "sst2"),
        ("data/v1.5/", "v1.5"),
        ("../rows.jsonl", "rows"),
        ({"name": "mine", "data": "rows.csv"}, "mine"),
        ({"data": {"train": "my_train.csv", "test": "t.csv"}}, "my_train"),
    ],
)
def test_a_tasks_name_comes_from_its_data(task: Any, name: str) -> None:
    """Most tasks need no name of their own."""
    assert [job.name for job in land(tasks=[task]).jobs()] == [name]


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([], "tasks is []: must not be empty"),
        (["builtin:dates", "other/dates.jsonl"], "tasks[1] has the name 'dates', which an earlier task has"),
        (["a/Dates", "b/dates"], "has the name 'dates'"),
        (["my rows.jsonl"], "tasks[0]: the data path gives this task the name 'my rows', which cannot be used"),
        (["../.."], "gives this task the name '..'"),
        ([{"name": "x"}], "tasks[0]: this task has no data"),
        ([{"name": "../x", "data": "builtin:dates"}], "tasks[0].name is '../x'"),
        ([3], "tasks[0] is 3: must be keys with values"),
        ([{"data": "builtin:dates", "adaptr": {}}], "tasks[0].adaptr is not a key"),
    ],
)
def test_a_bad_task_is_named_by_its_place(tasks: list[Any], said: str) -> None:
    """Two tasks of one name would overwrite each other's adapter; on some disks names differing in case are one."""
    with pytest.raises(ConfigError) as caught:
        land(tasks=tasks)
    assert said in caught.value.message


def test_a_mixture_that_contradicts_itself_names_the_task() -> None:
    """Each part may be valid alone; the sum is what is trained."""
    config = land(
        defaults={"adapter": {"rank_pattern": {"up_proj": 4}}}, tasks=["builtin:a", {"data": "builtin:b", "adapter": {"target_modules": ["q_proj"]}}]
    )
    with pytest.raises(ConfigError, match=r"tasks\[1\] \(b\), with the defaults: adapter: rank_pattern names 'up_proj'"):
        config.jobs()


def test_the_home_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests, containers and shared machines move it; it is not created by being asked for."""
    monkeypatch.setenv("ATOLL_HOME", str(tmp_path / "here"))
    assert atoll_home() == tmp_path / "here" and not atoll_home().exists()
    monkeypatch.setenv("ATOLL_HOME", "~/elsewhere")
    assert atoll_home() == Path.home() / "elsewhere"
    monkeypatch.setenv("ATOLL_HOME", "")
    assert atoll_home() == Path.home() / ".atoll"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATOLL_HOME", "relative")
    assert atoll_home() == tmp_path / "relative"

"""Where a value comes from: flags, variables, file, defaults; and what a file may not say."""

from pathlib import Path
from typing import Any

import pytest

from peftc.errors import ChainError, UsageError
from peftc.project import config

OPTIONS = {
    "decompose": {
        "ratio": "ratio",
        "rank": "rank",
        "plan": "plan",
        "set": "settings",
        "device": "device",
        "data": "data",
    },
    "analyze": {"ratio": "ratio", "plan": "plan"},
    "prune-layers": {"keep": "keep", "device": "device"},
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str | None = None, command: str = "decompose", **environ: str) -> config.Project:
    if text is not None:
        Path("peftc.toml").write_text(text)
    return config.load(command, OPTIONS, environ=environ)


def test_without_a_file_everything_is_default() -> None:
    assert load() == config.Project()


def test_each_level_overrules_the_ones_below() -> None:
    levels: list[dict[str, Any]] = [
        {"text": 'ratio = 0.1\nmodel = "m"'},
        {"text": 'ratio = 0.1\nmodel = "m"\n[decompose]\nratio = 0.2'},
        {"PEFTC_RATIO": "0.3"},
        {"PEFTC_RATIO": "0.3", "PEFTC_DECOMPOSE_RATIO": "0.4"},
    ]
    assert [load(**level).defaults["ratio"] for level in levels] == [0.1, 0.2, "0.3", "0.4"]
    assert load().model == "m"


def test_a_budget_replaces_the_budgets_below_it() -> None:
    project = load('[decompose]\nratio = 0.5\ndevice = "cpu"', PEFTC_RANK="8")
    assert project.defaults == {"rank": "8", "device": "cpu"}
    assert config.override("analyze", {"ratio": 0.5}, {"plan": "out.json"}) == {"ratio": 0.5, "plan": "out.json"}


def test_a_value_at_the_top_reaches_every_command_that_has_the_option() -> None:
    text = 'device = "cpu"\ndata = "d"\nteacher = "t"\nruns = "r"'
    assert load(text).defaults == {"device": "cpu", "data": "d"}
    assert load(command="prune-layers").defaults == {"device": "cpu"}
    assert load(command="analyze").defaults == {}
    assert load().runs == Path("r")


def test_names_are_spelled_with_either_dash() -> None:
    assert load("[prune_layers]\nkeep = 3", "prune-layers").defaults == {"keep": 3}
    assert load("[prune-layers]\nkeep = 3", "prune-layers").defaults == {"keep": 3}
    assert load(command="prune-layers", PEFTC_PRUNE_LAYERS_KEEP="4").defaults["keep"] == "4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[decompose]\nraito = 0.5",
            "unknown name `raito` in `\\[decompose\\]`.*\n.*`ratio`.*\n.*did you mean `ratio`",
        ),
        ("[decompos]\nratio = 0.5", "unknown name `decompos`.*\n.*\n.*did you mean `decompose`"),
        ("modle = 'm'", "did you mean `model`"),
        ("zzz = 1", "the names are `model`, `runs`, `data`, `teacher`"),
        ("model = 3", "`model` in `peftc.toml` is not a string"),
        ("model = ", "cannot read `peftc.toml`"),
        ("[analyze]\nrank = 3", "unknown name `rank` in `\\[analyze\\]`"),
    ],
)
def test_a_file_that_is_wrong_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(text)


def test_another_file_must_exist() -> None:
    with pytest.raises(UsageError, match="no project file at `other.toml`"):
        config.load("decompose", OPTIONS, Path("other.toml"), {})
    with pytest.raises(UsageError, match="no project file at `other.toml`"):
        load(PEFTC_CONFIG="other.toml")
    Path("other.toml").write_text('model = "m"')
    assert load(PEFTC_CONFIG="other.toml").model == "m"


def test_variables_that_name_nothing_are_reported_and_empty_ones_are_unset() -> None:
    project = load(PEFTC_RATOI="1", PEFTC_RATIO="", HOME="x", PEFTC_MODEL="m")
    assert project.warnings == ("the variable `PEFTC_RATOI` names no option and is ignored",)
    assert (project.model, project.defaults) == ("m", {})


def test_settings_and_lists_of_a_file_reach_the_step(peftc, stub) -> None:
    from peftc.report import Report

    seen: dict[str, Any] = {}
    stub("decompose", lambda model, **options: seen.update(options) or Report("decompose"))
    Path("peftc.toml").write_text(
        'model = "m"\n[decompose]\nratio = 0.5\nskip = ["head", "*.fc1"]\nset = { alpha = 0.25, exact = true }\n'
        "target-params = '22M'\npreprocess = { mean = [0.5, 0.4, 0.3] }\n"
    )
    result = peftc("decompose")
    assert result.exit_code == 0, result.stderr
    assert seen["skip"] == ("head", "*.fc1")
    assert seen["settings"] == {"alpha": 0.25, "exact": True}
    assert (seen["ratio"], seen["target_params"]) == ("0.5", 22_000_000)
    assert peftc("decompose", "--rank", "4").exit_code == 0
    assert (seen["rank"], seen["ratio"], seen["target_params"]) == (4, None, None)
    assert peftc("decompose", env={"PEFTC_SKIP": "'a b' c", "PEFTC_DRY_RUN": "1"}).exit_code == 0
    assert (seen["skip"], seen["dry_run"]) == (("a b", "c"), True)


def test_a_wrong_value_of_a_file_says_where_it_comes_from(peftc, stub) -> None:
    stub("decompose", lambda model, **options: pytest.fail("it ran"))
    Path("peftc.toml").write_text('model = "m"\n[decompose]\nrank = "many"\n')
    result = peftc("decompose")
    assert result.exit_code == 2
    assert "the value comes from `rank` in `[decompose]` of `peftc.toml`" in result.stderr


def test_construction_options_apply_to_models_that_are_no_artifacts(peftc, stub) -> None:
    from peftc.report import Report

    seen: dict[str, Any] = {}
    stub("bench", lambda model, **options: seen.update(options, model=model) or Report("bench"))
    Path("small").mkdir()
    Path("small/peftc.json").write_text("{}")
    assert peftc("bench", "small", "--against", "w.safetensors", "--arch", "timm:x", "--allow-code").exit_code == 0
    assert (seen["model"].arch, seen["against"].arch) == (None, "timm:x")
    assert seen["model"].allow_code and seen["against"].allow_code
    assert peftc("bench", "small", "--against", "base").exit_code == 0
    assert seen["against"] == "base"
    refused = peftc("bench", "small", "--against", "base", "--arch", "timm:x")
    assert refused.exit_code == 2
    assert "`small` is an artifact" in refused.stderr
    Path("peftc.toml").write_text('arch = "timm:x"\n')
    assert peftc("bench", "small").exit_code == 0
    assert seen["model"].arch is None


def test_a_place_is_the_first_the_step_took_or_the_end() -> None:
    links = [config.Link(step, Path(f"runs/{step}")) for step in ("decompose", "distill", "decompose")]
    chain = config.Chain(Path("runs"), tuple(links))
    assert (chain.own_place("decompose"), chain.own_place("distill"), chain.own_place("new")) == (0, 1, 3)
    assert chain.place_after("runs/distill") == 2
    assert chain.place_after("elsewhere") is None


def test_what_a_pipe_hands_on() -> None:
    Path("small").mkdir()
    assert config.artifact_from("small\n") == "small"
    assert config.artifact_from('{"artifact": "small", "x": 1}') == "small"
    with pytest.raises(ChainError, match="the step before it failed"):
        config.artifact_from(" ")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("skip = 1979-05-27", "`skip` in `peftc.toml` is 1979-05-27"),
        ("skip = { a = 1 }", "the option takes a list of texts"),
        ("skip = [[1]]", "the option takes a list of texts"),
        ("skip = '\"'", "the option takes a list of texts"),
        ("ratio = [0.5]", "the option takes one value"),
        ("method = { a = 1 }", "the option takes one value"),
        ("set = { a = { b = 1 } }", "or a table of its settings"),
        ("seed = 0.5", "'0.5' is not a valid int"),
        ("seed = 07:32:00", "the option takes one value"),
    ],
)
def test_a_value_that_nobody_could_type_is_refused(
    peftc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("peftc.toml").write_text(f'model = "m"\n[decompose]\n{line}\n')
    done = peftc("decompose")
    assert done.exit_code == 2 and said in done.stderr, done.stderr

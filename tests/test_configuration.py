"""What gin files and flags become, and that each mistake in them is one line with its place."""

import dataclasses
import importlib
import re
import subprocess
import sys

import pytest

from flix_jax import configs, configuration
from flix_jax.configuration import ConfigurationError, load, operative_config
from flix_jax.mistakes import Mistakes


@dataclasses.dataclass(frozen=True)
class Engine:
    power: int
    fuel: str = "steam"
    fuels: tuple[str, ...] = ()

    def __post_init__(self):
        if self.power < 1:
            raise ValueError(f"power is {self.power},\n expected at least 1")
        if self.fuel == "file":
            open("/no/such/file")


@dataclasses.dataclass(frozen=True)
class Train:
    engine: Engine
    wagons: tuple = ()
    name: str = "local"


def whistle(loud=False):
    return "WHEE" if loud else "whee"


@pytest.fixture(autouse=True)
def toys(monkeypatch, tmp_path):
    names = {name: f"{__name__}:{name}" for name in ("Engine", "Train", "whistle")}
    monkeypatch.setattr(configuration, "NAMES", configuration.NAMES | names)
    monkeypatch.chdir(tmp_path)


def write(name, text):
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    return name


RAILWAY = """\
# Required to be set:
POWER = %gin.REQUIRED  # of the engine, in horses

Train.engine = @big/Engine()
Train.wagons = (@whistle, @small/Engine())
big/Engine.power = %POWER
small/Engine:
    # the second one
    power = 3
    fuels = ['wood',
             'coal']
"""


def test_files_and_flags_become_objects():
    write("railway.gin", RAILWAY)
    write("express.gin", "include 'railway.gin'\nTrain.name = 'express'\n")
    config = load(["express.gin"], ["POWER=7", "small/Engine.fuel='oil'"])
    train = config.build("Train")
    assert (train.engine, train.name) == (Engine(7), "express")
    assert train.wagons[0]() == "whee"
    assert train.wagons[1] == Engine(3, "oil", ["wood", "coal"])
    assert type(train.engine) is Engine
    assert config.check_used() == []


def test_later_files_win_over_earlier_and_flags_over_files():
    write("a.gin", "Engine.power = 1\nEngine.fuel = 'a'\n")
    write("b.gin", "Engine.power = 2\n")
    assert load(["a.gin", "b.gin"]).build("Engine") == Engine(2, "a")
    assert load(["a.gin", "b.gin"], ["Engine.power=3", "Engine.power=4"]).build("Engine").power == 4


def test_nothing_is_left_of_what_was_loaded_before():
    load([], ["Engine.power=1", "Engine.fuel='oil'"])
    assert load([], ["Engine.power=2"]).build("Engine") == Engine(2, "steam")


def test_the_operative_config_is_a_gin_file_that_builds_the_same():
    write("railway.gin", RAILWAY)
    train = load(["railway.gin"], ["POWER=7"]).build("Train")
    write("config.gin", operative_config())
    again = load(["config.gin"]).build("Train")
    assert (again.engine, again.name, again.wagons[1]) == (train.engine, "local", train.wagons[1])
    assert "Engine.fuel = 'steam'" in operative_config()


def test_files_are_found_beside_the_user_and_among_the_packaged(monkeypatch, tmp_path):
    packaged = tmp_path / "installed" / "configs"
    (packaged / "models").mkdir(parents=True)
    (packaged / "models" / "engine.gin").write_text("Engine.power = 5\n")
    (packaged / "models" / "train.gin").write_text(
        "include 'configs/models/engine.gin'\nTrain.engine = @Engine()\n"
    )
    monkeypatch.setattr(configs, "FOLDER", packaged)
    absolute = str(packaged / "models" / "train.gin")
    for name in ("configs/models/train.gin", "models/train.gin", absolute):
        assert load([name]).build("Train").engine.power == 5
    write("engine.gin", "Engine.power = 6\n")
    assert load(["engine.gin"]).build("Engine").power == 6
    with pytest.raises(ConfigurationError, match="did you mean 'configs/models/train.gin'"):
        load(["configs/models/trian.gin"])


MISTAKES = {
    # name: (text of x.gin, flags, what the line holds)
    "unknown name": (
        "\nEngin.power = 1\n", [], "x.gin:2: unknown name 'Engin'; did you mean 'Engine'"),
    "unknown name of a block": ("Engin:\n  power = 1\n", [], "x.gin:1: unknown name 'Engin'"),
    "unknown reference": ("Train.engine = @Engin()\n", [], "x.gin:1: unknown name 'Engin'"),
    "unknown reference in a list": (
        "Train.wagons = [@Engine(),\n @Engin()]\n", [], "x.gin:1: unknown name 'Engin'"),
    "unknown parameter": (
        "Engine.power = 1\n\n# note\nbig/Engine.pwoer = 2\n", [],
        "x.gin:4: Engine has no parameter 'pwoer'; did you mean 'power'"),
    "unknown parameter in a block": (
        "Engine:\n  power = 1\n  fule = 2\n", [],
        "x.gin:3: Engine has no parameter 'fule'; did you mean 'fuel'"),
    "unknown parameter in a flag": (
        "", ["Engine.pwr=1"], "--gin.Engine.pwr=1: Engine has no parameter 'pwr'"),
    "unknown macro": (
        "POWER = 3\nEngine.power = %POWR\n", [], "x.gin:2: macro %POWR is not set (with POWR ="),
    "unknown macro in a macro": ("POWER = %POWR\n", [], "did you mean 'POWER'?"),
    "macros in a circle": ("A = %B\nB = [%A]\n", [], "x.gin:2: macro %A refers to itself"),
    "a class as a macro": ("Engine = 3\n", [], "x.gin:1: Engine is not a macro"),
    "a class without brackets": (
        "Train.engine = @Engine\n", [], "x.gin:1: @Engine is the class itself; write @Engine()"),
    "syntax": ("Engine.power == 1\n", [], "x.gin:1: syntax error: "),
    "no value": ("Engine.power = 1\nEngine.fuel = \n", [], "x.gin:2: syntax error: "),
    "a text without quotes": ("Engine.fuel = coal\n", [], "x.gin:1: syntax error: "),
    "an open bracket": ("Engine.fuels = ['a',\n", [], "syntax error: "),
    "indentation": ("Engine:\npower = 1\n", [], "x.gin:2: syntax error: "),
    "a flag without value": ("", ["Engine.power"], "--gin.Engine.power: expected --gin.NAME=VALUE"),
    "a flag with an empty value": ("", ["POWER="], "--gin.POWER=: expected --gin.NAME=VALUE"),
    "a flag's text without quotes": (
        "", ["DATA_DIR=../data"],
        "--gin.DATA_DIR=../data: ../data is not a value; text is quoted:"
        " --gin.DATA_DIR=\"'../data'\""),
    "a flag that is an include": ("", ["include 'a=b'"], "expected --gin.NAME=VALUE"),
    "missing include": ("include 'y.gin'\n", [], "x.gin:1: no gin file 'y.gin'"),
    "circular include": ("include 'x.gin'\n", [], "x.gin:1: 'x.gin' includes itself"),
    "failing import": ("import no.such_module\n", [], "x.gin:1: import no.such_module: No module"),
    "required": (
        RAILWAY, [], "required and not given: POWER (of the engine, in horses, x.gin:2); give"),
    "required in a container": (
        "Engine.power = 1\nEngine.fuels = ('a', %gin.REQUIRED)\n", [], "Engine.fuels (x.gin:2)"),
    "several required": (
        "A = %gin.REQUIRED\nEngine.power = %REQUIRED\nEngine.fuel = %A\n", [],
        "A (x.gin:1), Engine.power (x.gin:2)"),
    "refused by the constructor": (
        "Engine.fuel = 'a'\nEngine.power = 0\n", [],
        "x.gin:2: Engine: power is 0, expected at least 1"),
    "refused, from a macro in a flag": (
        RAILWAY, ["POWER=0"], "--gin.POWER=0 (through x.gin:6): Engine: power is 0, expected at"
        " least 1 (in scope 'big')"),
    "refused, from a block": (
        RAILWAY.replace("power = 3", "power = -3"), ["POWER=1"], "x.gin:9: Engine: power is -3"),
    "an object of another class": (
        "Train.engine = @whistle()\nTrain.engine = @Train()\n", [],
        "x.gin:2: Train.engine is @Train(), expected @Engine()"),
    "a text for a list": (
        "Engine.power = 1\nEngine.fuels = 'oil'\n", [],
        "x.gin:2: Engine.fuels is 'oil', expected a list of texts, such as ('oil',)"),
    "an object for a list": (
        "Engine.power = 1\nEngine.fuels = @Engine()\n", [],
        "x.gin:2: Engine.fuels is @Engine(), expected a list"),
    "of the wrong type": (
        "Engine.power = 'much'\n", [], "x.gin:1: Engine.power is 'much', expected int"),
    "a file that is not there": (
        "Engine.power = 1\nEngine.fuel = 'file'\n", [], "No such file or directory"),
    "a parameter without value": (
        "Train.engine = @big/Engine()\n", [],
        "x.gin:1: big/Engine.power has no value; add big/Engine.power = VALUE to a gin file or"
        " give --gin.big/Engine.power=VALUE"),
    "an object within itself": (
        "Train.engine = @Engine()\nEngine.power = 1\nTrain.wagons = (@Train(),)\n", [],
        "Train is configured to contain"),
    "a flag without effect": (
        RAILWAY, ["POWER=1", "POWR=2"],
        "--gin.POWR=2: nothing that is used refers to %POWR; did you mean 'POWER'"),
    "a flag in a scope that is not there": (
        RAILWAY, ["POWER=1", "bigg/Engine.fuel='a'"],
        "no effect: no Engine is used in the scope 'bigg'; did you mean 'big'"),
    "a flag of what is not used": (
        "Engine.power = 1\n", ["whistle.loud=True"],
        "whistle.loud has no effect: no whistle is used"),
}  # fmt: skip


@pytest.mark.parametrize("text, flags, expected", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_with_its_place(text, flags, expected):
    write("x.gin", text)
    with pytest.raises(ConfigurationError) as raised:
        config = load(["x.gin"], flags)
        config.build("Train" if "Train" in text else "Engine")
        config.check_used()
    message = str(raised.value)
    assert expected in message
    assert "\n" not in message and "configurable" not in message and "0x" not in message


def test_several_mistakes_are_told_at_once_and_none_that_follows_from_another():
    write("x.gin", "Engin:\n  power = 1\n  fuel = 'a'\nA = @Engin()\nEngine.power = %A\n")
    write("y.gin", "include 'x.gin'\nEngine.pwoer = 2\n")
    with pytest.raises(Mistakes) as raised:
        load(["y.gin"], ["Engine.fuel=1", "Engine.power=%B"])
    assert [str(error).partition(";")[0] for error in raised.value.errors] == [
        "x.gin:1: unknown name 'Engin'",
        "x.gin:4: unknown name 'Engin'",
        "y.gin:2: Engine has no parameter 'pwoer'",
        "--gin.Engine.fuel=1: Engine.fuel is 1, expected str",
    ]


def test_only_what_is_built_has_to_be_given():
    write("railway.gin", RAILWAY)
    assert load(["railway.gin"], ["Engine.power=1"]).build("whistle") == "whee"
    with pytest.raises(ConfigurationError, match="required and not given: POWER"):
        load(["railway.gin"]).build("Train")


def test_the_digest_tells_bindings_apart():
    one, other = load([], ["Engine.power=1", "A=1"]), load([], ["A=1", "Engine.power=1"])
    assert one.digest() == other.digest()
    assert one.digest() != load([], ["Engine.power=2", "A=1"]).digest()
    assert one.digest(without=["Engine"]) == load([], ["A=1"]).digest()


def test_a_macro_counts_for_a_digest_where_it_is_referred_to():
    def powered(a):
        return load([], ["Engine.power=%A", f"A={a}"])

    assert powered(1).digest() != powered(2).digest()
    assert powered(1).digest(without=["Engine"]) == powered(2).digest(without=["Engine"])


def test_what_a_file_sets_in_vain_is_listed_not_refused():
    write("x.gin", "Engine.power = 1\nSPEED = 3\nfast/Engine.fuel = 'oil'\nwhistle.loud = True\n")
    config = load(["x.gin"])
    config.build("Engine")
    assert config.check_used() == [
        "x.gin:2: nothing that is used refers to %SPEED",
        "x.gin:3: fast/Engine.fuel has no effect: no Engine is used in the scope 'fast'",
        "x.gin:4: whistle.loud has no effect: no whistle is used",
    ]


def test_a_name_that_a_user_registers_is_known_after_its_import(tmp_path, monkeypatch):
    (tmp_path / "my_railway.py").write_text(
        "import gin\n\n@gin.configurable\ndef signal(colour):\n    return colour\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    write("x.gin", "import my_railway\nsignal.colour = 'red'\n")
    assert load(["x.gin"]).build("signal") == "red"


@pytest.mark.parametrize("name", configuration.NAMES)
def test_every_name_of_the_table_is_there(name):
    module, _, attribute = configuration.NAMES[name].partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_adapters_are_configured_by_the_names_of_the_table():
    write(
        "x.gin",
        """
AdapterSpec.space = @FeatureSpace()
AdapterSpec.targets = ('attention',)
FeatureSpace.types = (@task/FeatureType(), @language/FeatureType())
task/FeatureType.name = 'task'
task/FeatureType.rank = 2
language/FeatureType.name = 'language'
FeatureType.dropout = 0.5
""",
    )
    config = load(["x.gin"], ["language/FeatureType.values=('sw', 'yo')"])
    spec = config.build("AdapterSpec")
    task, language = spec.space.types
    assert (task.name, task.rank, task.dropout, task.values) == ("task", 2, 0.5, None)
    assert (language.name, language.dropout, language.values) == ("language", 0.5, ("sw", "yo"))
    assert config.check_used() == []


def test_a_misspelt_name_costs_no_heavy_import():
    write("x.gin", "AdapterSpec.alpha = 8\nMixtrue.rates = 'equal'\n")
    code = """
import sys
from flix_jax import configuration
try:
    configuration.load(["x.gin"])
except configuration.ConfigurationError as error:
    print(error)
assert not {"tensorflow", "seqio"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("x.gin:2: unknown name 'Mixtrue'; did you mean 'Mixture'")


def test_an_error_after_building_gets_the_place_of_the_value_that_it_names():
    config = load([], ["Engine.power=1", "Engine.fuel='oil'"])
    with pytest.raises(ConfigurationError, match=r"^--gin\.Engine\.power=1: Engine\.power is low$"):
        with config.placing_errors():
            raise ValueError("Engine.power is low")
    with pytest.raises(ValueError, match="^no name in it$"):
        with config.placing_errors():
            raise ValueError("no name in it")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["FeatureType.rank='two'"], "--gin.FeatureType.rank='two': FeatureType.rank is 'two'"),
        (["FeatureType.rank=4.0"], "FeatureType.rank is 4.0, expected int"),
        (["FeatureType.rank=True"], "FeatureType.rank is True, expected int"),
        (["base/Run.seed=None"], "base/Run.seed is None, expected int"),
        (["Optimizer.clip_norm='1'"], "Optimizer.clip_norm is '1', expected float or None"),
        (["R='two'", "FeatureType.rank=%R"], "--gin.R='two': FeatureType.rank is 'two', expected"),
    ],
)
def test_a_value_of_another_type_is_refused_when_it_is_read(flags, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)) as error:
        configuration.load((), flags)
    assert "\n" not in str(error.value)


def test_an_int_is_a_float_and_none_where_it_may_be():
    configuration.load((), ["Optimizer.clip_norm=1", "Optimizer.eps=1", "AdapterSpec.alpha=None"])
    configuration.load((), ["R=None", "Optimizer.clip_norm=%R", "FeatureType.values=('a',)"])

"""Gin configuration: the names of the project's classes, and files and flags turned into objects.

`NAMES` is the one table of what a gin file may configure. `load` reads files and flags, checks
every name and reference before anything is built, and answers each mistake in one line with its
place (file and line, or the flag) and the nearest valid name. Modules are imported only when a
file mentions a name of theirs, so that a misspelt name costs no heavy import.
"""

import dataclasses
import importlib
import importlib.resources
import inspect
import io
import os
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import gin
from etils import epath
from gin import config as gin_config
from gin import config_parser

from flix_jax.adapters.suggest import did_you_mean

NAMES: dict[str, str] = {
    "T5Config": "flix_jax.models.t5:T5Config",
    "FeatureType": "flix_jax.adapters.features:FeatureType",
    "FeatureSpace": "flix_jax.adapters.features:FeatureSpace",
    "AdapterSpec": "flix_jax.adapters.injection:AdapterSpec",
    "Mixture": "flix_jax.data.cells:Mixture",
    "Babel": "flix_jax.tasks.babel:Babel",
    "Schedule": "flix_jax.training.optimizers:Schedule",
    "Optimizer": "flix_jax.training.optimizers:Optimizer",
    "MeshSpec": "flix_jax.training.partitioning:MeshSpec",
    "Run": "flix_jax.experiments.run:Run",
    "Evaluation": "flix_jax.experiments.run:Evaluation",
}

_MACRO = "gin.macro"
_MODULE = "flix"  # what gin files every name of ours under; never needs writing


class ConfigurationError(ValueError):
    """A mistake in a gin file or flag; the message is one line and names the place."""


# --------------------------------------------------------------------------------------------
# Names


def _register(name: str) -> None:
    """Imports what `NAMES` says of `name` and makes it known to gin (a second time: nothing)."""
    module, _, attribute = NAMES[name].partition(":")
    target = getattr(importlib.import_module(module), attribute)
    gin.external_configurable(target, name=name, module=_MODULE)


def _resolve(selector: str, place: str) -> str:
    """The complete gin selector that `selector` stands for; an error when there is not just one."""
    name = selector.rsplit(".", 1)[-1]
    if name in NAMES:
        _register(name)
    matches = gin_config._REGISTRY.matching_selectors(selector)
    if len(matches) == 1:
        return str(matches[0])
    if matches:
        _fail(place, f"'{selector}' is ambiguous: {', '.join(sorted(matches))}")
    _fail(place, f"unknown name '{selector}'; {did_you_mean(name, NAMES)}")


def _target(selector: str) -> Callable[..., Any]:
    """The class or function behind a complete selector, with gin's parameters filled in."""
    target: Callable[..., Any] = gin.get_configurable(selector)
    return target


def _parameters(selector: str) -> tuple[list[str], bool]:
    """Names of the parameters that may be bound, and whether any other name is taken too."""
    target = gin_config._REGISTRY[selector].wrapped
    parameters = list(inspect.signature(target.__init__ if inspect.isclass(target) else target)
                      .parameters.values())
    if inspect.isclass(target):
        parameters = parameters[1:]
    keywords = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return (
        [parameter.name for parameter in parameters if parameter.kind in keywords],
        any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters),
    )


def _short(selector: str) -> str:
    return selector.removeprefix(f"{_MODULE}.")


def _scoped(scope: str, name: str) -> str:
    return f"{scope}/{name}" if scope else name


def _fail(place: str, message: str) -> NoReturn:
    raise ConfigurationError(f"{place}: {message}" if place else message)


# --------------------------------------------------------------------------------------------
# Reading


@dataclasses.dataclass(frozen=True)
class _Reference:
    """`@scope/Name`, `@scope/Name()` or `%NAME` as it was read, not yet looked up."""

    name: str
    evaluate: bool = False
    macro: bool = False

    def __repr__(self) -> str:
        if self.macro:
            return f"%{self.name}"
        return f"@{self.name}{'()' if self.evaluate else ''}"

    @property
    def required(self) -> bool:
        return self.macro and self.name in ("gin.REQUIRED", "REQUIRED")


class _ReferenceReader(config_parser.ParserDelegate):
    def configurable_reference(self, name: str, evaluate: bool) -> _Reference:
        return _Reference(name, evaluate)

    def macro(self, name: str) -> _Reference:
        return _Reference(name, macro=True)


@dataclasses.dataclass(frozen=True)
class Binding:
    """One `scope/Name.parameter = value`; a macro is the parameter `value` of `gin.macro`."""

    scope: str
    selector: str
    parameter: str
    value: Any
    place: str
    comment: str = ""
    flag: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        return self.scope, self.selector, self.parameter

    @property
    def name(self) -> str:
        """As one writes it: `NAME` for a macro, `scope/Name.parameter` otherwise."""
        if self.selector == _MACRO:
            return self.scope
        return _scoped(self.scope, f"{_short(self.selector)}.{self.parameter}")


def _references(value: Any) -> Iterator[_Reference]:
    if isinstance(value, _Reference):
        yield value
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from _references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)


def _replace(value: Any, change: Callable[[_Reference], Any]) -> Any:
    """`value` with every reference in its containers replaced by `change(reference)`."""
    if isinstance(value, _Reference):
        return change(value)
    if isinstance(value, dict):
        return {_replace(k, change): _replace(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replace(item, change) for item in value)
    return value


def _statements(text: str, place: Callable[[int], str], flag: bool) -> Iterator[Any]:
    """Gin's statements in `text`; syntax errors become one line at `place(line)`."""
    try:
        yield from config_parser.ConfigParser(io.StringIO(text), _ReferenceReader())
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        _fail(place(min(line, text.count("\n") + 1)), f"syntax error: {message}")
    except (SyntaxError, ValueError) as error:
        message = str(getattr(error, "msg", None) or error)
        message = " ".join(message.split("\n")[-1].split())
        name, _, value = (part.strip() for part in text.partition("="))
        if flag and re.fullmatch(r"[\w./:~ -]+", value):
            _fail(place(1), f"{value} is not a value; text is quoted: --gin.{name}=\"'{value}'\"")
        _fail(place(getattr(error, "lineno", None) or 1), f"syntax error: {message}")


def find_file(name: str, place: str = "") -> epath.Path:
    """The gin file `name` (or bucket path), in the working directory or the packaged configs.

    'configs/models/x.gin' and 'models/x.gin' both find a packaged file. Raises
    ConfigurationError with the nearest packaged file when there is none.
    """
    configs = Path(str(importlib.resources.files("flix_jax.configs")))
    for candidate in map(epath.Path, (name, configs.parent / name, configs / name)):
        if candidate.is_file():
            return candidate
    known = [f"configs/{path.relative_to(configs)}" for path in configs.rglob("*.gin")]
    _fail(place, f"no gin file '{name}' in {os.getcwd()} or among the packaged configs"
          f"; {did_you_mean(name, known)}")


class _Reader:
    """Collects the bindings of files and flags; a later binding of a name replaces an earlier."""

    def __init__(self) -> None:
        self.bindings: dict[tuple[str, str, str], Binding] = {}

    def read_file(self, name: str, place: str = "", within: tuple[str, ...] = ()) -> None:
        path = find_file(name, place)
        identity = os.fspath(path.resolve())
        if identity in within:
            _fail(place, f"'{name}' includes itself")
        within = (*within, identity)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            _fail(place, f"'{name}' is not a text file in UTF-8")

        def at(line: int) -> str:
            return f"{path}:{line}"

        for statement in _statements(text, at, flag=False):
            where = at(statement.location.line_num)
            if isinstance(statement, config_parser.IncludeStatement):
                self.read_file(statement.filename, where, within)
            elif isinstance(statement, config_parser.ImportStatement):
                _import(statement.module, where)
            elif isinstance(statement, config_parser.BlockDeclaration):
                _resolve(statement.selector, where)
            else:
                self._bind(statement, where)

    def read_flag(self, text: str) -> None:
        flag = f"--gin.{text}"
        if not text.partition("=")[2].strip():
            _fail(flag, "expected --gin.NAME=VALUE or --gin.Name.parameter=VALUE")
        for statement in _statements(text, lambda line: flag, flag=True):
            if not isinstance(statement, config_parser.BindingStatement):
                _fail(flag, "expected --gin.NAME=VALUE or --gin.Name.parameter=VALUE")
            self._bind(statement, flag, flag=True)

    def _bind(
        self, statement: config_parser.BindingStatement, place: str, flag: bool = False
    ) -> None:
        scope, selector, parameter, value, location = statement
        if not parameter:
            if selector in NAMES:
                _fail(place, f"{selector} is not a macro; set one of its parameters:"
                      f" {selector}.PARAMETER = VALUE")
            scope, selector, parameter = _scoped(scope, selector), _MACRO, "value"
        else:
            selector = _resolve(selector, place)
            names, takes_any = _parameters(selector)
            if parameter not in names and not takes_any:
                _fail(place, f"{_short(selector)} has no parameter '{parameter}'"
                      f"; {did_you_mean(parameter, names)}")
        for reference in _references(value):
            if not reference.macro:
                self._check_reference(reference, place)
        comment = location.line_content.rpartition(" # ")[2].strip()
        binding = Binding(
            scope, selector, parameter, value, place,
            comment=comment if " # " in location.line_content else "", flag=flag,
        )
        self.bindings[binding.key] = binding

    def _check_reference(self, reference: _Reference, place: str) -> None:
        selector = _resolve(reference.name.rsplit("/", 1)[-1], place)
        if inspect.isclass(gin_config._REGISTRY[selector].wrapped) and not reference.evaluate:
            _fail(place, f"{reference} is the class itself; write {reference}() for an object")

    def check(self) -> None:
        """Macros that are not set, that refer to themselves, and values that must be given."""
        macros = {key[0]: b for key, b in self.bindings.items() if key[1] == _MACRO}

        def visit(binding: Binding, path: tuple[str, ...]) -> None:
            for reference in _references(binding.value):
                if not reference.macro or reference.required:
                    continue
                if reference.name in path:
                    _fail(binding.place, f"macro %{reference.name} refers to itself")
                if reference.name not in macros:
                    _fail(binding.place, f"macro {reference} is not set (with {reference.name} ="
                          f" VALUE, or the flag --gin.{reference.name}=VALUE);"
                          f" {did_you_mean(reference.name, macros)}")
                visit(macros[reference.name], (*path, reference.name))

        for binding in self.bindings.values():
            visit(binding, (binding.scope,) if binding.selector == _MACRO else ())
        missing = [
            binding for binding in self.bindings.values()
            if any(reference.required for reference in _references(binding.value))
        ]
        if missing:
            listed = ", ".join(
                f"{b.name} ({b.comment + ', ' if b.comment else ''}{b.place})" for b in missing
            )
            raise ConfigurationError(
                f"required and not given: {listed}; give each with --gin.NAME=VALUE"
                f" (a text in quotes of its own: --gin.{missing[0].name}=\"'text'\")"
            )


def _import(module: str, place: str) -> None:
    """A gin file's `import my.module`, for names that a user registers with gin."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        _fail(place, f"import {module}: {error}")


# --------------------------------------------------------------------------------------------
# Building


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What `load` read. Gin's registry is global: the last one loaded is the one in force."""

    bindings: tuple[Binding, ...]

    def build(self, name: str) -> Any:
        """The object that `name` configures, with everything that it refers to.

        Raises ConfigurationError in one line, with the place of the value at fault, for whatever
        a constructor refuses and for a parameter that has no value.
        """
        selector = _resolve(name, "")
        try:
            return _target(selector)()
        except RecursionError as error:
            raise ConfigurationError(f"{name} is configured to contain itself") from error
        except (ValueError, TypeError, OSError) as error:
            raise ConfigurationError(self._explain(error)) from error

    def check_used(self) -> list[str]:
        """Call after building. One line for each binding that nothing built has used.

        Raises ConfigurationError where such a binding came from a flag, since whoever gave a
        flag meant it.
        """
        used = list(gin_config._OPERATIVE_CONFIG)
        lines = []
        for binding in self.bindings:
            if any(binding.selector == selector and _within(scope, binding.scope)
                   for scope, selector in used):
                continue
            scopes = {scope for scope, selector in used if selector == binding.selector} - {""}
            if binding.selector == _MACRO:
                reason = f"nothing that is used refers to %{binding.name}"
            else:
                reason = f"{binding.name} has no effect: no {_short(binding.selector)} is used"
                if binding.scope and any(selector == binding.selector for _, selector in used):
                    reason += f" in the scope '{binding.scope}'"
            if scopes:
                reason += f"; {did_you_mean(binding.scope, scopes)}"
            if binding.flag:
                _fail(binding.place, reason)
            lines.append(f"{binding.place}: {reason}")
        return lines

    def _explain(self, error: Exception) -> str:
        message, *calls = str(error).split("\n  In call to configurable ")
        call = re.match(r"'([^']*)' .*?(?: in scope '([^']*)')?$", calls[0]) if calls else None
        if call is None:
            return _one_line(message)
        name, scope = call.group(1), call.group(2) or ""
        missing = re.search(r"No values supplied by Gin or caller for arguments: \[(.*)\]", message)
        if missing:
            names = [item.strip(" '") for item in missing.group(1).split(",")]
            wanted = ", ".join(_scoped(scope, f"{name}.{parameter}") for parameter in names)
            where = self._referring(name, scope)
            first = _scoped(scope, f"{name}.{names[0]}")
            return (f"{where}{wanted} {'has' if len(names) == 1 else 'have'} no value; add"
                    f" {first} = VALUE to a gin file or give --gin.{first}=VALUE")
        mine = [b for b in self.bindings if _short(b.selector).rsplit(".", 1)[-1] == name
                and _within(scope, b.scope)]
        named = [b for b in mine if re.search(rf"\b{re.escape(b.parameter)}\b", message)]
        deepest = max(named or mine, key=lambda b: len(b.scope), default=None)  # the one that holds
        where = f"{self._origin(deepest)}: " if deepest else self._referring(name, scope)
        label = "" if name in message else f"{name}: "
        suffix = f" (in scope '{scope}')" if scope else ""
        return f"{where}{label}{_one_line(message)}{suffix}"

    def _origin(self, binding: Binding) -> str:
        """Where a value comes from; the flag or line that set the macro when it is one."""
        macros = {b.scope: b for b in self.bindings if b.selector == _MACRO}
        if isinstance(binding.value, _Reference) and binding.value.name in macros:
            macro = macros[binding.value.name]
            return f"{self._origin(macro)} (through {binding.place})"
        return binding.place

    def _referring(self, name: str, scope: str) -> str:
        for binding in self.bindings:
            for reference in _references(binding.value):
                if reference.name in (_scoped(scope, name), name) and not reference.macro:
                    return f"{binding.place}: "
        return ""


def _within(scope: str, outer: str) -> bool:
    """Whether a binding made in `outer` holds in `scope`."""
    return not outer or scope == outer or scope.startswith(f"{outer}/")


def _one_line(message: str) -> str:
    return " ".join(message.split())


def load(gin_files: Sequence[str] = (), bindings: Sequence[str] = ()) -> Configuration:
    """Reads gin files, then flags (`'NAME=VALUE'`, as after `--gin.`), and puts them in force.

    Args:
      gin_files: names for `find_file`, read in order; later bindings replace earlier ones.
      bindings: texts such as `"DATA_DIR='data'"` or `"AdapterSpec.alpha=8"`; they win over files.

    Raises:
      ConfigurationError: in one line, for an unknown name, parameter, macro or file, a syntax
        error, a wrong reference, and `%gin.REQUIRED` left unset (all of them are listed).
    """
    reader = _Reader()
    for name in gin_files:
        reader.read_file(name)
    for text in bindings:
        reader.read_flag(text)
    reader.check()
    gin.clear_config()
    delegate = gin_config.ParserDelegate()

    def look_up(reference: _Reference) -> Any:
        if reference.macro:
            return delegate.macro(reference.name)
        return delegate.configurable_reference(reference.name, reference.evaluate)

    for binding in reader.bindings.values():
        gin.bind_parameter(binding.key, _replace(binding.value, look_up))
    return Configuration(tuple(reader.bindings.values()))


def operative_config() -> str:
    """Every value, given or by default, of everything built since `load`; itself a gin file."""
    return str(gin.operative_config_str(max_line_length=100))

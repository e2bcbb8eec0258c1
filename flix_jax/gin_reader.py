"""Reads gin files and flags into bindings; every mistake is one line with its place.

Names are looked up and references checked while reading, so nothing is built from a config that
holds a mistake. What may be configured is given by a table of names.
"""

import collections.abc
import dataclasses
import importlib
import inspect
import io
import os
import re
import tokenize
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import gin
from etils import epath
from gin import config as gin_config
from gin import config_parser

from flix_jax.adapters.suggest import did_you_mean
from flix_jax.configs import find_config
from flix_jax.data import bounded
from flix_jax.mistakes import Collected, Mistake

_LISTS = (tuple, list, collections.abc.Sequence)
MACRO = "gin.macro"
MODULE = "flix"  # what gin files every name of ours under; never needs writing
PACKAGE = "flix_jax"  # what every gin file may import from
MOST_BYTES = 2**20  # of a gin file
MOST_FILES = 1000  # that are read for a configuration, as often as they are included
MOST_VALUES = 10**6  # in the value of a macro, with those of the macros in it


class ConfigurationError(Mistake):
    """A mistake in a gin file or flag; the message is one line and names the place."""


# --------------------------------------------------------------------------------------------
# Names


def _register(name: str, names: Mapping[str, str]) -> None:
    """Imports what `names` says of `name` and makes it known to gin, once.

    Gin would take a second time for another configurable, unequal to the first.
    """
    if f"{MODULE}.{name}" in gin_config._REGISTRY:
        return
    module, _, attribute = names[name].partition(":")
    target = getattr(importlib.import_module(module), attribute)
    gin.external_configurable(target, name=name, module=MODULE)


def resolve(selector: str, place: str, names: Mapping[str, str]) -> str:
    """The complete gin selector that `selector` stands for; an error when there is not just one."""
    name = selector.rsplit(".", 1)[-1]
    if name in names:
        _register(name, names)
    matches = gin_config._REGISTRY.matching_selectors(selector)
    if len(matches) == 1:
        return str(matches[0])
    if matches:
        fail(place, f"'{selector}' is ambiguous: {', '.join(sorted(matches))}")
    fail(place, f"unknown name '{selector}'; {did_you_mean(name, names)}")


def _parameters(selector: str) -> tuple[list[str], bool]:
    """Names of the parameters that may be bound, and whether any other name is taken too."""
    target = gin_config._REGISTRY[selector].wrapped
    parameters = list(
        inspect.signature(
            target.__init__ if inspect.isclass(target) else target
        ).parameters.values()
    )
    if inspect.isclass(target):
        parameters = parameters[1:]
    keywords = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return (
        [parameter.name for parameter in parameters if parameter.kind in keywords],
        any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters),
    )


def _types(selector: str, parameter: str) -> tuple[type, ...]:
    """The classes of which a parameter's value must be one; none where its annotation is open."""
    target = gin_config._REGISTRY[selector].wrapped
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):
        return ()
    hint = hints.get(parameter)
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    found = typing.get_args(hint) if union else (hint,)
    classes = tuple(typing.get_origin(item) or item for item in found)
    closed = all(isinstance(item, type) and item is not typing.Any for item in classes)
    return classes if closed else ()


def _check_type(selector: str, name: str, parameter: str, value: Any, place: str) -> None:
    """An error for a value of a class that the parameter does not take."""
    allowed = _types(selector, parameter)
    if not allowed or (isinstance(value, Reference) and (value.macro or not value.evaluate)):
        return
    if isinstance(value, Reference):
        (complete,) = gin_config._REGISTRY.matching_selectors(value.name.rsplit("/", 1)[-1])
        given = gin_config._REGISTRY[complete].wrapped
        if not inspect.isclass(given) or any(_is_protocol(item) for item in allowed):
            return
        fits = issubclass(given, allowed)
    else:
        fits = any(_fits(value, item) for item in allowed)
    if fits:
        return
    if isinstance(value, str) and tuple in allowed:
        fail(place, f"{name} is {value!r}, expected a list of texts, such as ({value!r},)")
    fail(place, f"{name} is {value!r}, expected {' or '.join(map(_type_name, allowed))}")


def _fits(value: Any, allowed: type) -> bool:
    """Whether a literal, which may hold references, is of a class."""
    if allowed in _LISTS:
        # A text is a sequence, too: what takes sequences says better what it expects.
        return isinstance(value, tuple | list | allowed)
    if _is_protocol(allowed):
        return False
    if isinstance(value, bool):
        return allowed in (bool, object)
    return isinstance(value, allowed) or (type(value) is int and allowed is float)


def _is_protocol(item: type) -> bool:
    return bool(getattr(item, "_is_protocol", False))


def _type_name(item: type) -> str:
    """As one writes it in a gin file."""
    if item is type(None):
        return "None"
    if item in _LISTS:
        return "a list"
    if item is collections.abc.Mapping:
        return "a mapping {…}"
    if item.__module__ == "builtins":
        return item.__name__
    return f"a {item.__name__}, @Name()" if _is_protocol(item) else f"@{item.__name__}()"


def short(selector: str) -> str:
    return selector.removeprefix(f"{MODULE}.")


def scoped(scope: str, name: str) -> str:
    return f"{scope}/{name}" if scope else name


def fail(place: str, message: str) -> NoReturn:
    raise ConfigurationError(f"{place}: {message}" if place else message)


# --------------------------------------------------------------------------------------------
# Reading


@dataclasses.dataclass(frozen=True)
class Reference:
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
    def configurable_reference(self, name: str, evaluate: bool) -> Reference:
        return Reference(name, evaluate)

    def macro(self, name: str) -> Reference:
        return Reference(name, macro=True)


@dataclasses.dataclass(frozen=True, eq=False)
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
        if self.selector == MACRO:
            return self.scope
        return scoped(self.scope, f"{short(self.selector)}.{self.parameter}")


def references(value: Any) -> Iterator[Reference]:
    if isinstance(value, Reference):
        yield value
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references(item)


def replace(value: Any, change: Callable[[Reference], Any]) -> Any:
    """`value` with every reference in its containers replaced by `change(reference)`."""
    if isinstance(value, Reference):
        return change(value)
    if isinstance(value, dict):
        return {replace(k, change): replace(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(replace(item, change) for item in value)
    return value


def _statements(text: str, place: Callable[[int], str], flag: bool) -> Iterator[Any]:
    """Gin's statements in `text`; syntax errors become one line at `place(line)`."""
    try:
        yield from config_parser.ConfigParser(io.StringIO(text), _ReferenceReader())
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        fail(place(min(line, text.count("\n") + 1)), f"syntax error: {message}")
    except (RecursionError, MemoryError):
        fail(place(1), "syntax error: nested too deeply, somewhere in the file")
    except (SyntaxError, ValueError, TypeError) as error:
        message = str(getattr(error, "msg", None) or error)
        message = " ".join(message.split("\n")[-1].split())
        name, _, value = (part.strip() for part in text.partition("="))
        if flag and re.fullmatch(r"[\w./:~ -]+", value):
            fail(place(1), f"{value} is not a value; text is quoted: --gin.{name}=\"'{value}'\"")
        fail(place(getattr(error, "lineno", None) or 1), f"syntax error: {message}")


def find_file(name: str, place: str = "") -> epath.Path:
    """The gin file `name`, as `flix_jax.configs.find_config` finds it.

    Raises ConfigurationError, at `place`, with the nearest packaged file when there is none.
    """
    try:
        return find_config(name)
    except ValueError as error:
        fail(place, str(error))


def import_module(module: str, place: str) -> None:
    """Executes a module that is allowed to be; ConfigurationError, at `place`, where it cannot."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        fail(place, f"import {module}: {error}")


class Reader:
    """Collects the bindings of files and flags; a later binding of a name replaces an earlier.

    Args:
      names: what may be configured.
      modules: what files may import beside this package, each with all that is in it.
    """

    def __init__(self, names: Mapping[str, str], modules: Sequence[str] = ()) -> None:
        self.names = names
        self.modules = (PACKAGE, *modules)
        self._reads = 0
        self.bindings: dict[tuple[str, str, str], Binding] = {}
        self.files: dict[str, epath.Path] = {}  # what was read, by the names that asked for it
        self._mistakes = Collected()
        self._unknown: set[str] = set()  # names of blocks, told once and not for every line

    def read_file(self, name: str, place: str = "", within: tuple[str, ...] = ()) -> None:
        path = find_file(name, place)
        self.files[name] = path
        identity = os.fspath(path.resolve())
        if identity in within:
            fail(place, f"'{name}' includes itself")
        within = (*within, identity)
        self._reads += 1
        if self._reads > MOST_FILES + 1:
            return  # told already
        if self._reads > MOST_FILES:
            fail(place, f"'{name}': more than {MOST_FILES:,} files are included, each time it is")
        try:
            text = bounded.read_bytes(path, MOST_BYTES).decode()
        except UnicodeDecodeError:
            fail(place, f"'{name}' is not a text file in UTF-8")
        except ValueError as error:
            fail(place, str(error))

        def at(line: int) -> str:
            return f"{path}:{line}"

        with self._mistakes.part():
            for statement in _statements(text, at, flag=False):
                where = at(statement.location.line_num)
                if isinstance(statement, config_parser.ImportStatement):
                    self._import(statement, where)  # without it, names below would be unknown
                    continue
                with self._mistakes.part():
                    self._take(statement, where, within)

    def _take(self, statement: Any, where: str, within: tuple[str, ...]) -> None:
        if isinstance(statement, config_parser.IncludeStatement):
            self.read_file(statement.filename, where, within)
        elif isinstance(statement, config_parser.BlockDeclaration):
            self._unknown.add(statement.selector)
            resolve(statement.selector, where, self.names)
            self._unknown.remove(statement.selector)
        elif statement.selector not in self._unknown:
            self._bind(statement, where)

    def _import(self, statement: config_parser.ImportStatement, place: str) -> None:
        """`import my.module`, for names that a user registers with gin: the module is executed."""
        module = statement.module
        allowed = any(module == name or module.startswith(f"{name}.") for name in self.modules)
        if not allowed or "__" in module:  # __main__ would be a command
            fail(
                place,
                f"{statement.format()}: executes code outside {PACKAGE}; if you trust it, allow it "
                f"with --gin_import={module.partition('.')[0]}",
            )
        import_module(module, place)

    def read_flag(self, text: str) -> None:
        with self._mistakes.part():
            self._read_flag(text)

    def _read_flag(self, text: str) -> None:
        flag = f"--gin.{text}"
        if not text.partition("=")[2].strip():
            fail(flag, "expected --gin.NAME=VALUE or --gin.Name.parameter=VALUE")
        for statement in _statements(text, lambda line: flag, flag=True):
            if not isinstance(statement, config_parser.BindingStatement):
                fail(flag, "expected --gin.NAME=VALUE or --gin.Name.parameter=VALUE")
            self._bind(statement, flag, flag=True)

    def _bind(
        self, statement: config_parser.BindingStatement, place: str, flag: bool = False
    ) -> None:
        scope, selector, parameter, value, location = statement
        if not parameter:
            if selector in self.names:
                fail(
                    place,
                    f"{selector} is not a macro; set one of its parameters:"
                    f" {selector}.PARAMETER = VALUE",
                )
            scope, selector, parameter = scoped(scope, selector), MACRO, "value"
        else:
            selector = resolve(selector, place, self.names)
            names, takes_any = _parameters(selector)
            if parameter not in names and not takes_any:
                fail(
                    place,
                    f"{short(selector)} has no parameter '{parameter}'"
                    f"; {did_you_mean(parameter, names)}",
                )
        for reference in references(value):
            if not reference.macro:
                self._check_reference(reference, place)
        if selector != MACRO:
            name = f"{short(selector)}.{parameter}"
            _check_type(selector, scoped(scope, name), parameter, value, place)
        comment = location.line_content.rpartition(" # ")[2].strip()
        binding = Binding(
            scope,
            selector,
            parameter,
            value,
            place,
            comment=comment if " # " in location.line_content else "",
            flag=flag,
        )
        self.bindings[binding.key] = binding

    def _check_reference(self, reference: Reference, place: str) -> None:
        selector = resolve(reference.name.rsplit("/", 1)[-1], place, self.names)
        if inspect.isclass(gin_config._REGISTRY[selector].wrapped) and not reference.evaluate:
            fail(place, f"{reference} is the class itself; write {reference}() for an object")

    def check(self) -> None:
        """Tells what is wrong: macros not set, that refer to themselves, or huge by each other.

        Raises:
          ConfigurationError: a mistake.
          Mistakes: several.
        """
        self._mistakes.tell()  # what is missing for their sake is no mistake of its own
        macros = {key[0]: b for key, b in self.bindings.items() if key[1] == MACRO}
        sizes: dict[str, int] = {}  # of macros that were visited: values in them, through others

        circle: set[str] = set()

        def visit(binding: Binding, path: tuple[str, ...]) -> int:
            size = 1
            for reference in references(binding.value):
                size += 1
                if not reference.macro or reference.required or reference.name in circle:
                    continue
                if reference.name in path:
                    circle.update(path)  # one mistake, wherever one enters it
                    fail(binding.place, f"macro %{reference.name} refers to itself")
                if reference.name not in macros:
                    fail(
                        binding.place,
                        f"macro {reference} is not set (with {reference.name} ="
                        f" VALUE, or the flag --gin.{reference.name}=VALUE);"
                        f" {did_you_mean(reference.name, macros)}",
                    )
                if reference.name not in sizes:
                    inner = visit(macros[reference.name], (*path, reference.name))
                    sizes[reference.name] = inner
                size += sizes[reference.name]
            if size > MOST_VALUES:
                fail(
                    binding.place,
                    f"{binding.name} has more than {MOST_VALUES:,} values by the macros in it",
                )
            return size

        for binding in self.bindings.values():
            with self._mistakes.part():
                visit(binding, (binding.scope,) if binding.selector == MACRO else ())
        self._mistakes.tell()
        for binding in self.bindings.values():
            value = binding.value
            if binding.selector == MACRO or not isinstance(value, Reference) or not value.macro:
                continue
            while isinstance(value, Reference) and value.macro and value.name in macros:
                place, value = macros[value.name].place, macros[value.name].value
            if not isinstance(value, Reference) or not value.macro:
                with self._mistakes.part():
                    _check_type(binding.selector, binding.name, binding.parameter, value, place)
        self._mistakes.tell()

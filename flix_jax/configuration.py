"""Gin configuration: the names of the project's classes, and files and flags turned into objects.

`NAMES` is the one table of what a gin file may configure. `load` reads files and flags, checks
every name and reference before anything is built, and answers each mistake in one line with its
place (file and line, or the flag) and the nearest valid name. Modules are imported only when a
file mentions a name of theirs, so that a misspelt name costs no heavy import.
"""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import gin
from etils import epath
from gin import config as gin_config

from flix_jax.adapters.suggest import did_you_mean
from flix_jax.gin_reader import (
    MACRO,
    Binding,
    ConfigurationError,
    Reader,
    Reference,
    references,
    replace,
    resolve,
    scoped,
    short,
)
from flix_jax.mistakes import Mistake, Mistakes, describe

NAMES: dict[str, str] = {
    "T5Config": "flix_jax.models.config:T5Config",
    "FeatureType": "flix_jax.adapters.features:FeatureType",
    "first_values": "flix_jax.adapters.features:first_values",
    "FeatureSpace": "flix_jax.adapters.features:FeatureSpace",
    "AdapterSpec": "flix_jax.adapters.injection:AdapterSpec",
    "Fusion": "flix_jax.adapters.fusion:Fusion",
    "Mixture": "flix_jax.data.cells:Mixture",
    "ByteVocabulary": "flix_jax.data.vocabularies:ByteVocabulary",
    "SentencePieceVocabulary": "flix_jax.data.vocabularies:SentencePieceVocabulary",
    "SpanCorruption": "flix_jax.data.denoising:SpanCorruption",
    "EntityWindows": "flix_jax.data.windows:EntityWindows",
    "XtremeUp": "flix_jax.tasks.xtreme_up:XtremeUp",
    "TaskFormat": "flix_jax.tasks.xtreme_up:TaskFormat",
    "Babel": "flix_jax.tasks.babel:Babel",
    "babel_held_out": "flix_jax.tasks.babel:held_out",
    "babel_vocabulary": "flix_jax.tasks.babel:vocabulary",
    "Sizes": "flix_jax.tasks.babel:Sizes",
    "Translations": "flix_jax.tasks.babel_translations:Translations",
    "SourceText": "flix_jax.tasks.source_text:SourceText",
    "Schedule": "flix_jax.training.optimizers:Schedule",
    "Optimizer": "flix_jax.training.optimizers:Optimizer",
    "AxisRules": "flix_jax.training.axis_rules:AxisRules",
    "MeshSpec": "flix_jax.training.partitioning:MeshSpec",
    "Run": "flix_jax.experiments.run:Run",
    "Evaluation": "flix_jax.experiments.run:Evaluation",
    "Sweep": "flix_jax.experiments.sweep:Sweep",
    "Method": "flix_jax.experiments.sweep:Method",
    "Uniform": "flix_jax.experiments.sweep:Uniform",
}


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What `load` read. Gin's registry is global: the last one loaded is the one in force.

    Attributes:
      bindings: the values, each once.
      files: the files that were read, by the names under which flags and includes ask for them.
    """

    bindings: tuple[Binding, ...]
    files: Mapping[str, epath.Path] = dataclasses.field(default_factory=dict)

    def build(self, name: str) -> Any:
        """The object that `name` configures, with everything that it refers to.

        Raises ConfigurationError in one line, with the place of the value at fault, for whatever
        a constructor refuses, for a parameter that has no value, and for `%gin.REQUIRED` left
        unset in anything that `name` refers to (all of them are listed).
        """
        selector = resolve(name, "", NAMES)
        self._check_required(selector)
        try:
            return gin.get_configurable(selector)()
        except RecursionError as error:
            raise ConfigurationError(f"{name} is configured to contain itself") from error
        except (ValueError, TypeError, OSError) as error:
            raise ConfigurationError(self._explain(error)) from error

    @contextlib.contextmanager
    def placing_errors(self) -> Iterator[None]:
        """Puts the file and line of the values that a ValueError names before its message."""
        try:
            yield
        except Mistakes as error:
            raise Mistakes([self._placed(one) for one in error.errors]) from error
        except ConfigurationError:
            raise
        except ValueError as error:
            placed = self._placed(error)
            if placed is error:
                raise
            raise placed from error

    def _placed(self, error: ValueError | OSError) -> ValueError | OSError:
        if isinstance(error, ConfigurationError):
            return error
        message = describe(error)
        named = self._named_in(message)
        if not named and isinstance(error, Mistake):
            named = [
                b for b in self.bindings if f"{short(b.selector)}.{b.parameter}" in error.names
            ]
            named = [b for b in named if _shows(message, b)] or named
        if not named:
            return error
        places = ", ".join(dict.fromkeys(self._origin(b) for b in named))
        return ConfigurationError(f"{places}: {message}")

    def _named_in(self, message: str) -> list[Binding]:
        """The bindings whose parameters a message names in full."""
        return [
            b
            for b in self.bindings
            if b.selector != MACRO
            and re.search(rf"\b{short(b.selector)}\.{b.parameter}\b", message)
        ]

    def check_used(self) -> list[str]:
        """A line for each binding of a file that nothing built since `load` has used.

        Raises ConfigurationError for such a binding of a flag: whoever gave it meant it.
        """
        lines = []
        for binding, line in self.unused().items():
            if binding.flag:
                raise ConfigurationError(line)
            lines.append(line)
        return lines

    def unused(self) -> dict[Binding, str]:
        """The bindings that nothing built since `load` has used, each with a line that says so."""
        used = list(gin_config._OPERATIVE_CONFIG)
        lines = {}
        for binding in self.bindings:
            if any(
                binding.selector == selector and _within(scope, binding.scope)
                for scope, selector in used
            ):
                continue
            scopes = {scope for scope, selector in used if selector == binding.selector} - {""}
            if binding.selector == MACRO:
                reason = f"nothing that is used refers to %{binding.name}"
            else:
                reason = f"{binding.name} has no effect: no {short(binding.selector)} is used"
                if binding.scope and any(selector == binding.selector for _, selector in used):
                    reason += f" in the scope '{binding.scope}'"
            if scopes:
                reason += f"; {did_you_mean(binding.scope, scopes)}"
            lines[binding] = f"{binding.place}: {reason}"
        return lines

    def digest(self, without: Collection[str] = ()) -> str:
        """Equal for configurations that bind the same values but for those of `without`.

        Macros count where a value that counts refers to them.
        """
        macros = {b.scope: b for b in self.bindings if b.selector == MACRO}
        counted = [
            b for b in self.bindings if b.selector != MACRO and short(b.selector) not in without
        ]
        for binding in counted:  # grows as it goes
            for reference in references(binding.value):
                if reference.macro and reference.name in macros:
                    counted.append(macros.pop(reference.name))
        lines = sorted(f"{b.name} = {b.value!r}" for b in counted)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]

    def _check_required(self, selector: str) -> None:
        reached: list[Binding] = []
        # (a macro's name, complete selector)
        pending: set[tuple[str | None, str]] = {(None, selector)}
        visited: set[tuple[str | None, str]] = set()
        while pending - visited:
            macro, selector = (pending - visited).pop()
            visited.add((macro, selector))
            for binding in self.bindings:
                if binding.selector != selector or (macro is not None and binding.scope != macro):
                    continue
                reached.append(binding)
                for reference in references(binding.value):
                    if not reference.macro:
                        name = reference.name.rsplit("/", 1)[-1]
                        pending.add((None, resolve(name, binding.place, NAMES)))
                    elif not reference.required:
                        pending.add((reference.name, MACRO))
        missing = [
            b
            for b in self.bindings
            if b in reached and any(r.required for r in references(b.value))
        ]
        if missing:
            listed = ", ".join(
                f"{b.name} ({b.comment + ', ' if b.comment else ''}{b.place})" for b in missing
            )
            raise ConfigurationError(
                f"required and not given: {listed}; give each with --gin.NAME=VALUE"
                f" (a text in quotes of its own: --gin.{missing[0].name}=\"'text'\")"
            )

    def _explain(self, error: Exception) -> str:
        message, *calls = str(error).split("\n  In call to configurable ")
        call = re.match(r"'([^']*)' .*?(?: in scope '([^']*)')?$", calls[0]) if calls else None
        if call is None:
            return _one_line(message)
        name, scope = call.group(1), call.group(2) or ""
        missing = re.search(r"No values supplied by Gin or caller for arguments: \[(.*)\]", message)
        if missing:
            names = [item.strip(" '") for item in missing.group(1).split(",")]
            wanted = ", ".join(scoped(scope, f"{name}.{parameter}") for parameter in names)
            where = self._referring(name, scope)
            first = scoped(scope, f"{name}.{names[0]}")
            return (
                f"{where}{wanted} {'has' if len(names) == 1 else 'have'} no value; add"
                f" {first} = VALUE to a gin file or give --gin.{first}=VALUE"
            )
        mine = [
            b
            for b in self.bindings
            if short(b.selector).rsplit(".", 1)[-1] == name and _within(scope, b.scope)
        ]
        # Of values that are named in full, shown, or named in part, the first that there are.
        found = self._named_in(message)
        shown = [b for b in mine if _shows(message, b)]
        words = [b for b in mine if re.search(rf"\b{re.escape(b.parameter)}\b", message)]
        named = (
            [b for b in found if b in mine]
            or (shown and [*shown, *(b for b in words if b not in shown)])
            or [b for b in found if _within(scope, b.scope)]
            or words
            or mine
        )
        inner = {b.key[1:]: b for b in sorted(named, key=lambda b: len(b.scope))}  # those that hold
        deepest = max((len(b.scope) for b in inner.values()), default=0)
        chosen = [b for b in inner.values() if named is not mine or len(b.scope) == deepest]
        chosen = chosen[:1] if named is mine else chosen[:3]
        places = ", ".join(dict.fromkeys(map(self._origin, chosen)))
        where = f"{places}: " if chosen else self._referring(name, scope)
        label = "" if name in message else f"{name}: "
        suffix = f" (in scope '{scope}')" if scope else ""
        return f"{where}{label}{_one_line(message)}{suffix}"

    def _origin(self, binding: Binding) -> str:
        """Where a value comes from; the flag or line that set the macro when it is one."""
        macros = {b.scope: b for b in self.bindings if b.selector == MACRO}
        if isinstance(binding.value, Reference) and binding.value.name in macros:
            macro = macros[binding.value.name]
            return f"{self._origin(macro)} (through {binding.place})"
        return binding.place

    def _referring(self, name: str, scope: str) -> str:
        for binding in self.bindings:
            for reference in references(binding.value):
                if reference.name in (scoped(scope, name), name) and not reference.macro:
                    return f"{binding.place}: "
        return ""


def _shows(message: str, binding: Binding) -> bool:
    """Whether a message shows a text of a binding's value."""
    return any(repr(text) in message for text in _texts(binding.value))


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value, keys of mappings too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in (*value.keys(), *value.values()):
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


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
        error and a wrong reference.
    """
    reader = Reader(NAMES)
    for name in gin_files:
        reader.read_file(name)
    for text in bindings:
        reader.read_flag(text)
    reader.check()
    gin.clear_config()
    delegate = gin_config.ParserDelegate()

    def look_up(reference: Reference) -> Any:
        if reference.macro:
            return delegate.macro(reference.name)
        return delegate.configurable_reference(reference.name, reference.evaluate)

    for binding in reader.bindings.values():
        gin.bind_parameter(binding.key, replace(binding.value, look_up))
    return Configuration(tuple(reader.bindings.values()), reader.files)


def operative_config() -> str:
    """Every value, given or by default, of everything built since `load`; itself a gin file."""
    return str(gin.operative_config_str(max_line_length=100))

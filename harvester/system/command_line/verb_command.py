"""Build commands whose options can also be given by environment variables, as HARVESTER_RUN_MAX_USD.

Both command lines use it. The name of a variable is that of the program, the command and the option. A flag
wins over its variable, an empty variable counts as not set, and a wrong value is reported with its name.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from harvester.errors import HarvesterError, UsageError
from harvester.system.path_names import error_of_path

Function = TypeVar("Function", bound=Callable[..., Any])

# zsh loads the file of a completion at the first Tab; typer's file (0.29) then only defines its function, so
# that this Tab completes nothing. Here it calls the function, too.
_ZSH_COMPLETION = """
#compdef %(prog_name)s

%(complete_func)s() {
  eval $(env _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" %(autocomplete_var)s=complete_zsh %(prog_name)s)
}

compdef %(complete_func)s %(prog_name)s
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
  %(complete_func)s "$@"
fi
"""

# What Kubernetes sets for a Service that is called as a command (`harvester-run`), in every pod beside it.
_SERVICE_LINK = re.compile(r"(SERVICE_HOST|SERVICE_PORT\w*|PORT|PORT_\d+_\w+)\Z")


def variable_name(*words: str) -> str:
    """Return the name of the variable for these words: program, commands, option."""
    return "_".join(word.strip("-").replace("-", "_").upper() for word in words)


def without_variables(
    environment: Mapping[str, str], prefixes: Collection[str], keep: Collection[str] = ()
) -> dict[str, str]:
    """Return an environment without the variables of these commands, for a process that runs one of them.

    Args:
        prefixes: as "HARVESTER_RUN".
        keep: full names of variables that stay.
    """
    begins = tuple(f"{prefix}_" for prefix in prefixes)
    return {name: value for name, value in environment.items() if name in keep or not name.startswith(begins)}


def unknown_variables(prefix: str, known: Collection[str]) -> list[str]:
    """Return the variables that begin as those of a command and belong to none of its options.

    Args:
        prefix: as "HARVESTER_RUN".
        known: the names of its variables.
    """
    begin = f"{prefix}_"
    return sorted(
        name
        for name, value in os.environ.items()
        if name.startswith(begin)
        and value
        and name not in known
        and not _SERVICE_LINK.fullmatch(name.removeprefix(begin))
    )


def unknown_variable_text(name: str, command: str) -> str:
    """Return what is said of a variable that belongs to no option."""
    return f"warning: the variable {name} is not read: `{command}` has no such option"


class VerbCommand(TyperCommand):
    """A command with a variable for each option. Subclasses set `program`."""

    program = ""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments and variables; an error names the variable that a value came from."""
        for option, name in self.variables(ctx).items():
            option.envvar, option.show_envvar = name, False  # the epilog names them all
            value = os.environ.get(name, "")
            if value and option.multiple and _is_path(option) and "" in value.split(os.pathsep):
                raise UsageError(
                    f"{value!r} holds an empty path",
                    place=f"{_flag(option)} (environment variable {name})",
                    remedy=f"write '{os.pathsep}' between the paths only",
                )
        if not ctx.resilient_parsing and any(not word.rpartition("=")[2].strip() for word in args):
            self._require_names(ctx, args)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            wrong = error.param
            if isinstance(wrong, TyperOption) and _is_from_environment(ctx, wrong):
                error.param_hint = f"'{_flag(wrong)}' (environment variable {wrong.envvar})"
            raise

    def _require_names(self, ctx: Any, args: list[str]) -> None:
        """Refuse an empty path, which Python takes for the current folder.

        Raises:
            UsageError: names the argument or option.
        """
        values, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in self.params:
            if parameter.param_type_name != "argument" and not _is_path(parameter):
                continue
            value = values.get(parameter.name)
            words = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(word, str) and not word.strip() for word in words):
                is_option = parameter.param_type_name != "argument"
                name = _flag(parameter) if is_option else parameter.metavar or parameter.name
                raise UsageError(
                    "the name is empty",
                    place=str(name),
                    remedy="name it (`.` is the current folder); a variable of the shell may not be set",
                )

    def invoke(self, ctx: Any) -> Any:
        """Run the command. An error that names an option names its variable, if the value came from there."""
        names = self.variables(ctx)
        if not ctx.allow_extra_args:  # else the command reads its own
            for name in unknown_variables(self.prefix(ctx), names.values()):
                self.warn(ctx, unknown_variable_text(name, self._shown(ctx)))
        try:
            return super().invoke(ctx)
        except HarvesterError as error:
            for option, name in names.items():
                if error.place in option.opts and _is_from_environment(ctx, option):
                    error.place = f"{error.place} (environment variable {name})"
            raise
        except UnicodeEncodeError as error:
            if wrong_name := error_of_path(error):
                raise wrong_name from error
            raise

    def warn(self, ctx: Any, line: str) -> None:
        """Print a line on stderr."""
        typer.echo(line, err=True)

    def variables(self, ctx: Any) -> dict[TyperOption, str]:
        """Return the name of the variable of each option, but for --help."""
        return {
            option: variable_name(self.prefix(ctx), _flag(option))
            for option in self.params
            if isinstance(option, TyperOption) and not option.is_eager
        }

    def prefix(self, ctx: Any) -> str:
        """Return what the names of all variables of this command begin with."""
        return variable_name(self.program, *_words(ctx))

    def _shown(self, ctx: Any) -> str:
        return " ".join([self.program.lower(), *_words(ctx)])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example, and how an option is given by a variable."""
        super().format_epilog(ctx, formatter)
        names = self.variables(ctx)
        if not names:
            return
        option, name = next(iter(names.items()))
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(f"Each option can also be set by a variable: {name} for {_flag(option)}.")
            for option, name in names.items():
                if option.multiple:
                    between = f"'{os.pathsep}'" if _is_path(option) else "spaces"
                    formatter.write_text(f"{name} may hold several values, with {between} between them.")


class VerbGroup(TyperGroup):
    """A group of commands whose help shows the first sentence of each in full, section by section."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command; `--install-completion` and `--show-completion` give zsh a completion that works."""
        if any(word.endswith("-completion") for word in sys.argv[1:2]):
            from typer import _completion_shared

            with contextlib.suppress(AttributeError):  # another version of typer
                _completion_shared._completion_scripts["zsh"] = _ZSH_COMPLETION
        return super().main(*args, **extra)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a line or more for each command, below the title of its section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                row = (name, _first_sentence(command.help or ""))
                sections.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append(row)
        width = max(len(name) for rows in sections.values() for name, _ in rows)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), text) for name, text in rows])


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    return re.split(r"(?<=\.) ", paragraph, maxsplit=1)[0]


def _words(ctx: Any) -> list[str]:
    words: list[str] = []
    while ctx.parent is not None:
        words.insert(0, str(ctx.info_name))
        ctx = ctx.parent
    return words


def _is_path(parameter: Any) -> bool:
    """Whether the values of a parameter are paths."""
    if parameter.metavar == "PATH":
        return True
    return "Path" in str(getattr(getattr(parameter, "type_descriptor", None), "annotation", ""))


def _flag(option: Any) -> str:
    return str(max(option.opts, key=len))


def _is_from_environment(ctx: Any, option: TyperOption) -> bool:
    source = ctx.get_parameter_source(option.name)
    return source is not None and source.name == "ENVIRONMENT"


class VerbApp(typer.Typer):
    """A typer app whose commands are of one class of `VerbCommand`, with help texts without frames.

    Frames leave a third of a narrow terminal for the text, and cut words.
    """

    def __init__(self, command_class: type[VerbCommand], **settings: Any) -> None:
        super().__init__(
            cls=VerbGroup,
            no_args_is_help=True,
            pretty_exceptions_enable=False,
            rich_markup_mode=None,
            context_settings={"help_option_names": ["-h", "--help"]},
            **settings,
        )
        self._command_class = command_class

    def command(
        self, name: str | None = None, *, section: str | None = None, **settings: Any
    ) -> Callable[[Function], Function]:
        """Return the decorator that adds a command.

        Args:
            section: title below which the help lists it.
        """
        return super().command(name, cls=self._command_class, rich_help_panel=section, **settings)

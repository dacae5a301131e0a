"""``quantkit run RECIPE``"""

import shlex
from typing import Any

import click

from quantkit.cli import misuse, options
from quantkit.cli.options import Limit
from quantkit.core import recipe as recipes
from quantkit.core.recipe import Key, Step, Vocabulary
from quantkit.errors import UsageError


def _show_recipes(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    """``--list``: print the recipes that come with quantkit, and leave."""
    if not wanted or context.resilient_parsing:
        return
    formatter = click.HelpFormatter()
    found = recipes.bundled().items()
    formatter.write_dl([(name, recipes.read(file).get("about", "")) for name, file in found])
    click.echo(formatter.getvalue(), nl=False)
    context.exit()


@click.command("run")
@click.argument("recipe")
@click.option("--model", metavar="MODEL", help="Work on this one, not on the recipe's.")
@click.option("--out", "-o", metavar="FOLDER", help="Where the first step writes to.")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Another value for an option, in every step that has it or, with COMMAND.KEY=VALUE, in "
    "one; repeatable.",
)
@click.option(
    "--from",
    "first",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Begin at this step; those before it are done.",
)
@click.option("--dry-run", is_flag=True, help="Check all steps, plan the first, write nothing.")
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_recipes,
    help="Show the recipes that come with quantkit.",
)
@options.quiet
@click.pass_context
def command(
    context: click.Context,
    recipe: str,
    model: str | None,
    out: str | None,
    changes: tuple[str, ...],
    first: int,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Run the commands that RECIPE lists, a TOML file or the name of a recipe that comes with
    quantkit. Keys are the names of options.

    All steps are checked before the first one runs. The chain ends at a step that fails; --from
    goes on behind those that are done.
    """
    commands = _commands(context)
    steps = _assembled(recipe, commands, model, out, changes)
    if first > len(steps):
        raise UsageError(f"{recipe} has {len(steps)} steps, and no step {first}")
    lines = []
    for number, step in enumerate(steps, 1):
        lines.append(arguments(commands[step.command], step, quiet))
        _check(f"step {number}", commands[step.command], step, lines[-1])
    for number, (step, line) in enumerate(zip(steps, lines), 1):
        if number < first:
            continue
        shown = " ".join(_quoted(word) for word in ["quantkit", step.command, *line])
        if dry_run or not quiet:
            click.secho(f"step {number} of {len(steps)}: {shown}", bold=True, err=not dry_run)
        if not dry_run:
            commands[step.command].main(line, f"quantkit {step.command}", standalone_mode=False)
        elif number == first and "dry_run" in _keys(commands[step.command]):
            line = ["--dry-run", *line]
            commands[step.command].main(line, f"quantkit {step.command}", standalone_mode=False)


def _commands(context: click.Context) -> dict[str, click.Command]:
    """Every command but this one, and those that have commands of their own."""
    root = context.find_root()
    assert isinstance(root.command, click.Group)
    names = [name for name in root.command.list_commands(root) if name != context.command.name]
    found = {name: root.command.get_command(root, name) for name in names}
    return {n: one for n, one in found.items() if one and not isinstance(one, click.Group)}


def _assembled(
    name: str,
    commands: dict[str, click.Command],
    model: str | None,
    out: str | None,
    changes: tuple[str, ...],
) -> list[Step]:
    file = recipes.find(name)
    made = recipes.assemble(
        recipes.read(file), vocabulary(commands), file.name, model=model, out=out, changes=changes
    )
    return made.steps


def vocabulary(commands: dict[str, click.Command]) -> Vocabulary:
    """What the commands' own definitions say of their options."""
    return {name: _keys(one) for name, one in commands.items()}


def _keys(command: click.Command) -> dict[str, Key]:
    found = {}
    for parameter in command.params:
        kinds = parameter.type
        choices: tuple[str, ...] = ()
        if isinstance(parameter, click.Option) and parameter.is_flag:
            kind = "bool"
        elif isinstance(kinds, click.types.IntParamType):
            kind = "int"
        elif isinstance(kinds, click.types.FloatParamType):
            kind = "float"
        elif isinstance(kinds, Limit):
            kind = "limit"
        else:
            kind = "str"
            choices = tuple(kinds.choices) if isinstance(kinds, click.Choice) else ()
        several = parameter.multiple or parameter.nargs == -1
        found[_key(parameter)] = Key(kind, several, choices)  # type: ignore[arg-type]
    return found


def _key(parameter: click.Parameter) -> str:
    """What recipes call it. A function's argument cannot be called like the module json."""
    name = str(parameter.name)
    return "json" if name in ("as_json", "json_file") else name


def arguments(command: click.Command, step: Step, quiet: bool = False) -> list[str]:
    """The step as it would be typed behind the command's name."""
    given = dict(step.options)
    if quiet and "quiet" in _keys(command):
        given.setdefault("quiet", True)
    line: list[str] = []
    plain: list[str] = []
    for parameter in command.params:
        if _key(parameter) not in given:
            continue
        value = given[_key(parameter)]
        if isinstance(parameter, click.Option):
            line += _typed(parameter, value)
        else:
            plain += map(str, value if parameter.nargs == -1 else [value])
    dashes = ["--"] if any(word.startswith("-") for word in plain) else []
    return [*line, *dashes, *plain]


def _typed(option: click.Option, value: Any) -> list[str]:
    if option.is_flag:
        spelled = option.opts if value else option.secondary_opts
        return [max(spelled, key=len)] if spelled else []
    name = max(option.opts, key=len)
    values = value if option.multiple else [value]
    return [word for one in values for word in (name, str(one))]


def _quoted(word: str) -> str:
    """The word as a shell takes it, on one line."""
    if "\n" not in word:
        return shlex.quote(word)
    for plain, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n")):
        word = word.replace(plain, escaped)
    return f"$'{word}'"


def _check(where: str, command: click.Command, step: Step, line: list[str]) -> None:
    """See that the command would take its arguments."""
    try:
        command.make_context(f"quantkit {step.command}", list(line))
    except click.UsageError as error:
        wrong = misuse.told(error, f"quantkit {step.command}")
        raise UsageError(f"{where} ({step.command}): {wrong.message}", wrong.hint) from error
    except UsageError as error:
        raise UsageError(f"{where} ({step.command}): {error.message}", error.hint) from error

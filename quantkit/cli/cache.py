"""``quantkit cache list|clear``"""

import click


@click.group("cache")
def command() -> None:
    """Show or clear what quantkit has worked out for this machine.

    It lies in QUANTKIT_CACHE (default: ~/.cache/quantkit) and is made again when it is needed.
    Models of the Hub are not in it: 'hf cache' shows those.
    """


@command.command("list")
def list_kinds() -> None:
    """Show what there is, and where."""
    from quantkit.core import cache

    found = cache.kinds()
    for one in found:
        click.echo(f"{one.name}\t{one.files} files\t{one.bytes / 1e6:.1f} MB")
    click.echo(f"{'in' if found else 'nothing in'} {cache.root()}", err=True)


@command.command("clear")
@click.argument("kind", required=False)
def clear(kind: str | None) -> None:
    """Remove all of it, or one KIND."""
    from quantkit.core import cache

    gone = cache.clear(kind)
    for one in gone:
        click.echo(f"removed {one.name}, {one.bytes / 1e6:.1f} MB", err=True)
    if not gone:
        click.echo(f"nothing in {cache.root()}", err=True)

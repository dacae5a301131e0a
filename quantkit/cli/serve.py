"""``quantkit serve MODEL...``"""

from typing import Any

import click

from quantkit.cli import options


@click.command("serve")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--api-key", help="What clients must send.  [default: $QUANTKIT_API_KEY]")
@click.option(
    "--allowed-host", multiple=True, metavar="NAME", help="More names of this server; repeatable."
)
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="auto, torch, llama.cpp (GGUF) or vllm.",
)
@options.template
@click.option("--context", type=int, help="Tokens of prompt and answer.  [default: the model's]")
@click.option(
    "--max-batch", type=int, default=16, show_default=True, help="Texts that run together."
)
@click.option(
    "--queue", type=int, default=64, show_default=True, help="Texts that may wait beside them."
)
@click.option(
    "--kv-tokens",
    type=int,
    help="Tokens with keys and values in memory, of all texts.  [default: by free memory]",
)
@click.option(
    "--max-tokens",
    type=int,
    default=1024,
    show_default=True,
    help="Longest answer to a request that does not say.",
)
@click.option(
    "--drain-seconds",
    type=int,
    default=30,
    show_default=True,
    help="For running answers, when told to stop.",
)
@click.option("--page/--no-page", default=True, show_default=True, help="A page at / to try them.")
@options.running
@options.quiet
def command(models: tuple[str, ...], quiet: bool, **options: Any) -> None:
    """Serve models over HTTP as OpenAI does: /v1/chat/completions, /v1/completions, /v1/models; and
    a page to chat with them and compare them.

    \b
    quantkit serve demo
    quantkit serve original-model my-quantized-model
    """
    from quantkit.cli.console import Drawn
    from quantkit.workflows.serve import serve

    serve(models, note=Drawn(quiet).note, **options)

"""`narsil config`: what the pipeline would run with, and who said so."""

import rich_click as click

from narsil_stream.cli.options import config_options
from narsil_stream.core.config import Loaded
from narsil_stream.core.config.render import as_docs, as_json, as_toml


@click.command()
@click.option("--json", "form", flag_value="json", help="Print JSON: the values and where they came from.")
@click.option("--docs", "form", flag_value="docs", help="Print all settings as Markdown, as in the documentation.")
@config_options()
def config(loaded: Loaded, form: str | None) -> None:
    """Show the effective configuration as TOML, and for each value that is not a default where it came from.

    Secrets are not shown.
    """
    if form == "docs":
        text = as_docs()
    elif form == "json":
        text = as_json(loaded)
    else:
        text = as_toml(loaded)
    click.echo(text, nl=False)

"""`narsil simulate`: the scheduler's rules under seeded faults."""

from collections import Counter
from typing import TYPE_CHECKING

import rich_click as click

from narsil_stream.cli.progress import progress

if TYPE_CHECKING:
    from narsil_stream.actors.simulation.campaign import Findings

SHOWN_LINES = 40


@click.command()
@click.option("--seeds", type=click.IntRange(1), default=1_000, show_default=True, help="How many seeds to run.")
@click.option("--first-seed", type=click.IntRange(0), default=0, show_default=True, help="The first of them.")
@click.option("--seed", type=click.IntRange(0), help="Run this seed alone and print its trace.")
@click.option("--mutate", default="", metavar="NAME", help="Plant this error in the policy; `list` names all.")
@click.option(
    "--jobs", type=click.IntRange(0), default=0, show_default=True, help="Processes; 0: one for each processor."
)
@click.pass_context
def simulate(ctx: click.Context, seeds: int, first_seed: int, seed: int | None, mutate: str, jobs: int) -> None:
    """Try the scheduler against seeded faults, and check its rules after every event.

    Each seed is one run of gateways, batchers and executors on a simulated bus. Their decisions are made by the code
    that serves; messages are lost, late, doubled or out of order, processes freeze and crash, devices slow down,
    clocks step. Then all is calm, and every request must have ended once and in time, and every slot be back.

    Exits 1 when a rule was broken, after saying which seed broke it. The same seed always runs the same.

    \b
    Examples:
      narsil simulate --seeds 100000            more than `make test` runs
      narsil simulate --seed 4711               one run, line by line
      narsil simulate --mutate double-dispatch  is a wrong scheduler found?
      narsil simulate --mutate list             which wrong ones there are
    """
    if mutate == "list":
        _list_mutations()
        return
    if mutate:
        _check_known(mutate)
    broken = _one(seed, mutate) if seed is not None else _many(first_seed, seeds, jobs, mutate)
    ctx.exit(1 if broken else 0)


def _list_mutations() -> None:
    from narsil_stream.actors.simulation.mutations import MUTATIONS

    for mutation in MUTATIONS:
        click.echo(f"{mutation.name:<16} {mutation.what}")


def _check_known(mutation: str) -> None:
    from narsil_stream.actors.simulation.mutations import BY_NAME

    if mutation not in BY_NAME:
        raise click.BadParameter(f"{mutation!r} is none of {', '.join(BY_NAME)}", param_hint="--mutate")


def _one(seed: int, mutation: str) -> bool:
    """The whole trace. Returns whether a rule was broken."""
    from narsil_stream.actors.simulation.mutations import planted
    from narsil_stream.actors.simulation.run import simulate as run

    with planted(mutation):
        outcome = run(seed, traced=True)
    click.echo("\n".join(outcome.trace))
    click.echo(f"seed {seed}: " + (f"BROKEN: {outcome.broken}" if outcome.broken else "all rules held"))
    return bool(outcome.broken)


def _many(first: int, seeds: int, jobs: int, mutation: str) -> bool:
    """Stops after the first block of seeds that broke a rule. Returns whether one did."""
    from narsil_stream.actors.simulation.campaign import Findings, campaign

    findings = Findings()
    with progress(seeds, "seeds") as show:
        for found in campaign(first, seeds, jobs, mutation):
            findings.add(found)
            show(findings.seeds, findings.seeds)
            if findings.broken:
                break
    _print_table(findings)
    if findings.broken:
        _print_failure(findings, mutation)
    else:
        click.echo(f"{findings.seeds:,} seeds, {findings.events:,} events: all rules held")
    return bool(findings.broken)


def _print_table(findings: "Findings") -> None:
    """How often each fault, decision and end occurred."""
    for kind, title in (("fault", "Faults"), ("decision", "Decisions"), ("end", "How requests ended")):
        counts = Counter({name: times for (of, name), times in findings.tally.items() if of == kind})
        click.echo(f"{title:<34} {counts.total():>14,}")
        for name, times in counts.most_common():
            click.echo(f"  {name:<32} {times:>14,}")


def _print_failure(findings: "Findings", mutation: str) -> None:
    from narsil_stream.actors.simulation.mutations import planted
    from narsil_stream.actors.simulation.run import simulate as run

    seed = findings.broken[0].seed
    with planted(mutation):
        outcome = run(seed, traced=True)
    click.echo(f"\nSeed {seed} broke a rule. The last of {len(outcome.trace)} lines of its trace:")
    click.echo("\n".join(outcome.trace[-SHOWN_LINES:]))
    option = f" --mutate {mutation}" if mutation else ""
    click.echo(f"BROKEN: {outcome.broken}\nAll of it: narsil simulate --seed {seed}{option}", err=True)

"""Prints samples or figures of the miniature: `python -m instructjax.miniature --show`."""

import sys
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from instructjax.miniature import language, stats
from instructjax.miniature.benchmarks import multiple_choice, reading_comprehension
from instructjax.miniature.customers import CATEGORIES
from instructjax.miniature.judging import GOLD, judge
from instructjax.miniature.labelers import demonstrations, screens
from instructjax.miniature.text import texts
from instructjax.miniature.world import Fact, make


@dataclass(frozen=True)
class Args:
    """The built-in miniature: a procedural world in which to reproduce the paper."""

    show: bool = False
    """Print samples: facts, pretraining text, prompts with demonstrations, a ranked comparison and
    benchmark questions."""
    stats: bool = False
    """Print figures: the corpus, the categories of prompts, the gold utility of demonstrations and
    raw text, and the labelers' agreement and ties."""
    seed: int = 0
    """Seed of the world, its customers and its labelers."""


def main() -> None:
    args = tyro.cli(Args, prog="python -m instructjax.miniature")
    if not (args.show or args.stats):
        print("nothing to do: give --show or --stats (--help explains)", file=sys.stderr)
        sys.exit(2)
    console = Console()
    if args.show:
        show(console, args.seed)
    if args.stats:
        figures(console, args.seed)


def show(console: Console, seed: int) -> None:
    """Prints facts and myths, a page of each kind, a demonstration of each category, and so on."""
    console.print(Rule("Facts with a myth"))
    world = make(seed)
    table = Table("the truth", "the myth, which most pages state")
    for (subject, relation), myth in list(world.myth.items())[::12]:
        truth = Fact(subject, relation, world.truth[subject, relation])
        false = Fact(subject, relation, myth)
        table.add_row(language.state(truth), language.state(false))
    console.print(table)

    console.print(Rule("Pretraining text, one page of each kind"))
    pages = {page["page"]: page["text"] for page in texts(seed, 200)}
    for kind, text in pages.items():
        console.print(Text(f"[{kind}]", style="bold"))
        console.print(Text(f"{text}\n"))

    console.print(Rule("Prompts by category, with a demonstration"))
    table = Table("category", "prompt", "demonstration", "gold", show_lines=True)
    written = {record["category"]: record for record in demonstrations(seed, 400)}
    for category in CATEGORIES:
        record = written[category]
        gold = judge(record, record["completion"]).utility
        table.add_row(category, record["prompt"], record["completion"], f"{gold:+.1f}")
    console.print(table)

    console.print(Rule("One prompt, ranked by four labelers (1 is best, equal ranks are ties)"))
    screen = screens(seed, 1)[0]
    console.print(Text(f"{screen[0]['category']}: {screen[0]['prompt']}", style="bold"))
    names = [comparison["labeler"] for comparison in screen]
    table = Table("response", *names, "gold", show_lines=True)
    for k, response in enumerate(screen[0]["responses"]):
        gold = judge(screen[0], response).utility
        ranks = [str(comparison["ranks"][k]) for comparison in screen]
        table.add_row(response, *ranks, f"{gold:+.1f}")
    console.print(table)

    console.print(Rule("Benchmarks"))
    question = reading_comprehension(seed, 1)[0]
    console.print(Text(f"{question['prompt']} [{question['answer']}]\n"))
    choice = multiple_choice(seed, 1, myths=True)[0]
    console.print(Text(choice["prompt"]))
    for i, option in enumerate(choice["options"]):
        console.print(Text(f"  {option}{'  [true]' * (i == choice['label'])}"))


def figures(console: Console, seed: int) -> None:
    """Prints the figures that the calibration rests on."""
    table = Table("corpus", "", title="Pretraining text")
    for name, value in stats.corpus(seed, 30_000).items():
        table.add_row(name, f"{value:,.0f}" if value > 100 else f"{value:.2f}")
    console.print(table)

    table = Table("category", "here", "paper", title="Prompts, % of each category")
    for name, (here, paper) in stats.categories(seed, 10_000).items():
        table.add_row(name, f"{here:.1f}", f"{paper:.1f}")
    console.print(table)

    title = f"Gold utility (a flawless response: {GOLD.followed:g})"
    table = Table("", "mean", "10 %", "25 %", "50 %", "75 %", "90 %", title=title)
    rates = Table("", title="The judge's rates")
    for column in ("followed", "truthfulness", "hallucination", "toxicity", "perfect"):
        rates.add_column(column)
    for name, judgements in stats.writing(seed, 2000).items():
        means = stats.summary(judgements)
        spread = [f"{q:+.2f}" for q in stats.quantiles(judgements)]
        table.add_row(name, f"{means['utility']:+.2f}", *spread)
        rates.add_row(name, *(f"{means[str(c.header)]:.2f}" for c in rates.columns[1:]))
    console.print(table)
    console.print(rates)

    table = Table("labelers", "agreement, %", "ties, %", "gold judge, %", "length alone, %")
    table.title = "Ranking drafts (pairs that are ordered strictly)"
    for name, held_out in (("training", False), ("held out", True)):
        ranking = stats.labeling(seed, 600, held_out)
        agreement = f"{100 * ranking.agreement:.1f} +- {100 * ranking.interval:.1f}"
        shares = (ranking.ties, ranking.judge, ranking.length)
        table.add_row(name, agreement, *(f"{100 * share:.1f}" for share in shares))
    console.print(table)


if __name__ == "__main__":
    main()

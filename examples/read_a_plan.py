"""See what would happen to every tensor, what each format says to it, and what it costs, before any work.

    python examples/read_a_plan.py [MODEL]
"""

import sys
from collections import Counter
from pathlib import Path

import tiny

import wherry

# down projections keep 8 bits, all the rest is taken by the second step
RECIPE = "rtn:scheme=W8A16,group_size=32,targets=re:.*down_proj | gptq:scheme=W4A16_ASYM,group_size=32"


def main(model: str | Path) -> None:
    """Plan, look, and let a plan that cannot work say why."""
    plan = wherry.plan(model, RECIPE, formats=("gguf",))
    print(f"{plan.before:,} bytes now, {plan.after:,} in the checkpoint")
    for stored, count in Counter(str(row.scheme or row.reason) for row in plan.rows).items():
        print(f"{count:4}  {stored}")
    for row in plan.rows[:4]:
        print(row.name, row.shape, row.scheme, *row.notes, sep=" | ")

    try:
        wherry.plan(model, "rtn:scheme=W4A16,group_size=100")
    except wherry.BadInput as error:
        print("refused:", error)

    try:
        wherry.plan(model, "gptq:scheme=W4A16,group_size=32,ignore=lm_haed")
    except wherry.Error as error:
        print("refused:", error)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tiny.language_model())

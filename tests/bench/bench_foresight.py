"""How often the draft's list has the target's token where the draft is wrong, greedy and not.

Both choose with the same noise, so the list should be as good at temperature 1 as at 0. For each
temperature: how often the draft agrees; and of its misses, how many had the right token as its
second, third … choice.

Run at the top: `PYTHONPATH=. .venv/bin/python -m tests.bench.bench_foresight [TOKENS]`.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from itertools import islice

from tests.oracle import alone

from outrider.core.branches import RANKS
from outrider.core.drafter import Opening
from outrider.core.sampling import Sampling
from outrider.engines.drafter import ModelDrafter
from outrider.engines.llama.engine import LlamaEngine
from outrider.engines.llama.setup import LlamaSettings
from outrider_services.bench import prompts
from outrider_services.bench.traces import rendered
from outrider_services.models import catalogue

TEMPERATURES = (0.0, 0.5, 1.0)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    theirs, ours = map(catalogue.find, (catalogue.DEFAULT_TARGET, catalogue.DEFAULT_DRAFT))
    assert theirs, "pull the default models first"
    assert ours, "pull the default models first"
    settings = LlamaSettings(context=1024, slots=1, threads=2)
    target = LlamaEngine.load(theirs, settings)
    draft = replace(settings, drafts=True, unified=True, spare=1)
    drafter = ModelDrafter(LlamaEngine.load(ours, draft))
    for temperature in TEMPERATURES:
        ranks: Counter[int | None] = Counter()
        seen = 0
        for number, category in enumerate(prompts.load(None, (), 1)):
            sampling = Sampling(temperature=temperature, seed=number)
            text = target.tokenize(rendered(target, category, category.prompts[0]), special=True)
            target.rewind(0, 0)
            answer = list(islice(alone(target, text, sampling), count))
            drafter.open(0, Opening(sampling, target.info.vocabulary.size))
            for token in answer:
                while not (found := drafter.propose(0, text)):
                    pass  # it reads a long text in parts
                seen += 1
                if found[0].token != token:
                    others = drafter.others(0)
                    ranks[others.index(token) if token in others else None] += 1
                text.append(token)
        misses = ranks.total()
        shares = ", ".join(f"{ranks[n] / misses:.0%}" for n in range(len(RANKS)))
        print(
            f"temperature {temperature}: agrees at {1 - misses / seen:.1%} of {seen}; of {misses} "
            f"misses foreseen {1 - ranks[None] / misses:.1%} ({shares})"
        )


if __name__ == "__main__":
    main()

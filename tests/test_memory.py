"""studies/memory.py: the step that it measures is that of the formula, and its rows say both."""
import pytest

from cli import UserError, run_cli
from kernels import reference
from recipes import STAGES
from studies import cost, memory


@pytest.mark.parametrize("stage", STAGES)
def test_the_step_has_the_parameters_of_the_formula(stage, monkeypatch, capsys):
    monkeypatch.setattr(reference, "attention_by_products", reference.attention_by_products)     # put back afterwards
    monkeypatch.setattr(memory, "MID", memory.TINY)
    seen = []

    def here(call, module, **_):    # in this process, which has held more before: its peak says nothing
        seen.append(memory.step_memory(stage, memory.TINY) | dict(peak=10**6))
        return seen[-1]
    monkeypatch.setattr(memory, "in_fresh_process", here)
    ratio = memory.compare(stage)
    lora = memory.LORA if stage == "decoder" else 0
    parts = cost.trained_and_frozen(stage, memory.TINY, memory.RECIPE, lora)
    assert seen[0]["parameters"] == sum(map(sum, parts.values())) and seen[0]["loss"] > 0
    formula = cost.memory(stage, memory.TINY, memory.RECIPE, 1, 679, 60, lora=lora)
    assert ratio == pytest.approx(10**6 / sum(formula.values()))
    row = capsys.readouterr().out
    assert row.startswith(f"| {stage}") and row.count("|") == 11 and f"{ratio - 1:+.1%}" in row


def test_peak_of_a_command():
    one = memory.peak_of(["-m", "cli"])
    assert 50e6 < one < 2e9         # that of Python and torch
    with pytest.raises(UserError, match="none.py failed: .*none.py"):
        memory.peak_of(["none.py"])
    assert run_cli(lambda: memory.main(["nonsense"])) == 2
